"""PQN: what it learns, what it must not confuse, and how it composes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

from jrl import envs, nets, run
from jrl.algos import pqn
from jrl.experience import greedy
from jrl.numerics.optim import OptimizerConfig

RANK_PROMOTION = "allow"  # gymnax promotes ranks

NETWORK = nets.ValueConfig(hidden=(16,))
FAST = pqn.Config(
    num_envs=8, num_steps=16, num_minibatches=4, network=NETWORK, optimizer=OptimizerConfig("adam", "constant")
)
HYPER = pqn.Hyper(learning_rate=1e-2, epsilon_end=0.1)
TINY = dataclasses.replace(FAST, num_envs=2, num_steps=8, num_epochs=1, num_minibatches=2)


@functools.cache
def trained(name, config=FAST, hyper=HYPER, updates=80):
    algo = pqn.make(envs.make(name), config, hyper)
    train = jax.jit(jax.vmap(run.train_fn(algo, updates * algo.env_steps_per_update)))
    states, metrics = train(jax.random.split(jax.random.key(0), 4))
    return algo, states, metrics


def q_of(algo, states, obs):
    network = nets.action_values(algo.config.network, envs.observation_spec(algo.env), algo.env.action_space)

    def q(s):
        return network.step(s.params, (), jnp.asarray(obs, jnp.float32), jnp.ones(len(obs), bool))[1]

    return np.asarray(jax.vmap(q)(states))


def score(algo, states):
    return np.asarray(jax.vmap(lambda s: run.evaluate(algo, s, jax.random.key(1), 32).returns.mean())(states))


def test_probe_value_and_observation():
    algo, states, _ = trained("Probe-value")
    np.testing.assert_allclose(q_of(algo, states, [[0.0]]).max(-1), 1, atol=0.1)
    algo, states, _ = trained("Probe-observation")
    np.testing.assert_allclose(q_of(algo, states, [[-1.0], [1.0]]).max(-1), [[-1, 1]] * 4, atol=0.1)


@pytest.mark.thorough(1)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"precision": "bfloat16"},
        {"precision": "float16"},
        {"network": nets.ValueConfig(hidden=(16,), dueling=True)},
    ],
    ids=["plain", "bfloat16", "float16", "dueling"],
)
def test_probe_policy(fields):
    algo, states, metrics = trained("Probe-policy", dataclasses.replace(FAST, **fields))
    np.testing.assert_allclose(score(algo, states), 1, atol=0.1)
    np.testing.assert_allclose(metrics["root_loss"] ** 2, metrics["loss"], rtol=1e-3)


@pytest.mark.slow
def test_masked_actions_are_never_taken():
    algo, states, _ = trained("Probe-mask")
    np.testing.assert_allclose(score(algo, states), 1, atol=0.1)
    q, noise = jnp.array([1.0, -jnp.inf, 0.5]), greedy.exploration_noise(jax.random.key(0), (1000,), 3)
    chosen = np.asarray(greedy.epsilon_greedy(jnp.broadcast_to(q, (1000, 3)), jnp.float32(0.6), noise))
    share = np.bincount(chosen, minlength=3) / 1000
    np.testing.assert_allclose(share, [0.7, 0, 0.3], atol=0.05)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("gru", [0, 8])
def test_truncation_bootstraps(gru):
    """Reward 1 a step, truncated at 20, never terminated: V = 1 / (1 - gamma), where a merged ``done`` gives about half."""

    def step(key, t, action):
        return (jnp.ones(1), t + 1, 1.0, False, t + 1 >= 20)

    env = envs.strict(envs.Environment("Forever", lambda key: (jnp.ones(1), jnp.int32(0)), step, envs.Discrete(2), 20))
    network = dataclasses.replace(NETWORK, gru=gru)
    algo = pqn.make(env, dataclasses.replace(FAST, num_steps=32, network=network), HYPER._replace(gamma=0.9))
    _, metrics = jax.jit(jax.vmap(run.train_fn(algo, 200 * 256)))(jax.random.split(jax.random.key(0), 2))
    np.testing.assert_allclose(metrics["q"][:, -10:].mean(1), 10, atol=0.5)


@pytest.mark.slow
def test_a_memory_learns_what_none_can():
    """The action at the end must repeat what only the first observation showed."""

    def reset(key):
        sign = jnp.where(jax.random.bernoulli(key), 1.0, -1.0)
        return jnp.array([sign, 0.0]), (sign, jnp.int32(0))

    def step(key, state, action):
        sign, t = state
        over = t >= 3
        reward = jnp.where(over, jnp.where((action == 1) == (sign > 0), 1.0, -1.0), 0.0)
        return jnp.array([0.0, (t + 1.0) / 4]), (sign, t + 1), reward, over, False

    env = envs.strict(envs.Environment("Recall", reset, step, envs.Discrete(2), 4))
    scores = {}
    for gru in (0, 16):
        config = dataclasses.replace(FAST, num_steps=32, network=dataclasses.replace(NETWORK, gru=gru))
        algo = pqn.make(env, config, HYPER)
        states, _ = jax.jit(jax.vmap(run.train_fn(algo, 100 * 256)))(jax.random.split(jax.random.key(0), 4))
        scores[gru] = np.median(score(algo, states))
    assert scores[16] > 0.9 and scores[0] < 0.6


@pytest.mark.slow
def test_epsilon_falls_over_the_run():
    _, _, metrics = trained("Probe-policy", TINY, HYPER._replace(epsilon_fraction=0.5), 20)
    np.testing.assert_allclose(metrics["epsilon"][0, ::5], [1, 0.55, 0.1, 0.1], atol=1e-5)
    algo = pqn.make(envs.make("Probe-policy"), TINY, HYPER)
    _, metrics = jax.jit(algo.update)(algo.init(jax.random.key(0)))
    np.testing.assert_allclose(metrics["epsilon"], 0.1)  # an unknown length: the end of the schedule


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"network": dataclasses.replace(NETWORK, gru=4), "precision": "pure_bfloat16"}])
def test_the_same_key_gives_the_same_bits_and_a_finished_run_resumes(fields, tmp_path):
    algo = pqn.make(envs.make("Probe-policy"), dataclasses.replace(TINY, **fields))
    kwargs = {"num_seeds": 2, "eval_episodes": 2, "progress": False}
    first = run.train(algo, jax.random.key(0), 96, run_dir=tmp_path / "a", **kwargs)
    again = run.train(algo, jax.random.key(0), 96, run_dir=tmp_path / "b", **kwargs)
    resumed = run.train(algo, jax.random.key(0), 96, run_dir=tmp_path / "a", resume=True, **kwargs)
    for a, b, c in zip(*(jax.tree.leaves(r.state.params) for r in (first, again, resumed)), strict=True):
        np.testing.assert_array_equal(a.astype("float32"), b.astype("float32"))
        np.testing.assert_array_equal(a.astype("float32"), c.astype("float32"))


@pytest.mark.slow
def test_hyperparameters_are_swept_and_keys_used_once():
    algo = pqn.make(envs.make("Probe-policy"), TINY)
    grid = run.sweep.grid(algo.hyper, {"q_lambda": [0.0, 0.9], "optimizer.b1": [0.5, 0.9]})
    result = run.train(algo, jax.random.key(0), 32, num_seeds=2, hypers=grid, eval_episodes=0, progress=False)
    assert result.metrics["loss"].shape == (4, 2, 2)
    with jax.debug_key_reuse(True):
        jax.jit(algo.update)(jax.jit(algo.init)(jax.random.key(0)))


@pytest.mark.parametrize("policy", ["bfloat16", "float16", "pure_bfloat16"])
def test_only_the_network_computes_in_half_width(policy):
    algo = pqn.make(envs.make("Probe-mask"), dataclasses.replace(TINY, precision=policy))
    program = jaxprs.equations(jaxprs.of(algo.update, jax.eval_shape(algo.init, jax.random.key(0))))
    half = [(e, scope) for e, scope in program if any(map(jaxprs.is_half, [*e.invars, *e.outvars]))]
    assert half and not [e for e, s in half if "network" not in s and str(e.primitive) not in jaxprs.MOVES]


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: pqn.make(envs.make("Probe-value"), pqn.Config(num_minibatches=7)),
            r"must divide num_envs \* num_steps = 2048; got 7",
        ),
        (lambda: pqn.make(envs.make("Pendulum-v1")), "action values need discrete actions"),
        (
            lambda: pqn.make(envs.make("Probe-value"), TINY, pqn.Hyper(epsilon_end=1.5)),
            "epsilon_end must be between 0 and 1",
        ),
        (
            lambda: pqn.make(envs.make("Probe-value"), TINY, pqn.Hyper(max_grad_norm=0.0)),
            "max_grad_norm must be above 0",
        ),
        (lambda: nets.ValueConfig(norm="batch"), "network.norm must be one of none, layer; got 'batch'"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
