"""Distributions against scipy, sums and integrals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from jrl.equations import distributions as d
from jrl.equations.distributions import MASKED, NormalParams

LOGITS = jnp.array([0.5, -1.0, 2.0])
OTHER = jnp.array([0.0, 0.3, -0.2])
P, Q = (
    NormalParams(jnp.array([0.3, -1.0]), jnp.array([-0.5, 0.4])),
    NormalParams(jnp.array([0.0, 1.0]), jnp.array([0.1, 0.0])),
)


def test_categorical_by_sums():
    c = d.categorical(3)
    p, q = jax.nn.softmax(LOGITS), jax.nn.softmax(OTHER)
    np.testing.assert_allclose([c.log_prob(LOGITS, jnp.int32(i)) for i in range(3)], jnp.log(p), rtol=1e-5)
    np.testing.assert_allclose(c.entropy(LOGITS), scipy.stats.entropy(p), rtol=1e-5)
    np.testing.assert_allclose(c.kl(LOGITS, OTHER), scipy.stats.entropy(p, q), rtol=1e-5)
    assert c.mode(LOGITS) == 2 and c.kl(LOGITS, LOGITS) == 0


def test_categorical_samples_have_its_frequencies(key):
    actions = d.categorical(3).sample(key, jnp.broadcast_to(LOGITS, (50_000, 3)))
    frequencies = np.bincount(actions, minlength=3) / 50_000
    np.testing.assert_allclose(frequencies, jax.nn.softmax(LOGITS), atol=0.01)


def test_masked_choices_count_for_nothing(key):
    c, logits = d.categorical(3), LOGITS.at[2].set(MASKED)
    np.testing.assert_allclose(c.entropy(logits), d.categorical(2).entropy(LOGITS[:2]), rtol=1e-6)
    assert (c.sample(key, jnp.broadcast_to(logits, (10_000, 3))) < 2).all()
    grads = jax.grad(lambda x: c.entropy(x) + c.log_prob(x, jnp.int32(0)) + c.kl(x, x + 1))(logits)
    assert jnp.isfinite(grads).all() and grads[2] == 0


def test_multi_categorical_is_a_product(key):
    m, parts = d.multi_categorical((2, 3)), (d.categorical(2), d.categorical(3))
    a, b = LOGITS[:2], OTHER
    both, action = jnp.concatenate([a, b]), jnp.array([1, 2])
    np.testing.assert_allclose(
        m.log_prob(both, action), parts[0].log_prob(a, action[0]) + parts[1].log_prob(b, action[1])
    )
    np.testing.assert_allclose(m.entropy(both), parts[0].entropy(a) + parts[1].entropy(b))
    np.testing.assert_allclose(
        m.kl(both, both[::-1]), parts[0].kl(a, both[::-1][:2]) + parts[1].kl(b, both[::-1][2:]), rtol=1e-6
    )
    assert m.mode(both).tolist() == [0, 1]
    samples = m.sample(key, jnp.broadcast_to(both, (1000, 5)))
    assert samples.shape == (1000, 2) and samples.max(0).tolist() == [1, 2] and samples.dtype == jnp.int32


def test_normal_against_scipy(key):
    n, x = d.normal(2), jnp.array([0.1, 0.2])
    frozen = scipy.stats.norm(P.mean, jnp.exp(P.log_std))
    np.testing.assert_allclose(n.log_prob(P, x), frozen.logpdf(x).sum(), rtol=1e-5)
    np.testing.assert_allclose(n.entropy(P), frozen.entropy().sum(), rtol=1e-5)
    samples = n.from_noise(NormalParams(P.mean[None], P.log_std[None]), n.noise(key, (100_000,)))
    np.testing.assert_allclose(samples.mean(0), P.mean, atol=0.02)
    estimate = (
        n.log_prob(NormalParams(P.mean[None], P.log_std[None]), samples) - jax.vmap(lambda s: n.log_prob(Q, s))(samples)
    ).mean()
    np.testing.assert_allclose(n.kl(P, Q), estimate, rtol=0.02)
    assert n.kl(P, P) == 0


@pytest.mark.parametrize("mean, log_std", [(0.0, 0.0), (1.5, -1.0), (-0.7, 0.6)])
def test_tanh_normal_against_integrals(mean, log_std):
    t = d.tanh_normal(1)
    params = NormalParams(jnp.array([mean]), jnp.array([log_std]))
    u = jnp.linspace(-9, 9, 200_001)  # integrate over the unsquashed line, where the density is smooth
    x = jnp.tanh(u)[:, None]
    inside = jnp.abs(u) < 6
    density = jnp.exp(jax.vmap(lambda x: t.log_prob(params, x))(x))
    slope = 1 / jnp.cosh(u) ** 2
    np.testing.assert_allclose(jnp.trapezoid(jnp.where(inside, density * slope, 0), u), 1, atol=2e-3)
    log_slope = 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))
    weights = scipy.stats.norm.pdf(u, mean, np.exp(log_std))
    wanted = scipy.stats.norm.entropy(mean, np.exp(log_std)) + np.trapezoid(weights * log_slope, u)
    np.testing.assert_allclose(t.entropy(params), wanted, atol=1e-3)


@pytest.mark.parametrize("std, error", [(0.1, 1e-5), (2.0, 1e-5), (5.0, 2e-5), (10.0, 2e-3)])
def test_the_entropy_of_a_wide_tanh_normal(std, error):
    def slope(z, mean):
        u = mean + std * z
        return 2 * (np.log(2) - u - np.logaddexp(0, -2 * u)) * scipy.stats.norm.pdf(z)

    for mean in (0.0, 0.4, 3.0):
        params = NormalParams(jnp.array([mean]), jnp.array([np.log(std)]))
        kink = [np.clip(-mean / std, -11, 11)]
        wanted = scipy.stats.norm.entropy(mean, std) + scipy.integrate.quad(slope, -12, 12, (mean,), points=kink)[0]
        np.testing.assert_allclose(d.tanh_normal(1).entropy(params), wanted, atol=error + 4e-6 * abs(wanted))


def test_tanh_normal_stays_finite_at_the_edge():
    t = d.tanh_normal(1)
    params = NormalParams(jnp.zeros(1), jnp.zeros(1))
    for x in (-1.0, 1.0):
        value, grad = jax.value_and_grad(
            lambda m, x=x: t.log_prob(NormalParams(m, params.log_std), jnp.array([x])), argnums=0
        )(params.mean)
        assert jnp.isfinite(value) and jnp.isfinite(grad).all()
    np.testing.assert_allclose(t.kl(P, Q), d.normal(2).kl(P, Q))


def test_arithmetic_is_float32_for_low_precision_parameters():
    low = LOGITS.astype(jnp.bfloat16)
    c = d.categorical(3)
    assert {c.entropy(low).dtype, c.log_prob(low, jnp.int32(0)).dtype, c.kl(low, low).dtype} == {jnp.dtype("float32")}
