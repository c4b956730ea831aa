"""Every kind of attention against one query at a time in float64, and the identities between them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jrl import attention
from jrl.attention import cache, nsa, nsa_cache, platforms
from jrl.attention.flash import Blocks, flash
from jrl.attention.visibility import Rule

attend = jax.jit(
    attention.attend, static_argnames=("causal", "window", "q_offset", "scale", "implementation")
)  # one program where operations one by one would be dozens


def normal(rng, *shape):
    """Of NumPy, whose indexing compiles nothing."""
    return rng.standard_normal(shape).astype(jax.dtypes.canonicalize_dtype(float))


def qkv(batch, length, heads, kv_heads, dim, value_dim, num_keys=None):
    rng, num_keys = np.random.default_rng(0), length if num_keys is None else num_keys
    shapes = [(batch, length, heads, dim), (batch, num_keys, kv_heads, dim), (batch, num_keys, kv_heads, value_dim)]
    return [normal(rng, *shape) for shape in shapes]


def grads(f, *args):
    return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(3 * f(*a))), tuple(range(len(args)))))(*args)


def close(a, b, tolerance=1e-10):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


SEGMENTS = np.array([[0] * 4 + [1] * 3 + [2] * 1 + [3] * 3, [0] * 11])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    "heads, kv_heads, dim, value_dim, options",
    [
        (4, 2, 8, 8, {}),
        (3, 1, 4, 6, {"window": 5}),
        (2, 2, 5, 3, {"causal": False}),
        (4, 2, 8, 8, {"segment_ids": SEGMENTS}),
        (8, 1, 4, 4, {"window": 1, "scale": 0.3}),
    ],
)
def test_dense_attention_and_its_gradients(implementation, heads, kv_heads, dim, value_dim, options):
    with jax.enable_x64(True):
        args = qkv(2, 11, heads, kv_heads, dim, value_dim)
        given = options | {"segment_ids": jnp.array(SEGMENTS)} if "segment_ids" in options else options

        def ours(*a):
            return attend(*a, implementation=implementation, **given)

        def wanted(*a):
            return oracles.dense(*a, **options)

        close(jax.jit(ours)(*args), jax.jit(wanted)(*args))
        close(grads(ours, *args), grads(wanted, *args))


@pytest.mark.thorough(8)
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 7), (16, 5), (64, 64)])
@pytest.mark.parametrize(
    "rule", [Rule(), Rule(window=6), Rule(causal=False), Rule(q_start=9), Rule(k_start=3, k_step=4)]
)
def test_blocks_of_any_size_give_what_dense_gives(rows, columns, rule):
    with jax.enable_x64(True):
        args = qkv(2, 23, 4, 2, 3, 5, 31)

        def ours(*a):
            return flash(*a, None, None, rule, 0.7, Blocks(2 * rows, columns))

        def wanted(*a):
            return attention.dense(*a, None, None, rule, 0.7)

        close(jax.jit(ours)(*args), jax.jit(wanted)(*args))
        close(grads(ours, *args), grads(wanted, *args))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_padding_is_unseen_and_answers_0(implementation):
    q, k, v = qkv(2, 12, 2, 1, 4, 4)
    valid = jnp.arange(12)[None] < jnp.array([[12], [7]])

    def f(q, k, v):
        return attend(q, k, v, valid=valid, causal=False, implementation=implementation)

    out = f(q, k, v)
    assert (out[1, 7:] == 0).all()
    close(out[1:, :7], attend(q[1:, :7], k[1:, :7], v[1:, :7], causal=False), 1e-5)
    dq, dk, dv = grads(f, q, k, v)
    assert (dk[1, 7:] == 0).all() and (dv[1, 7:] == 0).all() and (dq[1, 7:] == 0).all()
    nothing = attend(q, k, v, kv_valid=jnp.zeros((2, 12), bool), implementation=implementation)
    assert (nothing == 0).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_future_changes_nothing_and_a_prefix_is_a_prefix(implementation):
    q, k, v = qkv(1, 40, 4, 2, 8, 8)

    def f(q, k, v):
        return attend(q, k, v, window=16, implementation=implementation)

    whole = f(q, k, v)

    def later(x):
        return np.where(np.arange(40)[:, None, None] < 25, x, np.float32(7))

    np.testing.assert_array_equal(f(later(q), later(k), later(v))[:, :25], whole[:, :25])
    close(f(q[:, :25], k[:, :25], v[:, :25]), whole[:, :25], 1e-6)
    last = attend(q[:, 39:], k, v, window=16, q_offset=39, implementation=implementation)
    close(last, whole[:, 39:], 1e-6)


def test_a_window_of_one_returns_the_value():
    q, k, v = qkv(1, 9, 2, 2, 4, 4)
    close(attend(q, k, v, window=1), v, 1e-6)
    close(attend(q, k, v, window=9), attend(q, k, v), 1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_half_width_stays_near(implementation):
    args = qkv(2, 64, 4, 2, 32, 32)
    exact = attend(*args)
    half = attend(*(x.astype(jnp.bfloat16) for x in args), implementation=implementation)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(float), exact, atol=0.05)


def test_under_vmap_it_is_the_same():
    q, k, v = qkv(3, 20, 2, 1, 4, 4)

    def f(q, k, v):
        return attend(q[None], k[None], v[None], implementation="xla")[0]

    close(jax.vmap(f)(q, k, v), attend(q, k, v), 1e-6)


@pytest.mark.parametrize("options", [{}, {"window": 50}, {"segment_ids": jnp.arange(128)[None] // 48}])
def test_splash_attention_gives_the_same(options):
    q, k, v = qkv(1, 128, 4, 2, 32, 32)
    ids = options.get("segment_ids")
    rule = Rule(window=options.get("window"))

    def ours(*a):
        return platforms.splash(*a, ids, ids, rule, 0.2, interpret=True)

    def wanted(*a):
        return attention.dense(*a, ids, ids, rule, 0.2)

    with jax.numpy_rank_promotion("allow"):
        close(jax.jit(ours)(q, k, v), jax.jit(wanted)(q, k, v), 1e-5)
        close(grads(ours, q, k, v), grads(wanted, q, k, v), 1e-4)


# Native sparse attention

nsa_attend = jax.jit(nsa.attend, static_argnums=4, static_argnames="chunk")
SMALL = nsa.Config(block=4, stride=2, select_block=4, selected=4, window=6)


def sparse(batch, length, heads, kv_heads, dim, value_dim, config):
    rng = np.random.default_rng(0)
    q = normal(rng, batch, length, heads, dim)
    widths = [dim, value_dim] * 3
    streams = nsa.Streams(*(normal(rng, batch, length, kv_heads, width) for width in widths))
    gates = 1 / (1 + np.exp(-normal(rng, batch, length, heads, 3)))
    shapes = jax.eval_shape(lambda: nsa.init(jax.random.key(0), config, dim, value_dim, 5))
    return jax.tree.map(lambda x: normal(rng, *x.shape) / 4, shapes), q, streams, gates


@pytest.mark.thorough(1)
@pytest.mark.parametrize(
    "config, heads, kv_heads, length, segments",
    [
        (dataclasses.replace(SMALL, window=1), 8, 1, 3, None),
        (SMALL, 4, 2, 23, None),
        (dataclasses.replace(SMALL, block=4, stride=4, pooling="mean", initial=0, local=1), 2, 2, 18, None),
        (dataclasses.replace(SMALL, block=2, select_block=8, selected=3), 3, 1, 30, None),
        (SMALL, 2, 1, 21, [5, 1, 2, 13]),
    ],
)
def test_sparse_attention_and_its_gradients(config, heads, kv_heads, length, segments):
    with jax.enable_x64(True):
        args = sparse(2 if segments else 1, length, heads, kv_heads, 4, 3, config)
        ids = None
        if segments:
            ids = np.repeat(np.arange(len(segments)), segments)
            ids = np.stack([ids, np.zeros(length, int)])

        def ours(*a):
            return nsa.attend(*a, config, segment_ids=None if ids is None else jnp.array(ids), chunk=8)

        def wanted(params, *rest, known=None):
            def phi(name, block):
                return nsa.phi(params.get(name), block[None])[0]

            return oracles.nsa(phi, *rest, config, ids, known)

        out, chosen = wanted(*args)
        close(jax.jit(ours)(*args), out)
        close(grads(ours, *args), grads(lambda *a: wanted(*a, known=chosen)[0], *args))


def test_phi_by_hand():
    params = nsa.init(jax.random.key(0), SMALL, 3, 3, 2)["k"]
    block = jnp.arange(12.0).reshape(4, 3)
    x = (block + params["position"]).reshape(-1) @ params["w_in"] + params["b_in"]
    close(nsa.phi(params, block), (x / (1 + jnp.exp(-x))) @ params["w_out"] + params["b_out"], 1e-5)
    close(nsa.phi(None, block), block.mean(0), 1e-6)


def gate(shape, branch):
    return np.broadcast_to(np.eye(3, dtype=np.float32)[branch], (*shape, 3))


def test_selection_of_every_block_is_dense_attention():
    _, q, streams, _ = sparse(1, 33, 4, 2, 8, 8, SMALL)
    config = dataclasses.replace(SMALL, selected=9)
    out = nsa_attend(nsa.init(jax.random.key(0), config, 8, 8), q, streams, gate(q.shape[:3], 1), config)
    close(out, attend(q, streams.k_select, streams.v_select), 1e-5)


@pytest.mark.slow
def test_compression_of_single_tokens_is_dense_attention():
    _, q, streams, _ = sparse(1, 20, 4, 2, 8, 8, SMALL)
    config = nsa.Config(block=1, stride=1, select_block=4, selected=4, pooling="mean")
    out = nsa_attend({}, q, streams, gate(q.shape[:3], 0), config)
    close(out, attend(q, streams.k_compress, streams.v_compress), 1e-5)


@pytest.mark.slow
def test_a_window_as_long_as_the_sequence_is_dense_attention():
    params, q, streams, _ = sparse(1, 20, 4, 2, 8, 8, SMALL)
    config = dataclasses.replace(SMALL, window=20)
    out = nsa_attend(params, q, streams, gate(q.shape[:3], 2), config)
    close(out, attend(q, streams.k_window, streams.v_window), 1e-5)


@pytest.mark.slow
def test_as_a_gpu_computes_it_it_is_the_same(monkeypatch):
    params, q, streams, gates = sparse(2, 41, 4, 2, 8, 8, SMALL)

    def both(params, q, streams):
        dense = attend(q, *streams[:2], implementation="xla")
        return nsa.attend(params, q, streams, gates, SMALL), dense

    def loss(*a):
        return sum((x**2).sum() for x in both(*a))

    small = jax.jit(both)(params, q, streams), jax.jit(jax.grad(loss))(params, q, streams)
    monkeypatch.setattr(platforms, "wide", lambda: True)
    jax.clear_caches()
    close(small, (jax.jit(both)(params, q, streams), jax.jit(jax.grad(loss))(params, q, streams)), 1e-5)


def test_sparse_attention_does_not_see_the_future():
    params, q, streams, gates = sparse(1, 50, 4, 2, 8, 8, SMALL)

    def later(x):
        return np.where(np.arange(50)[:, None, None] < 30, x, np.float32(5))

    whole = nsa_attend(params, q, streams, gates, SMALL, chunk=16)
    changed = nsa_attend(params, *jax.tree.map(later, (q, streams)), gates, SMALL, chunk=16)
    np.testing.assert_array_equal(whole[:, :30], changed[:, :30])

    def first(x):
        return x[:, :30]

    close(nsa_attend(params, *jax.tree.map(first, (q, streams, gates)), SMALL), whole[:, :30], 1e-5)


@pytest.mark.slow
def test_before_the_first_block_is_over_compression_answers_0():
    params, q, streams, _ = sparse(1, 10, 2, 1, 4, 4, SMALL)
    out = nsa_attend(params, q, streams, gate(q.shape[:3], 0), SMALL)
    assert (out[:, :3] == 0).all() and (out[:, 3:] != 0).all()


def test_ties_go_to_the_lowest_block():
    config = nsa.Config(block=2, stride=2, select_block=2, selected=4, window=2)
    importance = jnp.zeros((1, 1, 1, 8))
    chosen = nsa.select(importance, jnp.array([[7]]), jnp.array([[0]]), 8, config)
    assert sorted(chosen[0, 0, 0].tolist()) == [0, 1, 6, 7]
    few = nsa.select(importance, jnp.array([[1]]), jnp.array([[0]]), 8, config)
    assert sorted(few[0, 0, 0].tolist()) == [0, 1, 8, 8]


# Decoding


@pytest.mark.parametrize("window, capacity", [(None, 20), (6, 20), (6, 6), (1, 1)])
def test_a_decode_step_is_a_row_of_the_full_sequence(window, capacity):
    q, k, v = qkv(2, 20, 4, 2, 8, 6)
    whole = attend(q, k, v, window=window)
    empty = cache.init(2, capacity, 2, 8, 6)

    def step(memory, x):
        t, q_t, k_t, v_t = x
        memory = cache.write(memory, k_t, v_t, t)
        return memory, cache.decode_step(q_t, memory, t, window=window)

    rows = (jnp.arange(20), *(np.moveaxis(x, 1, 0) for x in (q, k, v)))
    memory, out = jax.lax.scan(step, empty, rows)
    close(np.moveaxis(out, 0, 1), whole, 1e-5)
    jax.tree.map(np.testing.assert_array_equal, cache.fill(empty, k, v), memory)
    each = jnp.array([19, 19])
    close(
        cache.decode_step(q[:, 19], cache.write(memory, k[:, 19], v[:, 19], each), each, window=window), out[-1], 1e-6
    )


def test_decoding_sees_its_episode_alone():
    q, k, v = qkv(1, 12, 2, 1, 4, 4)
    memory = cache.fill(cache.init(1, 12, 1, 4), k, v)
    alone = attend(q[:, 7:], k[:, 7:], v[:, 7:])
    close(cache.decode_step(q[:, 11], memory, jnp.array(11), start=7), alone[:, -1], 1e-5)


@pytest.mark.thorough(2)
@pytest.mark.parametrize("start", [0, 9])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(SMALL, block=2, select_block=8, selected=3),
        dataclasses.replace(SMALL, pooling="mean"),
    ],
)
def test_a_sparse_decode_step_is_a_row_of_the_full_sequence(config, start):
    params, q, streams, gates = sparse(2, 34, 4, 2, 8, 6, config)
    ids = jnp.broadcast_to(jnp.arange(34)[None] >= start, (2, 34)).astype(jnp.int32)
    whole = nsa_attend(params, q, streams, gates, config, segment_ids=ids)

    def step(memory, x):
        t, q_t, gates_t, streams_t = x
        memory = nsa_cache.write(params, memory, streams_t, t, config, start=start)
        return memory, nsa_cache.decode_step(q_t, gates_t, memory, t, config, start=start)

    rows = (jnp.arange(34), *jax.tree.map(lambda x: np.moveaxis(x, 1, 0), (q, gates, streams)))
    empty = nsa_cache.init(config, 2, 34, 2, 8, 6)
    memory, out = jax.jit(lambda: jax.lax.scan(step, empty, rows))()
    close(np.moveaxis(out, 0, 1)[:, start:], whole[:, start:], 2e-5)
    filled = jax.jit(nsa_cache.fill, static_argnums=3)(params, empty, streams, config, start=start)
    close(filled, memory, 1e-5)
    decode = jax.jit(nsa_cache.decode_step, static_argnums=4)
    close(decode(q[:, 33], gates[:, 33], memory, jnp.array([33, 33]), config, start=start), out[-1], 1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda q, k, v: attention.attend(q[0], k, v), r"takes \[batch, seq, heads, head_dim\]; got q \[8, 4, 16\]"),
        (lambda q, k, v: attention.attend(q, k[:, :, :, :8], v), "must have one head_dim"),
        (lambda q, k, v: attention.attend(q[:, :, :3], k, v), "must be a multiple of that of key heads"),
        (lambda q, k, v: attention.attend(q, k, v, window=0), "window must be an integer of at least 1; got 0"),
        (lambda q, k, v: attention.attend(q, k, v, window=4, causal=False), "window needs causal=True"),
        (lambda q, k, v: attention.attend(q, k, v, implementation="triton"), "must be one of xla, pallas_tpu, cudnn"),
        (lambda q, k, v: attention.attend(q, k, v, implementation="pallas_tpu"), "a multiple of 128 queries, got 8"),
        (
            lambda q, k, v: attention.attend(q, k, v, implementation="cudnn"),
            "it takes float16 and bfloat16, got float32"
            if jax.default_backend() == "gpu"
            else "it needs an NVIDIA GPU, and this is a cpu",
        ),
        (
            lambda q, k, v: attention.attend(q, k, v, segment_ids=jnp.zeros((2, 8))),
            r"must be int \[1, 8\]; got float32",
        ),
        (lambda q, k, v: attention.attend(q[:, :0], k, v), "attention needs at least one of each; got q .1, 0, 4, 16."),
        (lambda q, k, v: nsa.Config(block=24), "nsa.block must be a multiple of nsa.stride = 16; got 24"),
        (lambda q, k, v: nsa.Config(selected=2), "nsa.selected must be at least nsa.initial \\+ nsa.local = 3; got 2"),
        (
            lambda q, k, v: nsa.attend({}, q, nsa.shared(k, v), jnp.ones((1, 8, 4)), SMALL),
            r"gates must be \[1, 8, 4, 3\]",
        ),
    ],
)
def test_wrong_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*qkv(1, 8, 4, 2, 16, 16))


@pytest.mark.thorough(2)
@pytest.mark.parametrize("axis", ["batch", "heads"])
@pytest.mark.parametrize("kind", ["xla", "reference", "nsa"])
def test_over_devices_it_is_the_same(kind, axis):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    spec = jax.sharding.PartitionSpec(*(("x",) if axis == "batch" else (None, None, "x")))
    params, q, streams, gates = sparse(2, 40, 4, 2, 8, 8, SMALL)

    def f(q, streams, gates):
        if kind == "nsa":
            return nsa.attend(params, q, streams, gates, SMALL, chunk=16)
        return attend(q, streams[0], streams[1], implementation=kind)

    over = jax.shard_map(f, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec)
    close(jax.jit(over)(q, streams, gates), jax.jit(f)(q, streams, gates), 1e-5)
    close(grads(over, q, streams, gates), grads(f, q, streams, gates), 1e-4)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("heads, kv_heads, dim, value_dim", [(32, 1, 64, 64), (2, 2, 256, 32), (4, 1, 192, 128)])
def test_wide_heads_and_large_groups(heads, kv_heads, dim, value_dim):
    with jax.enable_x64(True):
        args = qkv(1, 13, heads, kv_heads, dim, value_dim)
        close(attend(*args, implementation="xla"), oracles.dense(*args))
        params, q, streams, gates = sparse(1, 13, heads, kv_heads, dim, value_dim, SMALL)

        def phi(name, block):
            return nsa.phi(params[name], block[None])[0]

        close(nsa_attend(params, q, streams, gates, SMALL), oracles.nsa(phi, q, streams, gates, SMALL)[0])


@pytest.mark.slow
def test_sparse_attention_under_vmap_remat_and_half_width():
    args = sparse(2, 30, 4, 2, 16, 16, SMALL)

    def f(q, s, g):
        return nsa.attend(args[0], q[None], jax.tree.map(lambda x: x[None], s), g[None], SMALL)[0]

    whole = nsa_attend(*args, SMALL)
    close(jax.jit(jax.vmap(f))(*args[1:]), whole, 1e-5)

    def loss(f):
        return jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(f(*a, SMALL)))))(args)

    close(loss(jax.checkpoint(nsa.attend, static_argnums=4)), loss(nsa.attend), 1e-5)
    half = nsa_attend(*jax.tree.map(lambda x: x.astype(jnp.bfloat16), args), SMALL)
    assert half.dtype == jnp.bfloat16
    near = jnp.abs(half.astype(jnp.float32) - whole).max((-1, -2)) < 0.1
    assert near.mean() > 0.9  # here and there it selects other blocks


@pytest.mark.slow
def test_no_intermediate_is_nan_where_nothing_is_seen():
    q, k, v = qkv(2, 12, 2, 1, 4, 4)
    with jax.debug_nans(True):
        none = jnp.zeros((2, 12), bool)
        for implementation in ("reference", "xla"):
            assert (attend(q, k, v, kv_valid=none, implementation=implementation) == 0).all()
        memory = nsa_cache.init(SMALL, 2, 12, 1, 4)
        nsa_cache.decode_step(q[:, 0], jnp.ones((2, 2, 3)), memory, jnp.int32(0), SMALL)


def test_it_lowers_for_a_gpu():
    q = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    gates = jax.ShapeDtypeStruct((1, 256, 4, 3), jnp.bfloat16)
    params = jax.eval_shape(lambda: nsa.init(jax.random.key(0), SMALL, 64, 64))

    def loss(*a):
        return jnp.sum(nsa.attend(a[0], a[1], nsa.shared(*a[2:4]), a[4], SMALL).astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(params, q, k, k, gates)
    assert "stablehlo.dot_general" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda q, k, v: nsa.attend({}, q, nsa.shared(k, v), jnp.ones((1, 8, 4, 3)), SMALL),
            "nsa.pooling=mlp does not",
        ),
        (
            lambda q, k, v: nsa.attend(
                nsa.init(jax.random.key(0), SMALL, 16, 16),
                q,
                nsa.shared(k, v),
                jnp.ones((1, 8, 4, 3)),
                SMALL,
                segment_ids=jnp.zeros((1, 8)),
            ),
            r"token segment_ids must be int \[1, 8\]; got float32",
        ),
        (lambda q, k, v: cache.decode_step(q[:, 0], cache.init(2, 8, 2, 16), jnp.int32(0)), "does not fit the cache"),
        (lambda q, k, v: cache.decode_step(q[:, 0], cache.init(1, 8, 2, 16), jnp.int32(0), window=0), "window must be"),
        (lambda q, k, v: cache.write(cache.init(1, 8, 4, 16), k[:, 0], v[:, 0], jnp.int32(0)), "a cache of"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*qkv(1, 8, 4, 2, 16, 16))


@pytest.mark.parametrize("position", [jnp.int32(6), jnp.array([6, 1, 3])])
def test_a_token_is_written_among_the_rows_of_all_layers(position):
    rows, new = jax.random.normal(jax.random.key(0), (4, 3, 5, 2)), jnp.ones((3, 2))
    written = cache.put(cache.Layer(rows, jnp.int32(2)), new, position)
    np.testing.assert_array_equal(cache.seen(written), cache.put(rows[2], new, position))
    np.testing.assert_array_equal(written.rows[jnp.array([0, 1, 3])], rows[jnp.array([0, 1, 3])])
