"""DQN and its parts: what each learns, what it must not confuse, and how it composes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import optax
import pytest

from jrl import envs, nets, run
from jrl.algos import dqn, r2d2
from jrl.equations import losses
from jrl.numerics.optim import OptimizerConfig

RANK_PROMOTION = "allow"  # gymnax promotes ranks

NETWORK = nets.ValueConfig(hidden=(16,), norm="none")
FAST = dqn.Config(
    num_envs=4,
    num_steps=4,
    batch_size=32,
    capacity=1000,
    learning_starts=64,
    target_every=10,
    network=NETWORK,
    optimizer=OptimizerConfig("adam", "constant"),
)
HYPER = dqn.Hyper(learning_rate=1e-2, v_min=-2.0, v_max=2.0, temperature=0.1, munchausen_weight=0.5)
TINY = dataclasses.replace(FAST, num_envs=2, num_steps=2, batch_size=8, capacity=64, learning_starts=4)
PARTS = {
    "plain": {"double": False},
    "double": {},
    "dueling": {"network": dataclasses.replace(NETWORK, dueling=True)},
    "noisy": {"network": dataclasses.replace(NETWORK, noisy=True)},
    "n-step": {"n_step": 3},
    "prioritized": {"prioritized": True},
    "munchausen": {"munchausen": True},
    "categorical": {"distribution": "categorical", "atoms": 21},
    "quantile": {"distribution": "quantile", "atoms": 21},
    "rainbow": {
        **{"n_step": 3, "prioritized": True, "distribution": "categorical", "atoms": 21},
        "network": dataclasses.replace(NETWORK, dueling=True, noisy=True),
    },
}


@functools.cache
def trained(name, part, updates=250, hyper=HYPER):
    algo = dqn.make(envs.make(name), dataclasses.replace(FAST, **PARTS[part]), hyper)
    states, metrics = jax.jit(jax.vmap(run.train_fn(algo, updates * 16)))(jax.random.split(jax.random.key(0), 4))
    return algo, states, metrics


def score(algo, states):
    return np.asarray(jax.vmap(lambda s: run.evaluate(algo, s, jax.random.key(1), 32).returns.mean())(states))


@pytest.mark.thorough(2)
@pytest.mark.parametrize("part", PARTS)
def test_every_part_learns_alone(part):
    algo, states, metrics = trained("Probe-policy", part)
    np.testing.assert_allclose(score(algo, states), 1, atol=0.1)
    assert all(jnp.isfinite(m).all() for k, m in metrics.items() if not k.startswith("episode"))


def test_values_are_discounted_and_masks_hold():
    algo, states, _ = trained("Probe-mask", "double")
    np.testing.assert_allclose(score(algo, states), 1, atol=0.1)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("fields", [{"n_step": 3}, {"prioritized": True}, {"distribution": "quantile", "atoms": 5}])
def test_truncation_bootstraps(fields):
    """Reward 1 a step, truncated at 20, never terminated: V = 1 / (1 - gamma)."""

    def step(key, t, action):
        return (jnp.ones(1), t + 1, 1.0, False, t + 1 >= 20)

    env = envs.strict(envs.Environment("Forever", lambda key: (jnp.ones(1), jnp.int32(0)), step, envs.Discrete(2), 20))
    algo = dqn.make(env, dataclasses.replace(FAST, **fields), HYPER._replace(gamma=0.9, learning_rate=5e-3))
    states, _ = jax.jit(jax.vmap(run.train_fn(algo, 1500 * 16)))(jax.random.split(jax.random.key(0), 2))
    atoms = fields.get("atoms", 1)
    network = nets.action_values(algo.config.network, envs.observation_spec(env), env.action_space, atoms)
    q = jax.vmap(lambda p: network.step(p, (), jnp.ones((1, 1)), jnp.zeros(1, bool))[1])(states.params)
    q = q.mean(-1) if atoms > 1 else q
    np.testing.assert_allclose(q.max(-1), 10, atol=0.7)


def test_the_loss_is_the_mean_square_and_its_root():
    _, _, metrics = trained("Probe-observation", "double")
    np.testing.assert_allclose(metrics["root_loss"] ** 2, metrics["loss"], rtol=1e-3, atol=1e-12)


def test_nothing_is_learned_before_learning_starts():
    algo = dqn.make(envs.make("Probe-policy"), dataclasses.replace(TINY, learning_starts=12), HYPER)
    start = algo.init(jax.random.key(0))
    state = start
    for updates in (1, 2, 3):
        state, metrics = jax.jit(algo.update)(state)
        same = all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (start.params, state.params)), strict=True))
        assert same == (updates < 3), updates
    assert metrics["loss"] > 0


@pytest.mark.slow
def test_without_a_length_prioritized_replay_stays_finite_and_exact():
    algo = dqn.make(envs.make("Probe-policy"), dataclasses.replace(TINY, prioritized=True), HYPER)
    _, metrics = jax.jit(lambda s: jax.lax.scan(lambda s, _: algo.update(s), s, length=150))(
        algo.init(jax.random.key(0))
    )
    assert jnp.isfinite(metrics["objective"]).all() and (metrics["objective"][10:] > 0).all()


def test_learning_starts_where_envs_do_not_divide_the_capacity_and_priorities_wait_for_it():
    config = dataclasses.replace(TINY, num_envs=3, capacity=40, learning_starts=40, prioritized=True)
    algo = dqn.make(envs.make("Probe-credit"), config, HYPER)
    state = algo.init(jax.random.key(0))
    for _ in range(6):
        state, _ = jax.jit(algo.update)(state)
    leaves = state.buffer.tree[state.buffer.tree.shape[0] // 2 :]
    assert set(np.unique(leaves).tolist()) == {0.0, 1.0}
    state, metrics = jax.jit(algo.update)(state)
    assert metrics["loss"] > 0 and len(np.unique(state.buffer.tree)) > 4


def test_the_target_network_follows_hard_and_soft():
    for fields, share in (({"target_every": 2}, 1.0), ({"target_every": 0}, 0.25)):
        algo = dqn.make(envs.make("Probe-policy"), dataclasses.replace(TINY, **fields), HYPER._replace(tau=0.25))
        first, _ = jax.jit(algo.update)(algo.init(jax.random.key(0)))
        second, _ = jax.jit(algo.update)(first)
        wanted = optax.incremental_update(second.params, first.target_params, share)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), second.target_params, wanted)


@pytest.mark.thorough(1)
@pytest.mark.parametrize(
    "fields", [{"munchausen": True}, {"distribution": "categorical"}, {"distribution": "quantile"}]
)
@pytest.mark.parametrize("prioritized", [False, True])
def test_rows_without_a_transition_take_no_part(fields, prioritized):
    """Empty rows have masks without a legal action, of which Munchausen's log-policy is NaN, and 0 times NaN is NaN."""
    config = dataclasses.replace(
        TINY, learning_starts=0, prioritized=prioritized, batch_size=64, capacity=400, **fields
    )
    algo = dqn.make(envs.make("Probe-mask"), config, HYPER)
    state = algo.init(jax.random.key(0))
    for _ in range(3):
        state, metrics = jax.jit(algo.update)(state)
        assert jnp.isfinite(metrics["objective"]) and jnp.isfinite(metrics["grad_norm"])
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_returns_beyond_the_support_show_at_its_edge():
    """C51's support begins at 0, and every return is -1: all mass of the targets lies on the first atom."""
    fields = {"distribution": "categorical", "atoms": 11}
    env = envs.make("Probe-value")
    below = env._replace(step=lambda *args: (*env.step(*args)[:2], -1.0, True, False))
    for environment, low in ((below, 1.0), (env, 0.0)):
        algo = dqn.make(environment, dataclasses.replace(TINY, **fields), HYPER._replace(v_min=0.0, v_max=10.0))
        _, metrics = jax.jit(run.train_fn(algo, 20 * algo.env_steps_per_update))(jax.random.key(0))
        np.testing.assert_allclose(metrics["mass_at_v_min"][-1], low, atol=1e-6)
        np.testing.assert_allclose(metrics["mass_at_v_max"][-1], 0, atol=1e-6)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("module", [dqn, r2d2])
def test_learning_goes_on_beyond_2_to_the_31_steps(module):
    config = (
        TINY if module is dqn else r2d2.Config(2, 4, 1, 4, 2, 4, 100, 8, network=nets.ValueConfig(hidden=(8,), gru=4))
    )
    algo = module.make(envs.make("Probe-policy"), config, module.Hyper())
    update = jax.jit(algo.update)
    state = algo.init(jax.random.key(0))
    for _ in range(8):
        state, _ = update(state)
    late = state._replace(updates=jnp.int32(2**31 // algo.env_steps_per_update + 5))
    assert update(late)[1]["loss"] > 0


# Equations by hand


def test_categorical_projection_by_hand():
    atoms = jnp.array([0.0, 1.0, 2.0])
    out = losses.project_categorical(jnp.array([0.2, 0.3, 0.5]), jnp.array([0.25, 1.0, 5.0]), atoms)
    np.testing.assert_allclose(out, [0.15, 0.05 + 0.3, 0.5], rtol=1e-6)


def test_quantile_loss_by_hand_and_its_minimum():
    # Two quantiles at levels 1/4 and 3/4, one target of 2: errors 2 and -0.5.
    loss = losses.quantile_huber(jnp.array([0.0, 2.5]), jnp.array([2.0]))
    np.testing.assert_allclose(loss, 0.25 * 1.5 + 0.25 * 0.125, rtol=1e-6)
    # With kappa 2 the first error is quadratic, 2^2 / 2; equation 10 does not divide by kappa.
    loss = losses.quantile_huber(jnp.array([0.0, 2.5]), jnp.array([2.0]), 2.0)
    np.testing.assert_allclose(loss, 0.25 * 2 + 0.25 * 0.125, rtol=1e-6)
    target = jnp.linspace(0, 1, 101)
    quantiles = jnp.array([0.25, 0.75])
    grad = jax.grad(lambda q: losses.quantile_huber(q, target, 1e-4) / 1e-4)(quantiles)
    np.testing.assert_allclose(grad, 0, atol=0.02)


def test_huber_by_hand():
    np.testing.assert_allclose(losses.huber(jnp.array([0.5, -2.0])), [0.125, 1.5])


def test_noise_is_the_key_s_and_absent_without_one(key):
    config = nets.ValueConfig(hidden=(8,), noisy=True)
    net = nets.action_values(config, jax.ShapeDtypeStruct((2,), jnp.float32), envs.Discrete(3))
    params, obs, first = net.init(key), jnp.ones((1, 2)), jnp.zeros(1, bool)

    def answer(p):
        return np.asarray(net.step(p, (), obs, first)[1])

    noisy = [answer(nets.with_noise(params, jax.random.key(i))) for i in (1, 1, 2)]
    assert (noisy[0] == noisy[1]).all() and (noisy[0] != noisy[2]).any() and (answer(params) != noisy[0]).any()


# As an algorithm


@pytest.mark.thorough(1)
@pytest.mark.parametrize("part", ["double", "rainbow"])
def test_a_checkpoint_holds_the_replay_bit_for_bit(part, tmp_path):
    algo = dqn.make(envs.make("Probe-policy"), dataclasses.replace(TINY, **PARTS[part]), HYPER)
    kwargs = {"num_seeds": 2, "eval_episodes": 0, "progress": False, "run_dir": tmp_path / "a"}
    first = run.train(algo, jax.random.key(0), 80, **kwargs)
    again = run.train(algo, jax.random.key(0), 80, resume=True, **kwargs)
    for a, b in zip(*map(jax.tree.leaves, (first.state, again.state)), strict=True):
        data = jax.random.key_data if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else np.asarray
        np.testing.assert_array_equal(data(a), data(b))


@pytest.mark.slow
def test_sweeps():
    algo = dqn.make(envs.make("Probe-policy"), dataclasses.replace(TINY, **PARTS["rainbow"]), HYPER)
    grid = run.sweep.grid(algo.hyper, {"gamma": [0.9, 0.99], "priority_exponent": [0.0, 0.6]})
    result = run.train(algo, jax.random.key(0), 16, num_seeds=2, hypers=grid, eval_episodes=0, progress=False)
    assert result.metrics["loss"].shape == (4, 2, 4)


def test_no_key_is_used_twice():
    algo = dqn.make(envs.make("Probe-policy"), dataclasses.replace(TINY, **PARTS["rainbow"]), HYPER)
    with jax.debug_key_reuse(True):
        jax.jit(algo.update)(jax.jit(algo.init)(jax.random.key(0)))


@pytest.mark.parametrize("part", ["categorical", "munchausen"])
def test_only_the_network_computes_in_half_width(part):
    algo = dqn.make(envs.make("Probe-mask"), dataclasses.replace(TINY, **PARTS[part], precision="pure_bfloat16"), HYPER)
    program = jaxprs.equations(jaxprs.of(algo.update, jax.eval_shape(algo.init, jax.random.key(0))))
    half = [(e, scope) for e, scope in program if any(map(jaxprs.is_half, [*e.invars, *e.outvars]))]
    assert half and not [e for e, s in half if "network" not in s and str(e.primitive) not in jaxprs.MOVES]


PROBE = envs.make("Probe-value")


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: dqn.make(PROBE, dqn.Config(learning_starts=20_000)),
            "learning_starts must be at most capacity = 10000; got 20000",
        ),
        (
            lambda: dqn.make(PROBE, dqn.Config(munchausen=True, distribution="quantile")),
            "munchausen needs config.distribution=mean",
        ),
        (lambda: dqn.Config(distribution="c51"), "must be one of mean, categorical, quantile; got 'c51'"),
        (lambda: dqn.make(PROBE, dqn.Config(network=nets.ValueConfig(gru=4))), "R2D2 and PQN train recurrent networks"),
        (lambda: dqn.make(envs.make("Pendulum-v1")), "action values need discrete actions"),
        (
            lambda: dqn.make(PROBE, TINY, dqn.Hyper(v_min=1.0, v_max=1.0)),
            "v_max must be above hyper.v_min",
        ),
        (lambda: dqn.make(envs.make("Breakout-MinAtar"), dqn.Config(capacity=10**9)), "is larger than the device's"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
