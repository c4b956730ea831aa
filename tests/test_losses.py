"""Losses and diagnostics by hand and against rlax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import losses


def test_ppo_clip_by_hand():
    ratio = jnp.array([1.5, 0.5, 1.5, 0.5])
    advantage = jnp.array([1.0, 1.0, -1.0, -1.0])
    wanted = [-1.2, -0.5, 1.5, 0.8]  # the bound bites only where it makes the objective smaller
    np.testing.assert_allclose(losses.ppo_clip(jnp.log(ratio), advantage, 0.2), wanted, rtol=1e-6)


def test_ppo_clip_has_no_gradient_past_the_bound():
    grad = jax.grad(lambda x, a: losses.ppo_clip(x, a, 0.2))
    assert grad(jnp.log(1.5), 1.0) == 0 and grad(jnp.log(0.5), -1.0) == 0
    assert grad(jnp.log(1.5), -1.0) > 0 and grad(jnp.log(0.5), 1.0) < 0


def test_dual_clip_bounds_negative_advantages():
    ratio = jnp.array([10.0, 2.0, 10.0])
    advantage = jnp.array([-1.0, -1.0, 1.0])
    wanted = [3.0, 2.0, -1.2]
    np.testing.assert_allclose(losses.ppo_dual_clip(jnp.log(ratio), advantage, 0.2, 3.0), wanted, rtol=1e-5)


def test_against_rlax():
    rlax = pytest.importorskip("rlax")
    log_ratio, advantage = jax.random.normal(jax.random.key(1), (2, 64))
    ours = losses.ppo_clip(log_ratio, advantage, 0.2).mean()
    theirs = rlax.clipped_surrogate_pg_loss(jnp.exp(log_ratio), advantage, 0.2)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_kl_weight_adapts():
    f = lambda kl: float(losses.adapt_kl_weight(jnp.float32(1), jnp.float32(kl), 0.01))  # noqa: E731
    assert [f(0.016), f(0.014), f(0.007), f(0.006)] == [2.0, 1.0, 1.0, 0.5]


def test_value_losses_by_hand():
    v, old, target = jnp.array([1.0, 3.0]), jnp.array([0.0, 3.1]), jnp.array([2.0, 2.0])
    np.testing.assert_allclose(losses.value_loss(v, target), [0.5, 0.5])
    np.testing.assert_allclose(losses.clipped_value_loss(v, old, target, 0.2), [0.5 * 1.8**2, 0.5], rtol=1e-6)


def test_standardize():
    x = losses.standardize(jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-6)
    assert not jnp.isnan(losses.standardize(jnp.ones(3))).any()


def test_explained_variance_of_what_a_mask_leaves():
    v, target = jnp.array([[0.5, 0.0, 0.0, 0.0]]), jnp.array([[1.0, 2.0, 0.0, 0.0]])
    mask = jnp.array([[True, True, False, False]])
    np.testing.assert_allclose(losses.explained_variance(v, target, mask), 1 - 0.5625 / 0.25)
    np.testing.assert_allclose(
        losses.explained_variance(v, target, mask), losses.explained_variance(v[:, :2], target[:, :2])
    )


def test_diagnostics():
    log_ratio = jnp.log(jnp.array([1.0, 1.3, 0.7, 1.1]))
    assert losses.clip_fraction(log_ratio, 0.2) == 0.5
    assert (losses.approximate_kl(log_ratio) >= 0).all() and losses.approximate_kl(log_ratio)[0] == 0
    target = jnp.array([1.0, 2.0, 3.0])
    assert losses.explained_variance(target, target) == 1
    assert losses.explained_variance(jnp.zeros(3), target) == 0
    assert losses.explained_variance(jnp.zeros(3), jnp.ones(3)) == 0


def test_approximate_kl_is_unbiased():
    p, q = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.2, 0.2, 0.6])
    estimate = jnp.sum(p * losses.approximate_kl(jnp.log(q / p)))
    np.testing.assert_allclose(estimate, jnp.sum(p * jnp.log(p / q)), rtol=1e-5)
