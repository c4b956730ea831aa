"""Bonuses for what is new: their equations by hand, what they promise as everything that learns does, and that they explore."""

import functools
import importlib
from pathlib import Path

import bits
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import envs, intrinsic, nets, run
from jrl.algos import dqn, ppo, pqn
from jrl.envs import wrappers
from jrl.equations import exploration
from jrl.intrinsic import counts, icm, rnd
from jrl.nets.torso import TorsoConfig
from jrl.run import loop

RANK_PROMOTION = "allow"  # gymnax promotes ranks
TINY = TorsoConfig(hidden=(8,))
KINDS = ["rnd", "icm", "counts", "hash"]
SMALL = {
    ppo: {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "network": nets.Config(hidden=(8,))},
    pqn: {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "network": nets.ValueConfig(hidden=(8,))},
    dqn: {"num_envs": 2, "capacity": 200, "batch_size": 8, "learning_starts": 4, "network": nets.ValueConfig(hidden=(8,))},
}  # fmt: skip
MODULES = pytest.mark.parametrize("module", SMALL, ids=lambda module: module.__name__.rpartition(".")[2])
CORRIDOR = envs.make("Probe-television")


def made(module, kind="rnd", env=CORRIDOR, own=None, hyper=None, **more):
    described = intrinsic.Config(kind=kind, network=TINY, features=4, table=64, calibration=20)
    config = module.Config(**(SMALL[module] | {"bonus": described} | more))
    return module.make(env, config, hyper or module.Hyper(), bonus=own)


def transitions(obs, action, next_obs):
    return intrinsic.Transitions(jnp.asarray(obs), jnp.asarray(action), jnp.asarray(next_obs))


def prescribed():
    """A bonus that pays the last number of the next observation, and learns nothing."""
    return intrinsic.Intrinsic(
        lambda key: ((), ()),
        lambda memory, transitions: memory,
        lambda params, memory, transitions: transitions.next_obs[..., -1],
        lambda params, memory, transitions, hyper: jnp.zeros(transitions.action.shape),
        standardized=False,
    )


def learner_of(paid, **config):
    env = envs.make("Probe-discount")  # observations of one number
    learner = intrinsic.make(intrinsic.Config(network=TINY, **config), env, (1, 1), prescribed())
    obs = jnp.zeros((*np.shape(paid), 1))
    seen = transitions(obs, jnp.zeros(np.shape(paid), jnp.int32), jnp.asarray(paid, jnp.float32)[..., None])
    return learner, learner.init(jax.random.key(0), np.shape(paid)[1]), seen


def test_the_equations_by_hand():
    features, prediction = jnp.array([0.1, 0.4, 0.2]), jnp.array([0.3, 0.0, 0.2])
    np.testing.assert_allclose(exploration.forward_error(prediction, features), 0.1, rtol=1e-6)  # a sum, not a mean
    np.testing.assert_allclose(exploration.distillation_error(prediction, features), 0.2 / 3, rtol=1e-6)
    np.testing.assert_allclose(exploration.curiosity_loss(jnp.log(4.0), 0.1, 0.2), 1.12904, atol=1e-5)
    np.testing.assert_allclose(0.1 * exploration.count_bonus(jnp.array([1, 4, 100])), [0.1, 0.05, 0.01], rtol=1e-6)
    for equation in (exploration.forward_error, exploration.distillation_error):
        assert not jax.grad(equation, argnums=1)(prediction, features).any()
        assert equation(jnp.bfloat16(prediction), jnp.bfloat16(features)).dtype == jnp.float32


@pytest.mark.slow
def test_bonuses_are_divided_by_the_deviation_of_their_discounted_sums_over_time():
    learner, state, seen = learner_of([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    state, bonus, metrics = learner.update(state, seen, intrinsic.Hyper(), jax.random.key(1))
    sums = [[1, 2], [3.99, 1.98], [3.9501, 2.9602]]
    np.testing.assert_allclose(np.std(sums), 1.09361, atol=1e-5)
    np.testing.assert_allclose(bonus, np.array([[1, 2], [3, 0], [0, 1]]) / 1.09361, rtol=1e-4)
    np.testing.assert_allclose(state.sums.running, sums[-1], rtol=1e-6)  # goes on in the next rollout
    np.testing.assert_allclose(metrics["bonus"], 7 / 6, rtol=1e-6)
    _, raw, _ = learner_of([[1.0, 2.0]], normalize=False)[0].update(
        *learner_of([[1.0, 2.0]])[1:], intrinsic.Hyper(), None
    )
    np.testing.assert_array_equal(raw, [[1, 2]])


def test_advantages_of_bonuses_go_on_over_the_ends_of_episodes():
    """With values of 0.5 everywhere: A = [1.93080, 0.99500]; an episode's end after the first step changes nothing."""
    learner, state, seen = learner_of([[1.0], [1.0]], normalize=False)
    value = jax.tree.map(jnp.zeros_like, state.value.params)
    value["params"]["head_0"]["bias"] = jnp.full(1, 0.5)
    state = state._replace(value=state.value._replace(params=value))
    _, advantage, metrics = learner.advantages(
        state, seen, jnp.zeros((1, 1)), intrinsic.Hyper(), 0.95, jax.random.key(1)
    )
    np.testing.assert_allclose(advantage[:, 0], [1.93080, 0.99500], atol=1e-5)
    np.testing.assert_allclose(metrics["bonus_value_loss"], 0.5 * np.mean(np.square(advantage)), rtol=1e-5)


def test_the_bonus_of_distillation_falls_with_each_visit_and_its_target_stays():
    spec = jax.ShapeDtypeStruct((3,), jnp.float32)
    model = rnd.make(intrinsic.Config(kind="rnd", network=TINY, features=4), spec, envs.Discrete(2))
    params, target = model.init(jax.random.key(0))
    x = jnp.eye(3)
    seen = transitions(x, jnp.zeros(3, jnp.int32), x)
    first = model.bonus(params, target, seen)

    @jax.jit
    def descended(params):
        grads = jax.grad(lambda p: model.loss(p, target, seen, intrinsic.Hyper())[0])(params)
        return jax.tree.map(lambda p, g: p - 0.02 * g, params, grads)

    for _ in range(200):
        params = descended(params)
    later = model.bonus(params, target, seen)
    assert later[0] < 0.1 * first[0] and later[1] > 2 * later[0]  # only the first state was visited
    assert not any(jnp.any(g) for g in jax.tree.leaves(jax.grad(lambda t: model.bonus(params, t, seen).sum())(target)))
    same = rnd.make(intrinsic.Config(kind="rnd", network=TorsoConfig(hidden=()), features=4), spec, envs.Discrete(2))
    np.testing.assert_array_equal(same.bonus(same.init(jax.random.key(0))[1], same.init(jax.random.key(0))[1], seen), 0)


@pytest.mark.parametrize(
    "space, action, choice",
    [
        (envs.Discrete(4), jnp.array([1, 3]), jnp.log(4.0)),
        (envs.MultiDiscrete((2, 4)), jnp.array([[1, 3], [0, 0]]), jnp.log(8.0)),
        (envs.Box((-1.0, -1.0), (1.0, 1.0)), jnp.array([[0.5, 0.1], [0.5, -0.1]]), 0.13),
    ],
    ids=["discrete", "multi", "box"],
)
def test_the_curiosity_module_by_hand(space, action, choice):
    """With all weights 0 the inverse model says nothing, and the forward model is wrong by the length of the standardized features."""
    model = icm.make(
        intrinsic.Config(kind="icm", network=TINY, features=4), jax.ShapeDtypeStruct((3,), jnp.float32), space
    )
    params, _ = model.init(jax.random.key(0))
    seen = transitions(jnp.ones((2, 3)), action, -jnp.ones((2, 3)))
    silent = params | jax.tree.map(jnp.zeros_like, {name: params[name] for name in ("inverse", "forward")})
    np.testing.assert_allclose(model.bonus(silent, (), seen), 0.5 * 4, rtol=1e-3)
    np.testing.assert_allclose(model.loss(silent, (), seen, intrinsic.Hyper()), 0.8 * choice + 0.2 * 2, rtol=1e-3)
    # The features learn from the inverse model alone.
    forward_only = jax.grad(lambda p: model.loss(p, (), seen, intrinsic.Hyper(forward_share=1.0)).sum())(params)
    assert not any(jnp.any(g) for g in jax.tree.leaves((forward_only["encoder"], forward_only["inverse"])))
    assert any(jnp.any(g) for g in jax.tree.leaves(forward_only["forward"]))
    inverse_only = jax.grad(lambda p: model.loss(p, (), seen, intrinsic.Hyper(forward_share=0.0)).sum())(params)
    assert any(jnp.any(g) for g in jax.tree.leaves(inverse_only["encoder"]))


def test_exact_counts_of_pairs():
    model = counts.exact(intrinsic.Config(), jax.ShapeDtypeStruct((2, 2), jnp.float32), envs.Discrete(2))
    _, memory = model.init(jax.random.key(0))
    states = jnp.eye(4).reshape(4, 2, 2)
    visited = transitions(states[jnp.array([3, 3, 3, 0, 3])], jnp.array([1, 1, 0, 1, 1]), states[jnp.zeros(5, int)])
    memory = model.observe(memory, visited)
    np.testing.assert_array_equal(memory.counts, [[0, 1], [0, 0], [0, 0], [1, 3]])
    np.testing.assert_allclose(model.bonus((), memory, visited), [3**-0.5, 3**-0.5, 1, 1, 3**-0.5], rtol=1e-6)
    single = counts.exact(intrinsic.Config(table=8), jax.ShapeDtypeStruct((), jnp.int32), envs.Discrete(1))
    memory = single.observe(single.init(jax.random.key(0))[1], transitions([5, 5], [0, 0], [0, 0]))
    assert memory.counts[5, 0] == 2 and memory.counts.sum() == 2


def test_hashed_counts_tell_cells_apart_once_they_know_how_large_cells_are():
    settings = intrinsic.Config(kind="hash", calibration=100, resolution=1.0)
    model = counts.hashed(settings, jax.ShapeDtypeStruct((2,), jnp.float32), envs.Box((-1.0,), (1.0,)))
    _, memory = model.init(jax.random.key(0))
    rollout = jax.random.normal(jax.random.key(1), (100, 2)) * jnp.array([1.0, 0.01])
    memory = model.observe(memory, transitions(rollout, jnp.zeros((100, 1)), rollout))
    assert not memory.counts.any()  # the first steps set the cells
    mean, width = memory.stats.mean, jnp.sqrt(memory.stats.variance)
    points = mean + width * jnp.array([[0.5, 0.5], [0.6, 0.4], [1.5, 0.5], [0.5, -0.5]])
    memory = model.observe(memory, transitions(points, jnp.zeros((4, 1)), points))
    np.testing.assert_array_equal(memory.stats.mean, mean)  # and stay
    np.testing.assert_allclose(
        model.bonus((), memory, transitions(points, jnp.zeros((4, 1)), points)), [2**-0.5, 2**-0.5, 1, 1], rtol=1e-6
    )
    grid = jnp.eye(400)  # what never varied before is told apart as well
    table = counts.hashed(intrinsic.Config(calibration=1), jax.ShapeDtypeStruct((400,), jnp.float32), envs.Discrete(1))
    memory = table.observe(table.init(jax.random.key(0))[1], transitions(grid[:1], [0], grid[:1]))
    memory = table.observe(memory, transitions(grid, jnp.zeros(400, int), grid))
    assert (memory.counts > 0).sum() >= 396  # of 400 entries among 65,536, one pair or so shares one


@pytest.mark.slow
def test_a_bonus_without_weight_changes_nothing():
    """The same parameters as PPO's without a bonus; a sweep has a weight for each cell."""
    key = jax.random.key(3)
    plain = jax.jit(run.train_fn(made(ppo, "none"), 48))(key)[0].params
    train = run.train_fn(made(ppo), 48)
    swept = jax.vmap(lambda weight: train(key, ppo.Hyper(bonus=intrinsic.Hyper(weight=weight)))[0].params)
    of_weights = jax.jit(swept)(jnp.array([0.0, 1.0]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y[0], atol=1e-6), plain, of_weights)
    assert any(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.any(jnp.abs(x - y[1]) > 1e-5), plain, of_weights)))


@pytest.mark.parametrize("module", [pqn, dqn], ids=["pqn", "dqn"])
def test_the_bonus_is_part_of_the_reward_of_action_values(module):
    """A bonus of 3 a step, of weight 2, and a reward of 1 or -1, for an agent that does not look ahead."""
    always = prescribed()._replace(bonus=lambda params, memory, t: jnp.full(t.action.shape, 3.0), uses_next=False)
    described = intrinsic.Config(normalize=False, network=TINY)
    weighted = intrinsic.Hyper(weight=2.0)
    hyper = module.Hyper(gamma=0.0, learning_rate=0.05, epsilon_end=1.0, bonus=weighted)
    algo = made(module, env=envs.make("Probe-action"), own=always, hyper=hyper, bonus=described)
    state, _ = jax.jit(run.train_fn(algo, 800 * algo.env_steps_per_update))(jax.random.key(0))
    network = nets.action_values(algo.config.network, jax.ShapeDtypeStruct((1,), jnp.float32), envs.Discrete(2))
    np.testing.assert_allclose(nets.outputs(network, state.params, jnp.zeros((1, 1))), [[5.0, 7.0]], atol=0.3)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("kind", KINDS)
@MODULES
def test_keys_are_not_reused_and_numbers_are_float32(module, kind):
    algo = made(module, kind, envs.make("DeepSea-bsuite", size=4), precision="pure_bfloat16")
    with jax.debug_key_reuse(True):
        state, metrics = jax.jit(algo.update)(jax.jit(algo.init)(jax.random.key(0)))
    assert {x.dtype for x in jax.tree.leaves(state.bonus) if jnp.issubdtype(x.dtype, jnp.floating)} == {
        np.dtype("float32")
    }
    assert np.isfinite(metrics["bonus"]) and metrics["bonus"] >= 0 and np.isfinite(metrics["intrinsic_loss"])


@pytest.mark.slow
@MODULES
@pytest.mark.parametrize("kind", ["counts", "rnd", "hash"])
def test_a_run_is_resumed_bit_for_bit(module, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHUNK_SECONDS", 0.0)  # one update at a time
    algo = made(module, kind, envs.make("DeepSea-bsuite", size=4))
    more = {"num_seeds": 2, "progress": False, "eval_episodes": 0}
    steps = 4 * algo.env_steps_per_update
    whole = run.train(algo, jax.random.key(0), steps, **more)
    run.train(algo, jax.random.key(0), steps, **more, run_dir=tmp_path / "half", on_chunk=lambda chunk: True)
    resumed = run.train(algo, jax.random.key(0), steps, **more, run_dir=tmp_path / "half", resume=True)
    bits.assert_same(resumed.state, whole.state)
    bits.assert_same(run.load(tmp_path / "half").state, whole.state)


@pytest.mark.slow
def test_every_seed_has_statistics_and_a_target_of_its_own():
    learner = intrinsic.make(intrinsic.Config(kind="rnd", network=TINY), CORRIDOR, (1, 1))
    keys = jax.random.split(jax.random.key(0))
    obs = jnp.stack([jnp.zeros((3, 2, 28)), jnp.ones((3, 2, 28))])
    seen = transitions(obs, jnp.zeros((2, 3, 2), int), obs)
    state = jax.vmap(learner.init, in_axes=(0, None))(keys, 2)
    state, _, _ = jax.jit(jax.vmap(learner.update, in_axes=(0, 0, None, 0)))(state, seen, intrinsic.Hyper(), keys)
    assert state.sums.running.shape == (2, 2)
    np.testing.assert_array_equal(state.inputs.mean[:, 0], [0, 1])
    assert jnp.any(jax.tree.leaves(state.memory)[-1][0] != jax.tree.leaves(state.memory)[-1][1])


@pytest.mark.slow
def test_masks_and_trees_of_observations():
    masked = envs.make("Probe-mask")
    tree = wrappers.previous(envs.make("Breakout-MinAtar"))  # a dictionary of an image and a vector
    for env in (masked, tree):
        for kind in ("rnd", "icm", "hash"):
            jax.eval_shape(
                lambda env=env, kind=kind: (lambda a: a.update(a.init(jax.random.key(0))))(made(ppo, kind, env))
            )


def test_wrong_settings_are_refused():
    for message, make in {
        "bonus.kind must be one of": lambda: intrinsic.Config(kind="curious"),
        "bonus.features must be an integer of at least 1; got 0": lambda: intrinsic.Config(features=0),
        "hyper.bonus.weight must be": lambda: made(ppo, hyper=ppo.Hyper(bonus=intrinsic.Hyper(weight=-1.0))),
        "config.n_step must be 1; got 3": lambda: made(dqn, n_step=3),
        "config.n_step must be 1; got 2": lambda: made(dqn, "none", own=prescribed(), n_step=2),
        "those of Breakout-MinAtar are not: take hash": lambda: made(
            ppo, "counts", wrappers.previous(envs.make("Breakout-MinAtar"))
        ),
        "observations that are one-hot or a single integer; those of CartPole-v1 are not: take hash": lambda: made(
            ppo, "counts", envs.make("CartPole-v1")
        ),
        "bonus must be": lambda: made(ppo, own=3),
        "has no memory": lambda: made(ppo, bonus=intrinsic.Config(kind="rnd", network=TorsoConfig(gru=4))),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


def test_sparse_rewards_of_other_environments():
    key = jax.random.key(0)
    goal = wrappers.wrapped(envs.make("MountainCar-v0"), ["goal_reward"])
    _, state = goal.reset(key)
    assert goal.step(key, state, jnp.int32(2))[2] == 0  # -1 before
    arrived = goal.step(key, state.replace(position=0.49, velocity=0.07), jnp.int32(2))
    assert arrived[2] == 1 and arrived[3]
    upright = wrappers.wrapped(envs.make("Pendulum-v1"), ["reward_above=-0.5"])
    _, state = upright.reset(key)
    rewards = [upright.step(key, state.replace(theta=theta, theta_dot=0.0), jnp.zeros(1))[2] for theta in (0.1, jnp.pi)]
    assert rewards == [1, 0]
    assert dict(upright.settings)["wrappers"] == ("reward_above(threshold=-0.5)",)


@pytest.mark.slow
@pytest.mark.parametrize("kind, caught", [("rnd", False), ("icm", True)])
def test_a_television_catches_who_is_paid_for_surprise_but_not_distillation(kind, caught):
    described = intrinsic.Config(kind=kind)
    algo = ppo.make(CORRIDOR, ppo.Config(num_envs=16, num_steps=48, bonus=described), ppo.Hyper(learning_rate=1e-3))
    _, metrics = jax.jit(jax.vmap(run.train_fn(algo, 150_000)))(jax.random.split(jax.random.key(0), 4))
    bonus, returns = (np.asarray(metrics[name])[:, -20:].mean() for name in ("bonus", "episode_return"))
    first = np.asarray(metrics["bonus"])[:, :5].mean()
    assert (returns < 0.7) == caught and (bonus > 0.3 * first) == caught


@pytest.mark.slow
@pytest.mark.parametrize("kind, solved", [("none", 0), ("counts", 4), ("rnd", 4)])
def test_a_bonus_finds_the_treasure_of_the_deep_sea(kind, solved):
    env = envs.make("DeepSea-bsuite", size=16)
    config = ppo.Config(num_envs=16, num_steps=64, bonus=intrinsic.Config(kind=kind))
    algo = ppo.make(env, config, ppo.Hyper(learning_rate=1e-3, entropy_weight=0.0))
    _, metrics = jax.jit(jax.vmap(run.train_fn(algo, 150_000)))(jax.random.split(jax.random.key(0), 4))
    assert (np.asarray(metrics["episode_return"])[:, -5:].mean(1) > 0.98).sum() == solved


@pytest.fixture
def faster(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "experiments")
    return importlib.import_module("faster")


def test_a_comparison_does_not_repeat_what_its_folder_has(faster, monkeypatch, tmp_path):
    trained = []

    def learning_curve(task, method, env_steps, key):
        trained.append(env_steps)
        return jnp.array([10, 20, 30]), jnp.array([0.0, 1.0, 1.0])

    monkeypatch.setattr(faster, "learning_curve", learning_curve)
    args, task = faster.Args(num_seeds=2), faster.Task(CORRIDOR, 30, 0.9, 0.99)
    for _ in range(2):
        env_steps, returns = faster.curves(args, "Corridor", task, "ppo", tmp_path)
    assert trained == [30] and env_steps.tolist() == [10, 20, 30] and returns.shape == (2, 3)
    row = faster.row_of("Corridor", "ppo", env_steps, returns, task.threshold)
    assert row["seeds that got there"] == "2 of 2" and row["steps until then"] == "20 (20 to 20)"
    faster.curves(faster.Args(num_seeds=2, share=0.5), "Corridor", task, "ppo", tmp_path)
    assert trained == [30, 15]  # another share is another result


def test_methods_are_compared_at_the_same_budget(faster):
    task = faster.Task(CORRIDOR, 40_000, 0.9, 0.99)
    for method, per_update in (("ppo", 1024), ("dqn", 8)):
        curve = functools.partial(faster.learning_curve, task, method, task.env_steps)
        returns = jax.eval_shape(curve, jax.random.key(0))[1]
        every = max(1, task.env_steps // (faster.POINTS * per_update))
        assert 0.95 * task.env_steps < returns.size * every * per_update <= task.env_steps
