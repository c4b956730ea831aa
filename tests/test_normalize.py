"""Running statistics against NumPy over everything seen."""

import jax.numpy as jnp
import numpy as np

from jrl.envs import MaskedObs
from jrl.experience import normalize


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
