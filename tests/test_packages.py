"""Environments of other packages against the packages' own stepping. What is not installed is skipped."""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import envs, nets, run
from jrl.algos import ppo
from jrl.envs import packages, wrappers
from jrl.envs.types import MaskedObs, example_action
from jrl.experience import rollout

RANK_PROMOTION = "allow"  # these packages promote ranks


def needs(package):
    module = packages.IMPORTED_AS.get(package, package)
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"needs {package}")


SOME = [
    pytest.param("brax/inverted_pendulum", {"steps": 7}, marks=[needs("brax"), pytest.mark.slow]),
    pytest.param(
        "craftax/Craftax-Classic-Symbolic-v1", {"max_timesteps": 7}, marks=[needs("craftax"), pytest.mark.slow]
    ),
    pytest.param("gymnasium/HalfCheetah-v5", {"steps": 7}, marks=needs("mujoco")),
    pytest.param("gymnasium/ALE/Pong-v5", {"steps": 7, "num_frames": 2}, marks=[needs("ale_py"), pytest.mark.slow]),
    pytest.param("jumanji/Game2048-v1", {"steps": 7}, marks=needs("jumanji")),
    pytest.param("jumanji/Snake-v1", {}, marks=needs("jumanji")),
    pytest.param("navix/Navix-DoorKey-5x5-v0", {"max_steps": 7}, marks=[needs("navix"), pytest.mark.slow]),
    pytest.param("pgx/tic_tac_toe", {}, marks=needs("pgx")),
    pytest.param("playground/CartpoleSwingup", {"steps": 7}, marks=[needs("playground"), pytest.mark.slow]),
    pytest.param("xminigrid/MiniGrid-DoorKey-5x5", {"max_steps": 7}, marks=[needs("xminigrid"), pytest.mark.slow]),
]


def played(env, key, steps):
    """Random legal moves in one environment without resets: what each step returned."""
    step = jax.jit(env.step)
    obs, state = jax.jit(env.reset)(key)
    found = [(obs, state)]
    for t in range(steps):
        key_act = jax.random.fold_in(key, t)
        if isinstance(obs, MaskedObs):
            action = jax.random.categorical(key_act, jnp.where(obs.mask, 0.0, -jnp.inf))
        elif isinstance(env.action_space, envs.Discrete):
            action = jax.random.randint(key_act, (), 0, env.action_space.n)
        else:
            action = example_action(env.action_space)
        obs, state, *rest = step(key_act, state, action)
        found.append((obs, state, action, *rest))
        if rest[1] | rest[2]:
            break
    return found


@pytest.mark.parametrize("name, params", SOME)
def test_an_environment_follows_the_protocol_and_ppo_takes_steps_in_it(name, params, key):
    env = envs.make(name, **params)
    assert env.name == name and set(params.items()) <= set(env.settings)
    steps = played(env, key, 7)
    if "steps" in str(params):
        assert len(steps) == 8 and steps[-1][5] and not steps[-1][4]  # truncated, not terminated
    config = ppo.Config(num_envs=2, num_steps=8, num_minibatches=2, num_epochs=1, network=nets.Config(hidden=(8,)))
    algo = ppo.make(env, config)
    _, metrics = jax.jit(lambda key: algo.update(algo.init(key)))(key)
    assert jnp.isfinite(metrics["loss"])


@needs("playground")
@pytest.mark.slow
def test_playground_is_stepped_as_by_itself(key):
    from mujoco_playground import registry

    env = envs.make("playground/CartpoleSwingup", steps=3)
    other = registry.load("CartpoleSwingup", config_overrides={"impl": "jax"})
    steps = played(env, key, 3)
    state = jax.jit(other.reset)(key)
    np.testing.assert_array_equal(steps[0][0], state.obs)
    for obs, _, action, reward, terminated, _ in steps[1:]:
        state = jax.jit(other.step)(state, action)
        np.testing.assert_array_equal(obs, state.obs)
        assert reward == state.reward and not terminated
    assert steps[-1][5]  # the clock


@needs("ale_py")
def test_a_game_of_atari_is_prepared_as_in_the_paper(key):
    import gymnasium

    from jrl.envs import host

    env = envs.make("gymnasium/ALE/Breakout-v5", num_frames=4)
    spec = envs.observation_spec(env)
    assert spec.shape == (84, 84, 4) and spec.dtype == np.uint8 and env.time_limit == 27_000
    theirs = gymnasium.wrappers.AtariPreprocessing(gymnasium.make("ALE/Breakout-v5", frameskip=1))
    obs, state = env.reset(key)
    first, _ = theirs.reset(seed=int(host.seed_of(key)))
    np.testing.assert_array_equal(obs, np.stack([first] * 4, -1))
    frames = [first] * 4
    for t in range(10):
        obs, state, reward, *_ = env.step(jax.random.fold_in(key, t), state, jnp.int32(t % 4))
        frame, their_reward, *_ = theirs.step(t % 4)
        frames = [*frames[1:], frame]
        np.testing.assert_array_equal(obs, np.stack(frames, -1))
        assert reward == their_reward


@needs("brax")
@pytest.mark.slow
def test_brax_is_stepped_as_by_itself(key):
    from brax import envs as theirs

    env, other = envs.make("brax/ant", steps=3), theirs.get_environment("ant", backend="positional")
    steps = played(env, key, 3)
    state = jax.jit(other.reset)(key)
    np.testing.assert_array_equal(steps[0][0], state.obs)
    for obs, _, action, reward, terminated, _ in steps[1:]:
        state = jax.jit(other.step)(state, action)
        np.testing.assert_allclose(obs, state.obs, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(reward, state.reward, rtol=1e-4, atol=1e-4)
        assert terminated == (state.done > 0)
    assert steps[-1][5] and env.action_space == envs.Box((-1.0,) * 8, (1.0,) * 8) and env.time_limit == 3


@needs("craftax")
@pytest.mark.slow
def test_craftax_tells_death_from_the_clock(key):
    from craftax.craftax_env import make_craftax_env_from_name

    other = make_craftax_env_from_name("Craftax-Classic-Symbolic-v1", auto_reset=False)
    env = envs.make("craftax/Craftax-Classic-Symbolic-v1", max_timesteps=3)
    steps = played(env, key, 3)
    obs, state = other.reset_env(key, other.default_params)
    np.testing.assert_array_equal(steps[0][0], obs)
    for t, (obs, _, action, reward, *_) in enumerate(steps[1:]):
        theirs = jax.jit(other.step_env)(jax.random.fold_in(key, t), state, action, other.default_params)
        state = theirs[1]
        np.testing.assert_array_equal(obs, theirs[0])
        assert reward == theirs[2]
    assert not steps[-1][4] and steps[-1][5]
    dead = jax.jit(env.step)(key, steps[0][1].replace(player_health=jnp.int32(-9)), jnp.int32(0))
    assert dead[3] and not dead[4]
    assert env.steps_per_reset == 16 and env.first_truncation == 3


@needs("jumanji")
def test_jumanji_s_masks_are_those_of_its_observations(key):
    import jumanji

    env, other = envs.make("jumanji/Game2048-v1"), jumanji.make("Game2048-v1")
    steps = played(env, key, 12)
    state, timestep = jax.jit(other.reset)(key)
    for obs, _, action, reward, *_ in steps[1:]:
        state, timestep = jax.jit(other.step)(state, action)
        np.testing.assert_array_equal(obs.mask, timestep.observation.action_mask)
        np.testing.assert_array_equal(obs.obs, np.ravel(timestep.observation.board))
        assert reward == timestep.reward
    assert "jumanji/LevelBasedForaging-v0" not in packages.installed()["jumanji"]  # several agents


@needs("navix")
def test_navix_ends_by_its_goal_or_by_the_clock(key):
    env = envs.make("navix/Navix-Empty-5x5-v0")
    assert env.time_limit == 100 and env.action_space == envs.Discrete(7)
    step = jax.jit(env.step)
    obs, state = jax.jit(env.reset)(key)
    assert obs.shape == (7, 7, 3) and obs.dtype == jnp.float32 and obs.max() <= 1.1
    ended = []
    for action in (2, 2, 1, 2, 2):  # forward twice, turn right, forward twice: the goal
        obs, state, reward, terminated, truncated = step(key, state, jnp.int32(action))
        ended.append((float(reward), bool(terminated), bool(truncated)))
    assert ended[-1] == (1.0, True, False) and not any(t for _, t, _ in ended[:-1])


@needs("xminigrid")
def test_xminigrid_is_stepped_as_by_itself(key):
    import xminigrid

    env, (other, params) = envs.make("xminigrid/MiniGrid-Empty-5x5"), xminigrid.make("MiniGrid-Empty-5x5")
    steps = played(env, key, 5)
    timestep = other.reset(params, key)
    for obs, _, action, reward, terminated, truncated in steps[1:]:
        timestep = other.step(params, timestep, action)
        np.testing.assert_allclose(obs, timestep.observation / 10, rtol=1e-6)
        assert reward == timestep.reward and (terminated | truncated) == timestep.last()


@needs("pgx")
def test_a_game_of_two_is_the_agent_s_and_the_other_s_turn_by_turn(key):
    env = envs.make("pgx/tic_tac_toe")
    for seed in range(6):
        steps = played(env, jax.random.key(seed), 9)
        stones = [int(obs.obs.sum()) for obs, *_ in steps]
        assert stones[0] in (0, 1)  # the other may have begun
        assert all(b - a == 2 for a, b in itertools.pairwise(stones[:-1]))
        assert steps[-1][4] and steps[-1][3] in (-1, 0, 1) and not any(s[3] for s in steps[1:-1])
        seat, game = int(steps[-1][1][1]), steps[-1][1][0]
        assert steps[-1][3] == game.rewards[seat]


@needs("pgx")
def test_a_saved_policy_is_an_opponent(key):
    from jrl.envs.packages import pgx

    config = ppo.Config(num_envs=2, num_steps=4, num_minibatches=2, network=nets.Config(hidden=(8,)))
    algo = ppo.make(envs.make("pgx/tic_tac_toe"), config)
    against = envs.make("pgx/tic_tac_toe", opponent=pgx.policy(algo.act, algo.init(key)))
    assert dict(against.settings)["opponent"] == "trained"
    assert played(against, key, 9)[-1][4]
    with pytest.raises(ValueError, match="opponent must be random or a function"):
        envs.make("pgx/tic_tac_toe", opponent="best")


@pytest.mark.parametrize("package", packages.EXTRAS)
def test_a_package_that_is_not_there_is_named_with_its_extra(package, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name=packages.IMPORTED_AS.get(package, package))

    monkeypatch.setattr(packages.importlib, "import_module", absent)
    with pytest.raises(ValueError, match=rf"it needs the package {package}, .* pip install 'jrl\[{package}\]'"):
        envs.make(f"{package}/anything")


@needs("pgx")
def test_a_wrong_id_or_parameter_is_one_line():
    with pytest.raises(ValueError, match="unknown environment pgx/chese; did you mean pgx/chess"):
        envs.make("pgx/chese")
    with pytest.raises(ValueError, match="pgx/chess has no setting 'depth'; it has: opponent"):
        envs.make("pgx/chess", depth=3)


# Resets that cost


def test_shared_resets_begin_episodes_in_states_of_their_span(key):
    """Episodes of two steps whose observation is the number that their reset drew."""

    def reset(key):
        number = jax.random.uniform(key)
        return number, (number, jnp.int32(0))

    def step(key, state, action):
        number, t = state
        return number, (number, t + 1), 1.0, t + 1 >= 2, False

    exact = envs.strict(envs.Environment("Numbers", reset, step, envs.Discrete(2)))
    shared = wrappers.shared_resets(exact, 8)
    assert dict(shared.settings)["wrappers"] == ("shared_resets(steps=8)",)

    def act(memory, obs, first, noise):
        return memory, jnp.zeros(3, jnp.int32), ()

    firsts = {}
    for env in (exact, shared):
        _, steps, episodes = rollout.collect(env, rollout.start(env, key, 3, ()), act, (), key, 16)
        assert episodes.ended == 24
        obs, first = np.asarray(steps.obs), np.asarray(steps.first)
        firsts[env.steps_per_reset] = [obs[1:, b][first[1:, b]].tolist() for b in range(3)]
    assert all(len(set(numbers)) == 7 for numbers in firsts[1])
    for numbers in firsts[8]:  # episodes that end in steps 0 to 7, then in 8 to 15
        assert len(set(numbers[:4])) == 1 and len(set(numbers[4:])) == 1 and numbers[0] != numbers[-1]
    assert len({numbers[0] for numbers in firsts[8]}) == 3  # no two environments share
    with pytest.raises(ValueError, match="shared_resets: steps must be an integer of at least 1; got 0"):
        wrappers.shared_resets(exact, 0)
    for wrong in (-1, 0):
        with pytest.raises(ValueError, match=f"Numbers: steps_per_reset must be an integer of at least 1; got {wrong}"):
            envs.strict(envs.Environment("Numbers", reset, step, envs.Discrete(2), steps_per_reset=wrong))


def test_shared_resets_are_drawn_as_rarely_as_they_say(key):
    """Exact resets of a rollout take 64 x 4 states of 4,000 bytes besides the states themselves."""

    def reset(key):
        return jnp.zeros(3), jax.random.normal(key, (1000,))

    def step(key, state, action):
        return jnp.zeros(3), state, 1.0, state[0] > 3, False

    def act(memory, obs, first, noise):
        return memory, jnp.zeros(4, jnp.int32), ()

    def collected(env):
        actors = rollout.start(env, key, 4, ())
        return jax.jit(lambda a: rollout.collect(env, a, act, (), key, 64)).lower(actors).compile().memory_analysis()

    env = envs.Environment("Large", reset, step, envs.Discrete(2))
    exact, shared = (collected(envs.strict(e)).temp_size_in_bytes for e in (env, wrappers.shared_resets(env, 16)))
    assert exact > 64 * 4 * 4000 > 3 * shared


@pytest.mark.slow
def test_runs_load_again(tmp_path, key):
    if importlib.util.find_spec("pgx") is None:
        pytest.skip("needs pgx")
    config = ppo.Config(num_envs=2, num_steps=8, num_minibatches=2, network=nets.Config(hidden=(8,)))
    algo = ppo.make(envs.make("pgx/tic_tac_toe"), config)
    result = run.train(algo, key, 64, num_seeds=2, eval_episodes=4, run_dir=tmp_path / "run", progress=False)
    np.testing.assert_array_equal(run.load(tmp_path / "run").state.updates, result.state.updates)


@needs("jumanji")
def test_jumanji_s_clock_truncates_and_its_joint_masks_are_over_combinations(key):
    snake = envs.make("jumanji/Snake-v1")
    obs, state = jax.jit(snake.reset)(key)
    late = state.replace(step_count=jnp.int32(3999))
    legal = jnp.argmax(obs.mask)
    _, _, _, terminated, truncated = jax.jit(snake.step)(key, late, legal)
    assert truncated and not terminated
    boards = envs.make("jumanji/Sudoku-v0")
    obs, _ = jax.eval_shape(boards.reset, key)
    assert boards.action_space == envs.Discrete(9**3) and obs.mask.shape == (729,)
    steps = played(boards, key, 3)
    board = np.asarray(steps[0][0].obs).reshape(9, 9)
    filled = np.asarray(steps[1][0].obs).reshape(9, 9)
    assert ((board != filled).sum()) == 1
