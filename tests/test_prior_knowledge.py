"""What is known beforehand or learned beside: demonstrations, ways back from a goal, episodes that begin near it, auxiliary tasks."""

import bits
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import algorithm, envs, nets, run
from jrl.algos import auxiliary_tasks, bc, dqfd, dqn, fbrl, ppo, reverse_curriculum
from jrl.envs import tabular, wrappers
from jrl.equations import losses
from jrl.experience import replay, ring
from jrl.run import loop

RANK_PROMOTION = "allow"  # gymnax promotes ranks
VALUES = nets.ValueConfig(hidden=(8,), norm="none")
CORRIDOR = tabular.gridworld(["S" + "." * 8 + "G"], rewards={"G": 1.0})  # 1 for the goal, 9 steps to the right
ENV = tabular.environment(CORRIDOR, "Corridor", time_limit=40)
RIGHT = 2
PPO = ppo.Config(num_envs=2, num_steps=16, num_minibatches=2, network=nets.Config(hidden=(8,)))


near_goal = tabular.environment(CORRIDOR._replace(start=1.0 * (jnp.arange(10) == 7)), time_limit=40).reset


def shown(steps=24, episodes=2):
    """Somebody walks to the right in each of two environments; the last row of an episode is its end."""
    s = jnp.arange(steps) % 9
    obs, next_obs = (jnp.broadcast_to(jax.nn.one_hot(x, 10)[:, None], (steps, episodes, 10)) for x in (s, s + 1))
    ends = jnp.broadcast_to((s == 8)[:, None], (steps, episodes))
    action = jnp.full((steps, episodes), RIGHT)
    return replay.Step(obs, action, 1.0 * ends, ends, jnp.zeros_like(ends), next_obs)


def made_dqfd(demonstrations=None, **more):
    small = {"num_envs": 2, "batch_size": 8, "num_shown": 4, "capacity": 100, "pretraining": 3, "n_step": 3}
    config = dqfd.Config(**(small | {"network": VALUES} | more))
    return dqfd.make(ENV, shown() if demonstrations is None else demonstrations, config)


def made_fbrl(env=ENV, goals=None, **more):
    small = {"num_envs": 2, "batch_size": 8, "num_imagined": 2, "length": 4, "capacity": 100, "learning_starts": 20}
    config = fbrl.Config(**(small | {"network": VALUES, "predecessor": "one_hot"} | more))
    return fbrl.make(env, config, goals=goals)


def made_curriculum(near=near_goal, **more):
    small = {"num_updates": 2, "num_new": 4, "num_old": 2, "capacity": 12, "walk": 3, "episodes": 2, "horizon": 10}
    return reverse_curriculum.make(
        lambda env: ppo.make(env, PPO), ENV, near, reverse_curriculum.Config(**(small | more))
    )


def made_auxiliary(env=ENV, network=None, **more):
    tasks = auxiliary_tasks.Config(**({"num_gradient_steps": 2, "batch_size": 8, "capacity": 64, "n_step": 3} | more))
    config = ppo.Config(num_envs=2, num_steps=16, num_minibatches=2, network=PPO.network, auxiliary=tasks)
    return ppo.make(env, config, network=network)


MAKERS = pytest.mark.parametrize(
    "make", [made_auxiliary, made_curriculum, made_dqfd, made_fbrl], ids=["auxiliary", "curriculum", "dqfd", "fbrl"]
)


@pytest.mark.slow
@MAKERS
def test_keys_are_not_reused(make):
    algo = make()
    with jax.debug_key_reuse(True):
        jax.jit(algo.update)(jax.jit(algo.init)(jax.random.key(0)))


@pytest.mark.slow
@MAKERS
def test_a_run_is_resumed_bit_for_bit(make, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHUNK_SECONDS", 0.0)  # one update at a time
    algo = make()
    more = {"num_seeds": 2, "progress": False, "eval_episodes": 0}
    steps = 16 * algo.env_steps_per_update
    whole = run.train(algo, jax.random.key(0), steps, **more)
    run.train(algo, jax.random.key(0), steps, **more, run_dir=tmp_path, on_chunk=lambda chunk: True)
    resumed = run.train(algo, jax.random.key(0), steps, **more, run_dir=tmp_path, resume=True)
    bits.assert_same(resumed.state, whole.state)
    bits.assert_same(run.load(tmp_path, algo=algo).state, whole.state)


@pytest.mark.thorough(1)
@MAKERS
def test_hyperparameters_are_data(make):
    algo = make()
    swept = algorithm.over_hypers(algo)
    hypers = jax.tree.map(lambda x: jnp.full(2, x), algo.hyper)
    after = jax.eval_shape(lambda k: swept.update(swept.init(k, hypers))[1], jax.random.key(0))
    assert {x.shape for x in jax.tree.leaves(after)} == {(2,)}


@pytest.mark.parametrize("make", [made_dqfd, made_fbrl, made_auxiliary], ids=["dqfd", "fbrl", "auxiliary"])
def test_parameters_of_half_width_are_learned_in_float32(make):
    algo = make()
    half = algo.remake(algo.config.__class__(**(vars(algo.config) | {"precision": "pure_bfloat16"})))
    state, metrics = jax.eval_shape(lambda key: half.update(half.init(key)), jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(metrics)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("q, wanted", [([1.0, 1.5, 0.2], 1.3), ([2.5, 1.5, 0.2], 0.0)])
def test_the_margin_by_hand(q, wanted):
    np.testing.assert_allclose(losses.large_margin(jnp.array(q), 0, 0.8), wanted, rtol=1e-6)


@pytest.mark.slow
def test_only_what_was_shown_has_a_margin_and_it_is_never_overwritten():
    algo = made_dqfd(pretraining=0, capacity=12, n_step=1)
    state = jax.jit(algo.init)(jax.random.key(0))
    later, _ = jax.jit(lambda s: jax.lax.scan(lambda s, _: algo.update(s), s, length=30))(state)
    for field in ("obs", "action", "reward", "kind", "written"):
        np.testing.assert_array_equal(getattr(later.demonstrations, field), getattr(state.demonstrations, field))
    assert not np.array_equal(later.demonstrations.tree, state.demonstrations.tree)  # but their errors are
    assert later.demonstrations.kind[0, 24] == replay.FINAL  # the last step shown goes on to what was seen after it
    np.testing.assert_array_equal(later.demonstrations.obs[0, 24], jax.nn.one_hot(24 % 9, 10))


@pytest.mark.slow
def test_who_was_shown_how_knows_it_before_the_first_step():
    algo = dqfd.make(ENV, shown(), dqfd.Config(num_envs=2, pretraining=300, network=VALUES), dqfd.Hyper(1e-2))
    state = jax.jit(algo.init)(jax.random.key(0))
    assert int(state.updates) == 0
    actions = jax.vmap(lambda obs: algo.act(state, obs)[0])(jnp.eye(10)[:9])
    np.testing.assert_array_equal(actions, RIGHT)
    stands_still = dqfd.make(ENV, shown(), dqfd.Config(pretraining=0, network=VALUES))
    first = jax.jit(stands_still.init)(jax.random.key(0))
    assert not np.array_equal(jax.vmap(lambda obs: stands_still.act(first, obs)[0])(jnp.eye(10)[:9]), actions)


def test_a_played_policy_gives_steps_in_the_order_in_which_they_happened():
    algo = made_dqfd(pretraining=0)
    state = jax.jit(algo.init)(jax.random.key(0))
    steps = jax.jit(lambda key: bc.play(algo, state, key, 90, num_envs=2))(jax.random.key(1))
    assert steps.reward.shape == (45, 2)
    goes_on = ~(steps.terminated | steps.truncated)[:-1]
    np.testing.assert_array_equal(steps.next_obs[:-1][goes_on], steps.obs[1:][goes_on])
    assert steps.truncated.any()  # after 40 steps
    shapes = jax.eval_shape(made_dqfd(steps).init, jax.random.key(0)).demonstrations.reward.shape
    assert shapes == (2, 90)  # a truncated step takes two rows


def test_the_way_back_is_learned_from_steps_in_any_direction():
    """In a corridor the model learns that a goal is reached from the left by going right."""
    obs = jnp.arange(1.0, 8.0)[:, None] / 8
    model = nets.backward_model(fbrl.Config().model, jax.ShapeDtypeStruct((1,), jnp.float32), 2)
    here = jnp.concatenate([obs, obs])
    action = jnp.repeat(jnp.array([0, 1]), 7)
    there = here + jnp.where(action, 1 / 8, -1 / 8)[:, None]
    import optax

    tx = optax.adam(3e-3)

    def step(carry, _):
        params, opt = carry
        gradient = jax.grad(lambda p: sum(x.mean() for x in model.losses(p, here, action, there)))(params)
        updates, opt = tx.update(gradient, opt)
        return (optax.apply_updates(params, updates), opt), None

    params = model.init(jax.random.key(0))
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=800))((params, tx.init(params)))
    # 1.0 was only ever reached from 7/8 by going right: that is what is imagined first.
    before, taken, after = model.imagine(params, jnp.ones((6, 1)), jax.random.split(jax.random.key(1), 3))
    np.testing.assert_array_equal(after[0], 1.0)
    assert (taken[0] == 1).all()
    np.testing.assert_allclose(before[0], 7 / 8, atol=0.03)
    np.testing.assert_array_equal(after[1:], before[:-1])  # each step ends where the one after it begins
    np.testing.assert_allclose(after - before, jnp.where(taken, 1 / 8, -1 / 8)[..., None], atol=0.06)


@pytest.mark.slow
def test_imagined_steps_are_paid_at_the_goal_alone():
    """Until a goal is known nothing is imagined; one that is given spreads before it was ever reached."""
    goals = fbrl.Goals(jnp.eye(10)[9:], jnp.array([1.0]), jnp.array([True]))
    assert not jax.tree.leaves(made_fbrl().init(jax.random.key(0)).goals.written)[0]
    state = jax.jit(made_fbrl(goals=goals).init)(jax.random.key(0))
    assert int(state.goals.written) == 1
    for algo, known in ((made_fbrl(), False), (made_fbrl(goals=goals), True)):
        state = jax.jit(algo.init)(jax.random.key(0))
        state, metrics = jax.jit(lambda s, a=algo: jax.lax.scan(lambda s, _: a.update(s), s, length=12))(state)
        assert (metrics["imagined_loss"][-1] > 0) == known and metrics["loss"][-1] >= 0
    found = ring.add(ring.empty(jnp.zeros(()), 3), jnp.arange(3.0), jnp.array([True, False, True]))
    rows, there = ring.sample(found, jax.random.key(0), 50)
    assert there and set(np.asarray(rows).tolist()) == {0.0, 2.0}


def test_observations_of_any_shape_are_imagined():
    algo = made_fbrl(envs.make("DeepSea-bsuite", size=5))
    state, metrics = jax.eval_shape(lambda key: algo.update(algo.init(key)), jax.random.key(0))
    assert state.goals.rows.obs.shape == (100, 5, 5) and metrics["backward_loss"].shape == ()


def test_a_ring_keeps_the_newest():
    kept = ring.empty(jax.ShapeDtypeStruct((), jnp.int32), 4)
    assert not ring.sample(kept, jax.random.key(0), 2)[1]
    for i in range(7):
        rows = 3 * i + jnp.arange(3)
        kept = ring.add(kept, rows, rows % 2 == 0)
    # 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20 were chosen.
    rows, _ = ring.sample(kept, jax.random.key(0), 200)
    assert set(np.asarray(rows).tolist()) == {14, 16, 18, 20}
    newest, _ = ring.sample(kept, jax.random.key(0), 100, newest=2)
    assert set(np.asarray(newest).tolist()) == {18, 20}
    with pytest.raises(ValueError, match="at most 4 rows can be added at once; got 5"):
        ring.add(kept, jnp.zeros(5, jnp.int32), jnp.ones(5, bool))


@pytest.mark.slow
def test_good_starts_are_those_of_which_some_succeed():
    """A policy that always goes right succeeds from wherever 10 steps suffice; where all is too easy, the curriculum goes on from there."""
    algo = made_curriculum(horizon=4)
    state = jax.jit(algo.init)(jax.random.key(0))
    later, metrics = jax.jit(algo.update)(state)
    starts = later.good.rows.state
    assert (starts.time == 0).all()  # the clock of a walk is not that of the episode which begins there
    assert 0 <= float(metrics["success"]) <= 1 and int(later.good.written) >= int(state.good.written) == 4
    assert algo.env_steps_per_update == 2 * 32 + 4 * 3 + 4 * 2 * 4
    assert (state.good.rows.state.state[:4] == 7).all() and (starts.state[:12] != 9).all()  # never where it ends
    begun = reverse_curriculum.beginning_in(ENV, state.good.rows._replace(obs=state.good.rows.obs), usual=0.0)
    obs, place = begun.reset(jax.random.key(3))
    assert obs.shape == (10,) and int(place.time) == 0
    always = reverse_curriculum.beginning_in(ENV, state.good.rows, usual=1.0)
    assert int(always.reset(jax.random.key(3))[1].state) == 0


def test_clocks_of_wrappers_begin_anew():
    env = wrappers.time_limit(envs.make("MountainCar-v0"), 30)
    _, state = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 2))
    for _ in range(5):
        _, state, *_ = jax.vmap(env.step)(jax.random.split(jax.random.key(1), 2), state, jnp.array([0, 2]))
    assert (state.time == 5).all() and (state.state.time == 5).all()
    wound = reverse_curriculum.wound_back(env, state)
    assert (wound.time == 0).all() and (wound.state.time == 0).all()
    np.testing.assert_array_equal(wound.state.position, state.state.position)


def test_half_of_the_rewards_foreseen_were_there():
    """Few steps are rewarded; half of a minibatch is, and nothing before the first was."""
    keys = list(jax.random.split(jax.random.key(0)))
    empty = ring.empty((jnp.zeros(1), jnp.int32(0)), 20)
    obs, sign = jnp.arange(20.0)[:, None], jnp.ones(20, jnp.int32).at[3].set(2)
    state = auxiliary_tasks.State((), empty, ring.add(empty, (obs, sign), sign == 1), (), ())
    _, drawn, known = auxiliary_tasks.minibatch(state, 7, keys)
    assert known.tolist() == [False] * 3 + [True] * 4 and (drawn[3:] == 1).all()
    state = state._replace(rewarded=ring.add(empty, (obs, sign), sign != 1))
    seen, drawn, known = auxiliary_tasks.minibatch(state, 7, keys)
    assert known.all() and drawn.tolist() == [2] * 3 + [1] * 4 and (seen[:3] == 3).all()


@pytest.mark.slow
def test_rewards_shape_the_features_of_the_policy():
    """Reward prediction alone moves the torso of the policy, value replay that of the value."""
    pays = tabular.environment(tabular.gridworld(["SG"], rewards={"G": -1.0}), "Pays", time_limit=3)
    algo = made_auxiliary(pays)
    moved = {}
    for name in ("reward_weight", "value_weight"):
        off = {"reward_weight": 0.0, "value_weight": 0.0} | {name: 1.0}
        h = algo.hyper
        hyper = h._replace(entropy_weight=0.0, value_weight=0.0, auxiliary=h.auxiliary._replace(**off))
        frozen = ppo.make(pays, algo.config, hyper)
        state = jax.jit(frozen.init)(jax.random.key(0))
        # With advantages of 0 PPO itself does nothing: gamma and rewards play no part in the policy's loss where values are right.
        later, metrics = jax.jit(frozen.update)(state)
        assert np.isfinite(float(metrics["reward_prediction_loss"])) and 0 <= float(metrics["rewards_foreseen"]) <= 1
        moved[name] = bool(
            jnp.any(
                later.params["params"]["critic"]["Dense_0"]["kernel"]
                != state.params["params"]["critic"]["Dense_0"]["kernel"]
            )
        )
    assert moved == {"reward_weight": False, "value_weight": True}
    features = nets.policy_features(algo.config.network, jax.ShapeDtypeStruct((2,), jnp.float32))
    state = jax.jit(algo.init)(jax.random.key(0))
    assert features(state.params, jnp.eye(2)).shape == (2, 8)
    slope = jax.grad(lambda p: jnp.sum(features(p, jnp.eye(2))))(state.params)["params"]
    assert jnp.any(slope["actor"]["Dense_0"]["kernel"] != 0) and not jnp.any(slope["critic"]["Dense_0"]["kernel"])


def test_wrong_settings_are_refused():
    wrong = shown()._replace(action=jnp.zeros((24, 2, 2), jnp.int32))
    goal = fbrl.Goals(jnp.eye(3), jnp.ones(3), jnp.ones(3, bool))
    recurrent = ppo.Config(num_envs=2, num_steps=16, num_minibatches=1, network=nets.Config(gru=4))
    for message, make in {
        r"demonstrations must be steps \[N\]": lambda: made_dqfd(wrong),
        r"demonstrations must be steps \[T, B\]": lambda: made_dqfd(shown()._replace(reward=jnp.zeros(24))),
        "dqfd.make: demonstrations must be": lambda: made_dqfd(bc.Demonstrations(shown().obs, shown().action)),
        "dqfd|DQfD does not": lambda: made_dqfd(network=nets.ValueConfig(gru=4)),
        "FBRL imagines observations, which must be one array without masks": lambda: made_fbrl(
            tabular.environment(tabular.maximization_bias())
        ),
        "config.predecessor=one_hot needs observations that are one-hot; those of CartPole": lambda: made_fbrl(
            envs.make("CartPole-v1")
        ),
        "goals must be at most config.num_goals = 100": lambda: made_fbrl(goals=goal),
        "config.num_goals must be at least num_envs": lambda: made_fbrl(num_goals=1),
        "config.network.noisy is an option of DQN; FBRL": lambda: made_fbrl(network=nets.ValueConfig(noisy=True)),
        "near_goal must return what reset of Corridor returns": lambda: made_curriculum(lambda key: (jnp.zeros(3), ())),
        "config.capacity must be at least num_new": lambda: made_curriculum(capacity=3),
        "config.auxiliary.capacity must be at least num_envs": lambda: made_auxiliary(capacity=31),
        "config.auxiliary needs the network that": lambda: made_auxiliary(
            network=nets.actor_critic(PPO.network, jax.ShapeDtypeStruct((10,), jnp.float32), ENV.action_space)
        ),
        "without gru, lstm": lambda: ppo.make(
            ENV, ppo.Config(**(vars(recurrent) | {"auxiliary": auxiliary_tasks.Config(num_gradient_steps=1)}))
        ),
        "hyper.margin must be": lambda: dqfd.make(ENV, shown(), hyper=dqfd.Hyper(margin=-1.0)),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.slow
def test_episodes_that_begin_near_a_far_goal_find_it():
    """A corridor of 40 cells, whose end a policy without a bonus hardly ever sees."""
    process = tabular.gridworld(["S" + "." * 38 + "G"], rewards={"G": 1.0})
    env = tabular.environment(process, "Corridor", time_limit=100)
    near = tabular.environment(process._replace(start=1.0 * (jnp.arange(40) == 38))).reset
    settings = ppo.Config(num_envs=8), ppo.Hyper(learning_rate=5e-4)
    algos = ppo.make(env, *settings), reverse_curriculum.make(lambda e: ppo.make(e, *settings), env, near)

    def score(algo, key):
        state, _ = run.train_fn(algo, 60_000)(key)
        return run.evaluate(algo, state, jax.random.key(1), 8).returns.mean()

    keys = jax.random.split(jax.random.key(0), 8)
    plain, curriculum = (jax.jit(jax.vmap(lambda key, a=a: score(a, key)))(keys) for a in algos)
    assert (curriculum == 1).all() and (plain == 1).sum() < 6


@pytest.mark.slow
def test_what_was_rewarded_once_is_found_again_sooner_with_auxiliary_tasks_and_demonstrations():
    env = envs.make("KeyAndDoor")
    tasks = auxiliary_tasks.Config(num_gradient_steps=16)
    teacher = ppo.make(env, ppo.Config(num_envs=8, auxiliary=tasks), ppo.Hyper(learning_rate=5e-4))
    keys = jax.random.split(jax.random.key(0), 4)
    state, _ = jax.jit(jax.vmap(run.train_fn(teacher, 60_000)))(keys)
    scores = jax.vmap(lambda s: run.evaluate(teacher, s, jax.random.key(1), 8).returns.mean())(state)
    assert (scores == 1).sum() >= 3
    best = jax.tree.map(lambda x: x[jnp.argmax(scores)], state)
    steps = jax.jit(lambda key: bc.play(teacher, best, key, 500, num_envs=4))(jax.random.key(2))
    pupil = dqfd.make(env, steps, dqfd.Config(num_envs=8), dqfd.Hyper(learning_rate=1e-3))
    plain = dqn.make(env, dqn.Config(num_envs=8), dqn.Hyper(learning_rate=1e-3))

    def score(algo, key):
        state, _ = run.train_fn(algo, 4_000)(key)
        return run.evaluate(algo, state, jax.random.key(1), 8).returns.mean()

    taught, alone = (jax.jit(jax.vmap(lambda key, a=a: score(a, key)))(keys) for a in (pupil, plain))
    assert (taught == 1).all() and not alone.any()
