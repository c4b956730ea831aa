"""Recurrent DQN: it remembers, it stops at truncations, and what it replays is what happened."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

from jrl import envs, nets, run
from jrl.algos import r2d2
from jrl.equations import losses
from jrl.numerics.optim import OptimizerConfig

RANK_PROMOTION = "allow"  # gymnax promotes ranks

FAST = r2d2.Config(
    num_envs=8,
    num_steps=4,
    batch_size=32,
    burn_in=2,
    length=6,
    capacity=4000,
    learning_starts=256,
    target_every=20,
    n_step=3,
    network=nets.ValueConfig(hidden=(16,), norm="none", gru=16),
    optimizer=OptimizerConfig("adam", "constant"),
)
HYPER = r2d2.Hyper(learning_rate=5e-3)
TINY = dataclasses.replace(FAST, num_envs=2, num_steps=2, batch_size=4, capacity=64, learning_starts=20, length=4)


@functools.cache
def trained(env, updates, config=FAST, hyper=HYPER, seeds=4):
    algo = r2d2.make(envs.make(env) if isinstance(env, str) else env, config, hyper)
    steps = updates * algo.env_steps_per_update
    states, metrics = jax.jit(jax.vmap(run.train_fn(algo, steps)))(jax.random.split(jax.random.key(0), seeds))
    return algo, states, metrics


def score(algo, states):
    return np.asarray(jax.vmap(lambda s: run.evaluate(algo, s, jax.random.key(1), 32).returns.mean())(states))


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"rescale": True}, {"burn_in": 0, "prioritized": False, "double": False}])
def test_it_learns_what_needs_a_memory(fields):
    algo, states, metrics = trained("Probe-memory", 1500, dataclasses.replace(FAST, **fields))
    assert np.median(score(algo, states)) > 0.95
    assert all(jnp.isfinite(m).all() for k, m in metrics.items() if not k.startswith("episode"))


@pytest.mark.slow
def test_truncation_bootstraps():
    """Reward 1 a step, truncated at 8, never terminated: V = 1 / (1 - gamma) = 5; a merged ``done`` gives 2.9 on average."""

    def step(key, t, action):
        return (jnp.ones(1), t + 1, 1.0, False, t + 1 >= 8)

    env = envs.strict(envs.Environment("Forever", lambda key: (jnp.ones(1), jnp.int32(0)), step, envs.Discrete(2), 8))
    _, _, metrics = trained(env, 500, FAST, HYPER._replace(gamma=0.8), 2)
    np.testing.assert_allclose(metrics["q"][:, -50:].mean(1), 5, atol=0.35)


@pytest.mark.slow
def test_burn_in_refreshes_a_stale_memory_and_takes_no_gradient(key):
    """With the stored memories spoilt, what is learned depends on them the less the longer the burn-in."""
    differences = []
    for burn_in in (0, 8):
        algo = r2d2.make(
            envs.make("Probe-credit"), dataclasses.replace(TINY, burn_in=burn_in, prioritized=False), HYPER
        )
        state, update = jax.jit(algo.init, static_argnums=2)(key, None, 100), jax.jit(algo.update)
        for _ in range(12):
            state, _ = update(state)
        obs, memory = state.buffer.obs
        spoilt = state._replace(buffer=state.buffer._replace(obs=(obs, memory + 0.5)))
        a, b = (update(s)[1]["loss"] for s in (state, spoilt))
        differences.append(abs(float(a - b)) / float(a))
    assert differences[1] < 0.5 * differences[0]


def test_squash_by_hand_and_back():
    np.testing.assert_allclose(losses.squash(jnp.array([0.0, 3.0, -8.0])), [0, 1.003, -2.008], rtol=1e-6)
    x = jnp.array([-1e4, -3.0, -1e-3, 0.0, 1e-3, 1.0, 250.0])
    np.testing.assert_allclose(losses.unsquash(losses.squash(x)), x, rtol=2e-4)


@pytest.mark.slow
def test_a_checkpoint_holds_replay_and_memories_bit_for_bit(tmp_path):
    algo = r2d2.make(envs.make("Probe-memory"), TINY, HYPER)
    kwargs = {"num_seeds": 2, "eval_episodes": 2, "progress": False, "run_dir": tmp_path / "a"}
    first = run.train(algo, jax.random.key(0), 80, **kwargs)
    again = run.train(algo, jax.random.key(0), 80, resume=True, **kwargs)
    for a, b in zip(*map(jax.tree.leaves, (first.state, again.state)), strict=True):
        data = jax.random.key_data if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else np.asarray
        np.testing.assert_array_equal(data(a), data(b))


@pytest.mark.slow
def test_hyperparameters_are_swept():
    algo = r2d2.make(envs.make("Probe-policy"), TINY, HYPER)
    grid = run.sweep.grid(algo.hyper, {"gamma": [0.9, 0.99], "priority_max": [0.0, 0.9]})
    result = run.train(algo, jax.random.key(0), 40, num_seeds=2, hypers=grid, eval_episodes=0, progress=False)
    assert result.metrics["loss"].shape == (4, 2, 10)


def test_keys_are_used_once():
    algo = r2d2.make(envs.make("Probe-policy"), TINY, HYPER)
    with jax.debug_key_reuse(True):
        jax.jit(algo.update)(jax.jit(algo.init)(jax.random.key(0)))


def test_only_the_network_computes_in_half_width():
    algo = r2d2.make(envs.make("Probe-mask"), dataclasses.replace(TINY, precision="pure_bfloat16"), HYPER)
    program = jaxprs.equations(jaxprs.of(algo.update, jax.eval_shape(algo.init, jax.random.key(0))))
    half = [(e, scope) for e, scope in program if any(map(jaxprs.is_half, [*e.invars, *e.outvars]))]
    assert half and not [e for e, s in half if "network" not in s and str(e.primitive) not in jaxprs.MOVES]


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: r2d2.make(envs.make("Probe-value"), r2d2.Config(network=nets.ValueConfig())),
            "without a memory this is DQN",
        ),
        (lambda: r2d2.Config(burn_in=-1), "config.burn_in must be an integer of at least 0; got -1"),
        (lambda: r2d2.make(envs.make("Pendulum-v1")), "action values need discrete actions"),
        (
            lambda: r2d2.make(envs.make("Probe-value"), dataclasses.replace(TINY, capacity=14, learning_starts=8)),
            r"capacity must be at least 18, burn_in \+ length \+ 3 rows for each environment; got 14",
        ),
        (lambda: r2d2.make(envs.make("Probe-value"), TINY, r2d2.Hyper(priority_max=2.0)), "hyper.priority_max must be"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
