"""Gradient transforms at half width: the property each is for."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

from jrl.numerics import rounding

FLOATS = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32, allow_subnormal=False)


def run(tx, params, grads, steps, seeds=None):
    """Parameters after ``steps`` of constant gradients; with ``seeds``, of so many keys."""

    def train(tx):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (last, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        return last, state

    if seeds is None:
        return jax.jit(lambda: train(tx))()
    return jax.jit(jax.vmap(lambda key: train(tx(key))))(jax.random.split(jax.random.key(1), seeds))


# Rounding a number


@settings(max_examples=200, deadline=None)
@given(FLOATS)
def test_stochastic_rounding_gives_one_of_two_neighbours(x):
    x = np.float32(x)
    keys = jax.random.split(jax.random.key(0), 16)
    rounded = np.asarray(jax.vmap(lambda k: rounding.stochastic(k, jnp.float32(x)))(keys))
    bits = np.asarray(x).view(np.uint32) & np.uint32(0xFFFF0000)
    below, above = bits.view(np.float32), (bits + np.uint32(0x10000)).view(np.float32)  # in magnitude
    assert set(rounded.tolist()) <= {float(below), float(above)}
    if below == x:
        assert (rounded == x).all()
    assert (rounded.astype(jnp.bfloat16).astype(np.float32) == rounded).all()


@pytest.mark.parametrize("x", [1 + 2**-9, 1 + 2**-10, -3.00001, 0.1, 1e-20, 1.999])
def test_stochastic_rounding_is_unbiased(x):
    n = 100_000
    rounded = np.asarray(rounding.stochastic(jax.random.key(3), jnp.full(n, x, jnp.float32)), np.float64)
    spacing = 2.0 ** (np.floor(np.log2(abs(x))) - 7)
    assert abs(rounded.mean() - np.float32(x)) < 5 * 0.5 * spacing / np.sqrt(n)
    assert len(np.unique(rounded)) == 2


def test_what_is_not_finite_stays():
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 0.0, -0.0])
    out = rounding.stochastic(jax.random.key(0), x)
    np.testing.assert_array_equal(out, x)


# Parameters: a step of 1/1000 of the last bit's weight at 1

ONE = {"w": jnp.ones(64, jnp.bfloat16)}
TINY_STEP = {"w": jnp.full(64, -1e-3)}  # gradient; sgd with rate 1 goes up by 0.001, less than half of 1/128


def test_plain_bfloat16_stalls_and_the_others_do_not():
    sgd = optax.sgd(1.0)
    stalled, _ = run(rounding.in_float32(sgd), ONE, TINY_STEP, 1000)
    assert (stalled["w"] == 1).all()
    wanted = 1 + 1e-3 * 1000
    kahan, _ = run(rounding.kahan_summation(sgd), ONE, TINY_STEP, 1000)
    np.testing.assert_allclose(np.float32(kahan["w"]), wanted, atol=2**-7)
    master, _ = run(rounding.master_weights(sgd), ONE, TINY_STEP, 1000)
    np.testing.assert_allclose(np.float32(master["w"]), wanted, atol=2**-8)
    stochastic, _ = run(lambda key: rounding.stochastic_rounding(sgd, key), ONE, TINY_STEP, 1000, seeds=16)
    assert stochastic["w"].dtype == jnp.bfloat16
    mean = np.float64(stochastic["w"]).mean()
    assert abs(mean - wanted) < 0.01  # 1024 walks of standard deviation near sqrt(1000 * 1e-3 / 128) = 0.09
    assert np.float32(stochastic["w"]).std() > 0.01


@pytest.mark.parametrize("wrap", [rounding.kahan_summation, rounding.master_weights])
def test_kahan_and_master_follow_float32(wrap):
    """A noisy descent of a thousand steps ends within a rounding or two of where float32 ends."""
    curvature = jnp.linspace(0.5, 2.0, 64)

    def descend(tx, params):
        def step(carry, key):
            params, state = carry
            w = params["w"].astype(jnp.float32)
            grads = {"w": curvature * (w - 1.7) + 0.1 * jax.random.normal(key, w.shape)}
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(2), 1000)
        return np.float32(jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), keys)[0][0])()["w"])

    wide = descend(optax.sgd(1e-3), {"w": jnp.ones(64)})
    plain = descend(rounding.in_float32(optax.sgd(1e-3)), ONE)
    kept = descend(wrap(optax.sgd(1e-3)), ONE)
    assert np.abs(kept - wide).max() < 2**-6 < np.abs(plain - wide).mean()


def test_master_weights_are_the_inner_optimizer_in_float32():
    grads = {"w": jax.random.normal(jax.random.key(0), (64,))}
    low, state = run(rounding.master_weights(optax.adam(1e-2)), ONE, grads, 50)
    wide, _ = run(optax.adam(1e-2), {"w": jnp.ones(64)}, grads, 50)
    np.testing.assert_allclose(state.params["w"], wide["w"], rtol=1e-6)
    np.testing.assert_array_equal(low["w"], state.params["w"].astype(jnp.bfloat16))


@pytest.mark.parametrize("wrap", [rounding.stochastic_rounding, rounding.kahan_summation, rounding.master_weights])
def test_each_stands_alone_in_a_chain(wrap):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0), wrap())
    params, _ = run(tx, ONE, TINY_STEP, 1000)
    assert params["w"].dtype == jnp.bfloat16 and float(params["w"].astype(jnp.float32).mean()) > 1.5
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(TINY_STEP, tx.init(ONE))


@pytest.mark.parametrize("wrap", [rounding.stochastic_rounding, rounding.kahan_summation])
def test_float32_parameters_are_only_stepped(wrap):
    wide = {"w": jnp.linspace(0.5, 2, 64)}
    plain, _ = run(optax.sgd(0.1), wide, TINY_STEP, 20)
    wrapped, _ = run(wrap(optax.sgd(0.1)), wide, TINY_STEP, 20)
    np.testing.assert_allclose(wrapped["w"], plain["w"], rtol=3e-6)


def test_float16_parameters_are_not_rounded_stochastically():
    with pytest.raises(ValueError, match="bfloat16 and float32 parameters; got float16"):
        rounding.stochastic_rounding().init({"w": jnp.ones(2, jnp.float16)})


# Moments


def test_moments_are_kept_in_bfloat16_and_still_decay():
    """When gradients fall from 1 to 0.1, Adam's second moment falls too; rounded to nearest it would stay at 1."""
    adam = optax.scale_by_adam(b2=0.999)
    params = {"w": jnp.zeros(256)}

    def moments(tx, steps=3000):
        def step(state, g):
            return tx.update({"w": jnp.full(256, g)}, state, params)[1], None

        grads = jnp.concatenate([jnp.ones(2000), jnp.full(steps, 0.1)])
        return jax.jit(lambda: jax.lax.scan(step, tx.init(params), grads)[0])()

    wide = moments(adam)
    narrow = moments(rounding.bfloat16_moments(adam))
    assert narrow.inner.nu["w"].dtype == narrow.inner.mu["w"].dtype == jnp.bfloat16
    assert narrow.inner.count.dtype == jnp.int32
    assert abs(np.float32(narrow.inner.nu["w"]).mean() / float(wide.nu["w"][0]) - 1) < 0.1
    assert float(wide.nu["w"][0]) < 0.1


def test_bfloat16_moments_step_as_float32_ones_do():
    grads = {"w": jnp.linspace(-1, 1, 64)}
    wide, _ = run(optax.adam(1e-2), {"w": jnp.ones(64)}, grads, 100)
    narrow, _ = run(rounding.bfloat16_moments(optax.adam(1e-2)), {"w": jnp.ones(64)}, grads, 100)
    np.testing.assert_allclose(narrow["w"], wide["w"], atol=0.03)


# Loss scaling


def scaled_grads(state, grads):
    return jax.tree.map(lambda g: g * rounding.loss_scale(state), grads)


def test_an_overflow_changes_nothing_but_the_scale():
    tx = rounding.dynamic_loss_scaling(optax.adam(0.1), initial=1024.0)
    params = {"w": jnp.array([1.0, 2.0])}
    state = tx.init(params)
    updates, state = tx.update(scaled_grads(state, {"w": jnp.array([0.5, -0.5])}), state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], [0.9, 2.1], rtol=1e-5)
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        updates, after = tx.update({"w": jnp.array([bad, 1.0])}, state, params)
        np.testing.assert_array_equal(updates["w"], [0, 0])
        jax.tree.map(np.testing.assert_array_equal, after.inner, state.inner)
        assert after.scale == state.scale / 2 and after.steps == 0


def test_the_scale_grows_after_good_steps_and_stays_in_bounds():
    tx = rounding.dynamic_loss_scaling(initial=4.0, growth_interval=3, most=16.0)
    params = {"w": jnp.ones(1)}
    state, scales = tx.init(params), []
    for g in [1.0] * 9 + [jnp.inf] * 6:
        _, state = tx.update({"w": jnp.array([g])}, state, params)
        scales.append(float(state.scale))
    assert scales == [4, 4, 8, 8, 8, 16, 16, 16, 16, 8, 4, 2, 1, 1, 1]


def test_seeds_overflow_each_for_itself():
    tx = rounding.dynamic_loss_scaling(optax.sgd(1.0), initial=8.0)
    params = {"w": jnp.ones((3, 2))}
    state = jax.vmap(tx.init)(params)
    updates, state = jax.vmap(tx.update)({"w": jnp.array([[8.0, 8], [jnp.inf, 8], [8, jnp.nan]])}, state, params)
    np.testing.assert_array_equal(updates["w"], [[-1, -1], [0, 0], [0, 0]])
    assert state.scale.tolist() == [8, 4, 4]


def test_scaling_saves_gradients_that_float16_would_flush():
    tx = optax.chain(rounding.dynamic_loss_scaling(), optax.sgd(1.0))
    params = {"w": jnp.float32(1.0)}
    state = tx.init(params)

    def loss(params, scale):
        y = (params["w"].astype(jnp.float16) * jnp.float16(1e-4)).astype(jnp.float32)
        return 1e-5 * y * scale

    flushed = jax.grad(loss)(params, 1.0)
    assert flushed["w"] == 0
    updates, _ = tx.update(jax.grad(loss)(params, rounding.loss_scale(state)), state, params)
    np.testing.assert_allclose(updates["w"], -1e-9, rtol=2e-3)
    assert rounding.loss_scale(optax.adam(1.0).init(params)) == 1.0


# What a review found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "tx",
    [
        rounding.dynamic_loss_scaling(optax.adam(1e-3)),
        rounding.dynamic_loss_scaling(rounding.kahan_summation(optax.adam(1e-3))),
        optax.chain(rounding.dynamic_loss_scaling(), rounding.in_float32(optax.adam(1e-3))),
        optax.chain(rounding.in_float32(optax.adam(1e-3)), rounding.kahan_summation()),
        optax.MultiSteps(rounding.master_weights(optax.adam(1e-3)), 2).gradient_transformation(),
    ],
    ids=["scaling", "scaling-kahan", "chain-scaling", "chain-kahan", "multi"],
)
def test_states_keep_their_dtypes_in_a_scan(tx, dtype):
    params = {"w": jnp.ones(4, dtype), "b": jnp.zeros((), dtype)}
    last, _ = run(tx, params, jax.tree.map(jnp.ones_like, params), 3)
    assert {str(x.dtype) for x in jax.tree.leaves(last)} == {dtype}


def test_float16_keeps_its_smallest_numbers():
    small = jnp.array([1e-5, 5e-8, -3e-6])
    np.testing.assert_array_equal(
        jax.jit(lambda x: rounding.nearest(x, jnp.float16))(small), small.astype("float16").astype("float32")
    )


def test_transforms_share_no_noise_and_empty_trees_pass():
    both = rounding.stochastic_rounding(rounding.bfloat16_moments(optax.trace(0.9)))
    state = both.init(ONE)
    keys = {tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in (state.key, state.inner.key, jax.random.key(0))}
    assert len(keys) == 3
    for tx in (both, rounding.dynamic_loss_scaling(), rounding.kahan_summation(), rounding.master_weights()):
        tx.update({}, tx.init({}), {})


def test_only_moments_are_narrowed():
    muon = optax.contrib.muon(1e-2)
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    kept = jax.tree.map(lambda a, b: (a == b).all(), *(jax.tree.leaves(tx.init(params)) for tx in (muon, muon)))
    assert all(kept)
    state = rounding.bfloat16_moments(muon).init(params)
    wide = {x.shape for x in jax.tree.leaves(state.inner) if x.dtype == jnp.float32}
    assert (3, 4) not in wide and (4,) not in wide and len(wide) == 1  # Newton and Schulz's constants
