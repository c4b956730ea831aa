"""Environments on the host against gymnasium's own stepping."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from jrl import envs, nets, run
from jrl.algos import dqn, ppo, pqn, r2d2, td
from jrl.envs import host, wrappers
from jrl.experience import rollout
from jrl.run.evaluate import evaluate

NUM_ENVS = 3
RANK_PROMOTION = "allow"  # as in a user's own process


class Corridor(gymnasium.Env):
    """Walk to the right end; each step is rewarded by 1. The first place is drawn by the seed."""

    observation_space = spaces.Dict(
        {"place": spaces.Discrete(4, start=1), "picture": spaces.Box(0, 255, (4, 4, 1), np.uint8)}
    )
    action_space = spaces.Discrete(2, start=5)  # 5 stays, 6 goes to the right
    made = 0

    def __init__(self):
        type(self).made += 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = 1 + int(self.np_random.integers(2)), 0
        return self._seen(), {}

    def step(self, action):
        assert action in (5, 6)
        self.place, self.steps = min(4, self.place + action - 5), self.steps + 1
        return self._seen(), 1.0, self.place == 4, self.steps == 3, {}

    def _seen(self):
        return {"place": self.place, "picture": np.full((4, 4, 1), self.place, np.uint8)}


@pytest.fixture
def corridor():
    Corridor.made = 0
    return envs.on_host(Corridor)


def walk(env, key, actions):
    """The steps of a rollout that takes ``actions [T, B]``."""

    @jax.jit
    def played(key):
        actors = rollout.start(env, key, actions.shape[1], ())

        def act(memory, obs, first, action):
            return memory, action, ()

        return rollout.collect(env, actors, act, jnp.asarray(actions), key, len(actions))

    return played(key)


def test_an_episode_is_gymnasiums_own(key):
    env = envs.make("gymnasium/CartPole-v1")
    theirs = gymnasium.make("CartPole-v1")
    obs, state = env.reset(key)
    expected, _ = theirs.reset(seed=int(host.seed_of(key)))
    np.testing.assert_array_equal(obs, expected)
    for t in range(200):
        obs, state, reward, terminated, truncated = env.step(jax.random.fold_in(key, t), state, jnp.int32(t % 2))
        expected, *others, _ = theirs.step(t % 2)
        np.testing.assert_array_equal(obs, expected)
        assert (float(reward), bool(terminated), bool(truncated)) == tuple(others)
        if terminated:
            break
    assert terminated and state.clock == t + 3  # two resets among them: the next episode has begun
    expected, _ = theirs.reset(seed=int(host.seed_of(jax.random.fold_in(key, t))))
    np.testing.assert_array_equal(env.host.restart(state)[0], expected)


def test_the_observation_before_the_reset_is_kept_and_the_clock_truncates(key, corridor):
    actions = np.zeros((6, NUM_ENVS), np.int32)
    actions[:, 0] = 1
    _, steps, episodes = walk(corridor, key, actions)

    def place(obs):
        return np.argmax(obs["place"], -1) + 1

    assert not steps.terminated[:, 1:].any() and not steps.truncated[:, 0].any()
    np.testing.assert_array_equal(steps.truncated[:, 1], [False, False, True] * 2)
    np.testing.assert_array_equal(place(steps.next_obs)[:, 0] == 4, steps.terminated[:, 0])
    ended = np.asarray(steps.terminated | steps.truncated)
    np.testing.assert_array_equal(place(steps.obs)[1:][~ended[:-1]], place(steps.next_obs)[:-1][~ended[:-1]])
    assert (place(steps.obs)[1:][ended[:-1]] <= 2).all()
    np.testing.assert_array_equal(steps.obs["picture"][..., 0, 0, 0], place(steps.obs))
    assert episodes.ended == ended.sum() and episodes.return_sum <= steps.reward.sum()


def test_one_call_steps_all_agents(key, corridor, monkeypatch):
    rows = []
    step = host.Simulators.step
    monkeypatch.setattr(
        host.Simulators,
        "step",
        lambda self, tickets, actions: rows.append(len(tickets)) or step(self, tickets, actions),
    )
    env = envs.on_host(Corridor)

    def two_steps(key):
        _, state = env.reset(key)
        for _ in range(2):
            _, state, *_ = env.step(key, state, jnp.int32(0))
        return state.simulator

    seeds = jax.jit(jax.vmap(jax.vmap(two_steps)))(jax.random.split(key, (2, 3)))
    assert rows == [6, 6] and len(np.unique(seeds)) == 6


@pytest.mark.parametrize("gone", [True, False])
def test_an_episode_whose_simulator_is_gone_or_elsewhere_is_truncated_at_its_last_observation(key, corridor, gone):
    obs, state = corridor.reset(key)
    again = envs.on_host(Corridor) if gone else corridor
    if not gone:
        corridor.step(key, state, jnp.int32(0))
    next_obs, state, reward, terminated, truncated = again.step(key, state, jnp.int32(1))
    jax.tree.map(np.testing.assert_array_equal, next_obs, obs)
    assert truncated and not terminated and reward == 0
    _, state, reward, _, truncated = again.step(key, state, jnp.int32(0))
    assert reward == 1 and not truncated


def test_a_state_that_is_older_than_its_simulator_never_joins_another_episode(key, corridor):
    _, old = corridor.reset(key)
    _, old, *_ = corridor.step(key, old, jnp.int32(0))
    state = old
    for _ in range(3):  # on to the next episode, and to its first step
        _, state, *_ = corridor.step(key, state, jnp.int32(0))
    next_obs, _, reward, _, truncated = corridor.step(key, old, jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, next_obs, old.obs)
    assert truncated and reward == 0


class Odd(gymnasium.Env):
    """Gives what it is made of."""

    action_space = spaces.Discrete(2)

    def __init__(self, space, obs, step=None, reset=None):
        self.observation_space, self.obs, self.returned, self.begun = space, obs, step, reset

    def reset(self, *, seed=None, options=None):
        return (self.obs, {}) if self.begun is None else self.begun

    def step(self, action):
        if isinstance(self.returned, Exception):
            raise self.returned
        return (self.obs, 1.0, False, False, {}) if self.returned is None else self.returned


IMAGE, UNIT = spaces.Box(0, 255, (2, 3), np.uint8), spaces.Box(0, 1, (1,))


@pytest.mark.parametrize(
    "odd, message",
    [
        ((IMAGE, np.zeros((3, 2), np.uint8)), r"must have shape \(2, 3\); got \(3, 2\)"),
        ((IMAGE, np.full((2, 3), 0.5)), "must be uint8; got float64"),
        ((spaces.Discrete(3, start=1), 4), "an observation is not in its space Discrete"),
        ((spaces.Discrete(3), 1.5), "an observation is not in its space Discrete"),
        ((UNIT, np.zeros(1), (np.zeros(1), 0.0, False, {})), r"step must return \(obs, .*\); got 4 values"),
        ((UNIT, np.zeros(1), (np.zeros(1), None, False, False, {})), "a number as the reward; got None"),
        ((UNIT, np.zeros(1), (np.zeros(1), np.ones(2), False, False, {})), "a number as the reward"),
        ((UNIT, np.zeros(1), None, np.zeros(1)), r"reset must return \(obs, info\); got ndarray"),
        ((UNIT, np.zeros(1), RuntimeError("the cable is out")), "RuntimeError: the cable is out"),
    ],
)
def test_what_a_simulator_does_wrong_is_said_with_its_name(odd, message, key):
    env = envs.on_host(lambda: Odd(*odd), "Odd")
    with pytest.raises(Exception, match=f"Odd: .*{message}"):
        jax.block_until_ready(env.step(key, env.reset(key)[1], jnp.int32(0)))


def test_wide_integers_become_floats_and_what_is_no_maker_is_refused():
    wide = spaces.Box(0, 2**40, (1,), np.int64)
    assert host.to_arrays(wide, np.array([2**33])).tolist() == [2.0**33]
    assert host.to_arrays(spaces.Box(0, 9, (1,), np.int64), np.array([3])).dtype == np.int32
    for make, message in (
        (lambda: None, "make must return an environment with gymnasium's interface; got None"),
        (lambda: Odd, "make must return an environment with gymnasium's interface; got <class"),
        (Odd(UNIT, np.zeros(1)), "on_host: make must be a function"),
    ):
        with pytest.raises(ValueError, match=message):
            envs.on_host(make)


def test_an_evaluation_gives_its_simulators_back_and_repeats_itself(key):
    env = envs.make("gymnasium/CartPole-v1")
    algo = ppo.make(env, ppo.Config(num_envs=2, num_steps=4, num_minibatches=1, network=nets.Config(hidden=(8,))))
    states = jax.vmap(algo.init)(jax.random.split(key, 2))
    play = jax.jit(lambda state, key: evaluate(algo, state, key, 3))
    first = [play(jax.tree.map(lambda x, i=i: x[i], states), key) for i in range(2)]
    together = jax.jit(jax.vmap(lambda state: evaluate(algo, state, key, 3)))(states)
    for i in range(2):
        np.testing.assert_array_equal(first[i].lengths, together.lengths[i])
    simulators = env.host.render.__self__
    assert len(simulators._busy) == 4 and len(simulators._free) == 6  # 2 seeds x 2 environments, 2 seeds x 3 episodes


def test_spaces_become_ours():
    space, to_host = host.actions(spaces.Box(-1, np.array([[1.0, 2.0]], np.float64), dtype=np.float64))
    assert space == envs.Box((-1, -1), (1, 2))
    assert to_host(np.zeros(2, np.float32)).shape == (1, 2) and to_host(np.zeros(2, np.float32)).dtype == np.float64
    space, to_host = host.actions(spaces.MultiDiscrete([[2, 3]], start=[[0, 4]]))
    assert space == envs.MultiDiscrete((2, 3)) and to_host(np.array([1, 2])).tolist() == [[1, 6]]
    space, to_host = host.actions(spaces.MultiBinary(3))
    assert space == envs.MultiDiscrete((2, 2, 2))
    assert host.to_arrays(spaces.MultiDiscrete([2, 3]), np.array([1, 0])).tolist() == [0, 1, 1, 0, 0]
    first, second = host.to_arrays(
        spaces.Tuple([spaces.Box(0, 1, (2,), np.float64), spaces.MultiBinary(2)]), (np.ones(2), np.ones(2, np.int8))
    )
    assert first.dtype == np.float32 and second.dtype == np.int8
    with pytest.raises(ValueError, match="observations must be arrays; got the space Text"):
        host.to_arrays(spaces.Text(3), "abc")


def test_wrappers_and_records_say_what_to_do_instead(corridor):
    with pytest.raises(ValueError, match="time_limit: Corridor lives on the host"):
        wrappers.time_limit(corridor, 3)
    with pytest.raises(ValueError, match=r"Corridor has the interface of gymnasium: envs.on_host"):
        ppo.make(Corridor())
    with pytest.raises(ValueError, match="gymnasium/CartPole-v9"):
        envs.make("gymnasium/CartPole-v9")
    with pytest.raises(ValueError, match="steps must be"):
        envs.make("gymnasium/CartPole-v1", steps=0)
    with pytest.raises(ValueError, match=r"cannot make CartPole-v1: .*gravitation"):
        envs.make("gymnasium/CartPole-v1", gravitation=3)


SMALL = {"num_envs": 2, "num_steps": 4}
REPLAY = {"learning_starts": 0, "batch_size": 4, "capacity": 100}
VALUE = nets.ValueConfig(hidden=(8,))
ALGORITHMS = {
    "ppo": lambda env: ppo.make(env, ppo.Config(**SMALL, num_minibatches=1, network=nets.Config(hidden=(8,)))),
    "dqn": lambda env: dqn.make(env, dqn.Config(**SMALL, **REPLAY, network=VALUE)),
    "pqn": lambda env: pqn.make(env, pqn.Config(**SMALL, num_minibatches=1, network=VALUE)),
    "r2d2": lambda env: r2d2.make(
        env, r2d2.Config(**SMALL, **REPLAY, burn_in=1, length=3, network=nets.ValueConfig(hidden=(8,), lstm=4))
    ),
    "td": lambda env: td.make(env, td.Config(num_steps=8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_trains_in_a_run_that_is_resumed(name, tmp_path):
    env = envs.make("gymnasium/FrozenLake-v1", steps=20)
    algo = ALGORITHMS[name](env)
    steps = algo.env_steps_per_update * 6
    options = {"num_seeds": 2, "progress": False, "eval_episodes": 2, "run_dir": tmp_path / "run"}
    options["eval_every"] = algo.env_steps_per_update * 2
    result = run.train(algo, jax.random.key(0), steps, **options, on_chunk=lambda chunk: True)
    assert not result.finished
    result = run.train(algo, jax.random.key(0), steps, **options, resume=True)
    assert result.finished and np.isfinite(result.metrics[algo.losses[0]]).all()
    assert len(result.summary["eval"]["per_seed"]) == 2


def test_a_policy_is_drawn_from_the_simulators_pictures(tmp_path, key):
    env = envs.make("gymnasium/FrozenLake-v1", steps=3)
    algo = ALGORITHMS["ppo"](env)
    length = run.record(algo, algo.init(key), key, tmp_path / "policy.gif")
    from PIL import Image

    with Image.open(tmp_path / "policy.gif") as picture:
        assert 1 <= length <= 4 and picture.size[0] > 100
    with pytest.raises(ValueError, match=r"is drawn into files .gif or .mp4; got .png"):
        run.record(algo, algo.init(key), key, tmp_path / "policy.png")
