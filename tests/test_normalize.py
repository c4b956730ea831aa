"""Running statistics against NumPy over everything seen."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import envs, nets
from jrl.algos import dqn, ppo, pqn, r2d2
from jrl.envs import MaskedObs, strict
from jrl.experience import normalize

RANK_PROMOTION = "allow"  # gymnax promotes ranks


def test_statistics_are_those_of_all_data():
    rng = np.random.default_rng(0)
    data = rng.normal(3, 5, size=(6, 10, 4, 2)).astype(np.float32)
    stats = normalize.init((2,))
    for batch in data:
        stats = normalize.update(stats, jnp.array(batch))
    np.testing.assert_allclose(stats.mean, data.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(stats.variance, data.var((0, 1, 2)), rtol=1e-4)
    assert stats.size == 240


def test_nothing_seen_is_the_identity():
    x = jnp.array([1.5, -2.0])
    np.testing.assert_allclose(normalize.standardize(normalize.init((2,)), x), x)
    np.testing.assert_allclose(normalize.scale(normalize.init(()), x), x)


def test_large_offsets_keep_their_digits():
    stats = normalize.init(())
    for i in range(50):
        stats = normalize.update(stats, 1e4 + jnp.sin(jnp.arange(100.0) + i))
    np.testing.assert_allclose(stats.variance, 0.5, rtol=0.05)


def test_rewards_are_scaled_by_the_discounted_sum():
    reward, ended = jnp.ones((4, 1)), jnp.array([[False], [True], [False], [False]])
    state = normalize.update_rewards(normalize.init_rewards(1), reward, ended, 0.5)
    totals = np.array([1, 1.5, 1, 1.5])  # the second step ends the episode and restarts the sum
    np.testing.assert_allclose(state.stats.variance, totals.var(), rtol=1e-6)
    assert state.running.tolist() == [1.5]
    continued = normalize.update_rewards(state, reward[:1], ended[:1], 0.5)
    assert continued.running.tolist() == [1.75]


def test_masks_are_left_alone():
    stats = normalize.update(normalize.init((2,)), jnp.arange(20.0).reshape(10, 2))
    seen = normalize.observations(stats, MaskedObs(jnp.ones(2), jnp.array([True, False])))
    assert seen.mask.tolist() == [True, False] and seen.obs[0] != 1
    assert normalize.observations(None, 3) == 3


TINY = {"num_envs": 4, "num_steps": 4, "normalize_observations": True, "normalize_rewards": True}
REPLAY = {"learning_starts": 0, "batch_size": 8, "capacity": 200}
VALUE = {"network": nets.ValueConfig(hidden=(8,), norm="none")}
ALGORITHMS = {
    "dqn": lambda env: dqn.make(env, dqn.Config(**TINY, **REPLAY, **VALUE), dqn.Hyper(epsilon_end=1)),
    "pqn": lambda env: pqn.make(env, pqn.Config(**TINY, **VALUE, num_minibatches=2), pqn.Hyper(epsilon_end=1)),
    "r2d2": lambda env: r2d2.make(
        env,
        r2d2.Config(**TINY, **REPLAY, burn_in=1, length=3, network=nets.ValueConfig(hidden=(8,), norm="none", gru=4)),
        r2d2.Hyper(epsilon_end=1),
    ),
    "ppo": lambda env: ppo.make(env, ppo.Config(**TINY, num_minibatches=2, network=nets.Config(hidden=(8,)))),
}


def scaled(env, of_observations, of_rewards):
    """The environment with observations and rewards that are so many times as large."""

    def reset(key):
        obs, state = env.reset(key)
        return of_observations * obs, state

    def step(key, state, action):
        obs, state, reward, *ends = env.step(key, state, action)
        return of_observations * obs, state, of_rewards * reward, *ends

    return strict(env._replace(reset=reset, step=step))


@pytest.mark.thorough(2)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_learned_does_not_depend_on_the_scale_of_observations_and_rewards(name, key):
    env = envs.make("CartPole-v1")

    @jax.jit
    def learned(factor):
        algo = ALGORITHMS[name](scaled(env, factor, factor))
        state = algo.init(key)
        seen = normalize.Stats(jnp.float32(64), factor * jnp.arange(4.0), factor**2 * jnp.arange(1.0, 5.0))
        earned = normalize.Stats(jnp.float32(64), jnp.float32(0), jnp.float32(factor**2))
        state = state._replace(obs_stats=seen, reward_stats=state.reward_stats._replace(stats=earned))
        for _ in range(2):
            state, _ = algo.update(state)
        return state

    one, many = learned(1.0), learned(64.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5), one.params, many.params)
    np.testing.assert_allclose(64 * one.obs_stats.mean, many.obs_stats.mean, rtol=1e-5)
    assert one.obs_stats.size == 64 + 2 * 16 and (one.obs_stats.mean != jnp.arange(4.0)).all()
    assert one.reward_stats.stats.mean > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dqn", "pqn", "r2d2"])
def test_rewards_are_clipped_where_asked_for(name, key):
    env = envs.make("CartPole-v1")

    @functools.partial(jax.jit, static_argnums=1)
    def learned(factor, bound):
        algo = ALGORITHMS[name](scaled(env, 1.0, factor))
        algo = algo.remake(
            replace(algo.config, reward_clip=bound, normalize_observations=False, normalize_rewards=False)
        )
        state = algo.init(key)
        for _ in range(2):
            state, metrics = algo.update(state)
        return state.params, metrics["episode_return"]

    wanted, _ = learned(1.0, 0.0)
    clipped, _ = learned(-50.0, 1.0)
    negative, _ = learned(-1.0, 0.0)
    jax.tree.map(np.testing.assert_array_equal, learned(50.0, 1.0)[0], wanted)
    jax.tree.map(np.testing.assert_array_equal, clipped, negative)
