"""Losses and diagnostics by hand and against rlax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.equations import losses
from jrl.experience import normalize


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
    def adapted(kl, weight=1.0):
        return float(losses.adapt_kl_weight(jnp.float32(weight), jnp.float32(kl), 0.01, 1.0))

    assert [adapted(0.016), adapted(0.014), adapted(0.007), adapted(0.006)] == [2.0, 1.0, 1.0, 0.5]
    assert adapted(0.0, weight=0.01) == pytest.approx(0.01) and adapted(1.0, weight=100.0) == 100


def test_value_losses_by_hand():
    v, old, target = jnp.array([1.0, 3.0]), jnp.array([0.0, 3.1]), jnp.array([2.0, 2.0])
    np.testing.assert_allclose(losses.value_loss(v, target), [0.5, 0.5])
    np.testing.assert_allclose(losses.clipped_value_loss(v, old, target, 0.2), [0.5 * 1.8**2, 0.5], rtol=1e-6)


def test_standardize():
    x = losses.standardize(jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-6)


@pytest.mark.parametrize("x", [1.0, 0.1, 1e4 + 0.1, -3e-5])
@pytest.mark.parametrize("number", [1, 3, 7, 1000])
def test_equal_numbers_standardize_to_0(x, number):
    """The rounded mean of equal numbers is not that number, and a tiny deviation divides the difference."""
    same = jnp.full(number, x, jnp.float32)
    assert (losses.standardize(same) == 0).all()
    assert losses.explained_variance(same + 1, same) == 0
    stats = normalize.init((1,))
    for _ in range(5):
        stats = normalize.update(stats, same[:, None])
    assert normalize.standardize(stats, same[:1]) == 0
    assert normalize.scale(stats, same[:1]) == jnp.clip(same[:1], -10, 10)


def test_a_mask_hides_what_is_not_a_number():
    x, mask = jnp.array([[1.0, jnp.nan], [jnp.inf, 2.0]]), jnp.array([[True, False], [False, True]])
    grad = jax.grad(lambda x: (losses.masked(x, mask) ** 2).sum())(x)
    np.testing.assert_array_equal(grad, [[2, 0], [0, 4]])


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
