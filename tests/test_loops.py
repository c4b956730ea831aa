"""Loops laid out for a GPU give the numbers of ``jax.lax.scan``, and its programs launch fewer kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrl import envs, nets
from jrl.algorithm import over_seeds
from jrl.algos import ppo
from jrl.equations import returns
from jrl.numerics import host, loops, optim
from jrl.run.kernels import launches

RANK_PROMOTION = "allow"  # gymnax promotes ranks


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Programs are traced as for a GPU, but for its kernels, and run here."""
    jax.clear_caches()
    monkeypatch.setattr(host, "hopper", lambda: False)
    with host.traced_for("gpu"):
        yield
    jax.clear_caches()


def outputs(carry, x):
    """Numbers of every width, and of none."""
    total = carry + x
    wide = jnp.full((2, 3), total, jnp.float32)
    return total, {
        "wide": wide,
        "half": wide.astype(jnp.bfloat16),
        "count": jnp.int32(total * 10),
        "minus": -jnp.arange(3, dtype=jnp.int32),
        "flags": jnp.stack([total > 3, total < 5]),
        "byte": jnp.uint8(7),
        "alone": jnp.full(loops.LARGE // 4 + 1, total),
        "nothing": (),
        "empty": jnp.zeros((0, 4)),
        "not": jnp.full(2, jnp.nan),
    }


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("unroll", [1, 3, 7])
def test_a_packed_scan_is_a_scan(reverse, unroll, as_on_a_gpu):
    xs = jnp.arange(7.0)
    wanted = jax.lax.scan(outputs, jnp.float32(0), xs, reverse=reverse)
    given = loops.scan(outputs, jnp.float32(0), xs, reverse=reverse, gpu_unroll=unroll)
    jax.tree.map(np.testing.assert_array_equal, given, wanted)
    assert jax.tree.map(lambda x: x.dtype, given) == jax.tree.map(lambda x: x.dtype, wanted)


def test_a_packed_scan_carries_keys_and_is_vmapped(as_on_a_gpu):
    def step(key, _):
        key, now = jax.random.split(key)
        return key, (now, jax.random.uniform(now))

    keys = jax.random.split(jax.random.key(0), 3)
    wanted = jax.vmap(lambda k: jax.lax.scan(step, k, length=4))(keys)
    given = jax.vmap(lambda k: loops.scan(step, k, length=4))(keys)

    def same(x, y):
        x, y = (jax.random.key_data(k) if k.dtype == keys.dtype else k for k in (x, y))
        np.testing.assert_array_equal(x, y)

    jax.tree.map(same, given, wanted)


def test_the_gradient_of_a_packed_scan(as_on_a_gpu):
    def loss(scan, w):
        return jnp.sum(
            jnp.sin(scan(lambda c, x: (c * w + x, {"c": c * x, "n": jnp.int32(3)}), 0.5, jnp.arange(5.0))[1]["c"])
        )

    wanted = jax.grad(lambda w: loss(jax.lax.scan, w))(0.7)
    np.testing.assert_allclose(jax.grad(lambda w: loss(loops.scan, w))(0.7), wanted, rtol=1e-6)


def test_an_update_traced_for_a_gpu_gives_the_same(monkeypatch):
    config = ppo.Config(num_envs=2, num_steps=24, num_epochs=1, num_minibatches=2, network=nets.Config(hidden=(8,)))
    algo = over_seeds(ppo.make(envs.make("Probe-truncation"), config))
    state = jax.jit(lambda keys: algo.init(keys, None, 10))(jax.random.split(jax.random.key(0), 2))
    wanted, metrics = jax.jit(algo.update)(state)
    jax.clear_caches()
    monkeypatch.setattr(host, "hopper", lambda: False)
    with host.traced_for("gpu"):
        given, gpu_metrics = jax.jit(algo.update)(state)
    jax.clear_caches()
    assert metrics["episodes"].min() >= 2

    def close(x, y):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)

    jax.tree.map(close, (given.params, given.actors, gpu_metrics), (wanted.params, wanted.actors, metrics))


def test_returns_traced_for_a_gpu_are_the_same(as_on_a_gpu):
    rng = np.random.default_rng(0)
    v, r, following = (jnp.asarray(rng.normal(size=37), jnp.float32) for _ in range(3))
    discount, goes_on = jnp.where(jnp.arange(37) % 9 == 8, 0.0, 0.9), jnp.where(jnp.arange(37) % 9 == 8, 0.0, 1.0)
    given = returns.gae(v, r, discount, following, goes_on, 0.8)
    advantage, wanted = 0.0, []
    for t in reversed(range(37)):
        delta = r[t] + discount[t] * following[t] - v[t]
        advantage = delta + discount[t] * 0.8 * goes_on[t] * advantage
        wanted.append(advantage)
    np.testing.assert_allclose(given, np.array(wanted[::-1]), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_clipping_by_global_norm_is_optax_s(platform):
    grads = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4), "c": jnp.float32(-2)}
    for most in (1.0, 100.0):
        with host.traced_for(platform):
            tx = optim.make(optim.OptimizerConfig("sgd"), optim.Hyper(momentum=0.0), 1.0, most)
            given, _ = tx.update(grads, tx.init(grads), grads)
            norm = optim.global_norm(grads)
        wanted, _ = optax.clip_by_global_norm(most).update(grads, optax.EmptyState())
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, -y, rtol=1e-6), given, wanted)
        np.testing.assert_allclose(norm, (55 + 4 + 4) ** 0.5, rtol=1e-6)


def test_kernels_are_counted_through_loops():
    text = """
HloModule m
%inner (p: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = f32[4]{0} fusion(%a), kind=kLoop, calls=%x
}
%outer (p: f32[4]) -> f32[4] {
  %c = f32[4]{0} fusion(%a), kind=kLoop, calls=%x
  %d = f32[4]{0} custom-call(%c), custom_call_target="product"
  %e = f32[4]{0} while(%d), condition=%cond, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %f = f32[4]{0} copy(%p)
  %g = f32[4]{0} while(%f), condition=%cond, body=%outer, backend_config={"known_trip_count":{"n":"10"}}
  %h = f32[4]{0} while(%g), condition=%cond, body=%inner
}
"""

    class Compiled:
        def as_text(self):
            return text

    found = launches(Compiled())
    assert found.total == 1 + 10 * (2 + 3 * 1) + 1
    assert [tuple(loop) for loop in found.loops] == [(10, 2), (3, 1), (None, 1)]


def test_a_program_is_traced_for_another_platform_only_within_its_context():
    assert host.platform() == jax.default_backend()
    with pytest.raises(RuntimeError), host.traced_for("gpu"):
        assert host.platform() == "gpu" and host.hopper()
        raise RuntimeError
    assert host.platform() == jax.default_backend()
