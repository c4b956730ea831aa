"""Attention's kernels for Hopper GPUs, in the interpreter of Pallas's GPU kernels, against XLA and the reference."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import interpreted

from jrl.attention import attend, nsa, nsa_hopper, nsa_selected, nsa_selected_hopper, spans_hopper
from jrl.attention.nsa_branches import compressed_attention, select
from jrl.numerics import host

RANK_PROMOTION = "allow"  # the interpreter promotes ranks
pytestmark = pytest.mark.skipif(jax.__version_info__ < host.KERNELS_NEED_JAX, reason="the kernels need a newer JAX")
RNG = np.random.default_rng(0)


def normal(*shape, dtype=jnp.bfloat16):
    return jnp.array(RNG.normal(size=shape), dtype)


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def with_gradients(function, args):
    """The output of a function, and the gradients of a sum of it with fixed weights."""

    def both(*args):
        out, back = jax.vjp(function, *args)
        weight = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        return out, *back(weight.astype(out.dtype))

    return jax.jit(both)(*args)


def close(given, wanted, relative=0.02):
    for x, y in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        assert np.abs(x - y).max() <= relative * np.abs(y).max()


DENSE = {
    "not causal, with padding": (100, 130, 64, 64, {"causal": False, "kv_valid": RNG.random((2, 130)) < 0.7}),
    "behind 30 tokens, with a window": (100, 130, 64, 128, {"q_offset": 30, "window": 40}),
    "segments in no order": (
        100,
        130,
        64,
        64,
        {
            "q_offset": 30,
            "segment_ids": RNG.integers(0, 3, (2, 100)),
            "kv_segment_ids": RNG.integers(0, 3, (2, 130)),
            "valid": RNG.random((2, 100)) < 0.7,
        },
    ),
    "four tiles of keys": (300, 300, 192, 128, {"segment_ids": np.repeat([[0, 1, 4]] * 2, [40, 200, 60], axis=1)}),
}


@pytest.mark.parametrize("name", [n if "no order" in n else pytest.param(n, marks=pytest.mark.slow) for n in DENSE])
def test_dense_attention_is_the_references(name):
    length, num_keys, dim, width, options = DENSE[name]
    options = {k: jnp.array(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    args = normal(2, length, 4, dim), normal(2, num_keys, 2, dim), normal(2, num_keys, 2, width)
    with interpreted():
        found = with_gradients(lambda *a: attend(*a, implementation="mosaic_gpu", **options), args)
    close(found, with_gradients(lambda *a: attend(*a, implementation="reference", **options), wide(args)))


def sparse_arguments(length, heads, kv_heads, dim, width, config, dtype=jnp.bfloat16):
    streams = [normal(1, length, kv_heads, width if i % 2 else dim, dtype=dtype) for i in range(6)]
    gates = jax.nn.sigmoid(normal(1, length, heads, 3, dtype=dtype))
    params = nsa.init(jax.random.key(1), config, dim, width)
    return params, normal(1, length, heads, dim, dtype=dtype), nsa.Streams(*streams), gates


SMALL = nsa.Config(selected=3, window=20, pooling="mean")


@pytest.mark.parametrize(
    "config, length, heads, kv_heads, dim, width, segments, dtype",
    [
        (SMALL, 150, 2, 1, 64, 64, None, jnp.bfloat16),
        pytest.param(nsa.Config(selected=4, window=70), 300, 4, 2, 64, 64, None, jnp.float16, marks=pytest.mark.slow),
        pytest.param(
            nsa.Config(32, 32, selected=4), 300, 3, 1, 64, 128, [3, 130, 167], jnp.bfloat16, marks=pytest.mark.slow
        ),
        pytest.param(
            nsa.Config(16, 8, selected=2, local=1), 70, 64, 1, 128, 64, None, jnp.bfloat16, marks=pytest.mark.slow
        ),
    ],
)
def test_sparse_attention_is_that_of_xla(config, length, heads, kv_heads, dim, width, segments, dtype):
    ids = None if segments is None else jnp.repeat(jnp.arange(len(segments)), jnp.array(segments))[None]
    params, *args = sparse_arguments(length, heads, kv_heads, dim, width, config, dtype)

    def function(implementation):
        return lambda *a: nsa.attend(params, *a, config, segment_ids=ids, implementation=implementation)

    with interpreted():
        found = with_gradients(function("mosaic_gpu"), args)
    close(found, with_gradients(function("xla"), args))


def chosen_arguments(length, behind, config, group=2, dim=64):
    """Compression's arguments for the last queries of a sequence, and the blocks of selection."""
    tokens = behind + length
    number, blocks = config.num_compressed(tokens), -(-tokens // 64)
    q, k, v = normal(1, length, group, dim), normal(1, number, 1, dim), normal(1, number, 1, dim)
    first = jnp.arange(number, dtype=jnp.int32)[None] * config.stride
    t = behind + jnp.arange(length, dtype=jnp.int32)[None]
    start = jnp.zeros_like(t)
    return q, k, v, first, (t, start, t // 64, start), blocks


@pytest.mark.parametrize("config", [nsa.Config(), nsa.Config(block=16, stride=8, selected=5, initial=2, local=1)])
def test_the_best_blocks_of_many_are_chosen(config):
    q, k, v, first, queries, blocks = chosen_arguments(128, 64 * 78, config)
    with interpreted():
        out, chosen = jax.jit(lambda: nsa_hopper.compressed_attention(q, k, v, first, queries, blocks, config, 0.125))()
    t, start, own, oldest = queries
    wanted, importance = compressed_attention(q, k, v, first, t, start, config, 0.125)
    close(out, wanted)
    np.testing.assert_array_equal(chosen, select(importance, own, oldest, blocks, config))


@pytest.mark.parametrize(
    "group", [16, pytest.param(3, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)]
)
def test_selection_over_chunks_and_pieces_is_that_of_xla(group, monkeypatch, capfd):
    monkeypatch.setattr(nsa_selected_hopper, "_chunk", lambda *_: 64)
    monkeypatch.setattr(nsa_selected_hopper, "PIECE", 2)
    length, blocks = 100, 3
    t = jnp.arange(length, dtype=jnp.int32)[None]
    start = jnp.maximum(t - 70, 0).at[0, 5].set(50)  # the sixth query sees nothing
    token = jnp.arange(blocks * 64, dtype=jnp.int32).reshape(1, blocks, 64)
    none = RNG.random((1, 2, length)) < 0.3
    own = np.where(none | (np.asarray(t)[:, None] < 64), blocks, np.asarray(t)[:, None] // 64)
    chosen = jnp.array(np.stack([np.zeros_like(own), own], axis=-1), jnp.int32)
    args = normal(1, 2, length, group, 64), normal(1, 2, blocks, 64, 64), normal(1, 2, blocks, 64, 128)

    def function(attention):
        return lambda q, k, v: attention(q, k, v, token, chosen, t, start, 0.125)

    with interpreted(detect_races=True, num_tma_threads_per_device=1):
        found = with_gradients(function(nsa_selected_hopper.selected_attention), args)
    assert "RACE" not in capfd.readouterr().out
    assert not np.asarray(found[0], np.float32)[0, :, 5].any()
    close(found, with_gradients(function(nsa_selected.selected_attention), args))


@pytest.mark.slow
def test_float16_holds_what_pairs_leave():
    """Values and gradients whose sums over a block's tokens do not fit in float16, where their means do."""
    params, q, streams, gates = sparse_arguments(130, 2, 1, 64, 64, SMALL, jnp.float16)
    streams = streams._replace(v_select=jnp.full_like(streams.v_select, 1500))

    def function(implementation):
        return lambda q, s: 2000 * nsa.attend(params, q, s, gates, SMALL, implementation=implementation)

    with interpreted():
        found = with_gradients(function("mosaic_gpu"), (q, streams))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found[1:]))
    close(found[1:], with_gradients(function("xla"), (q, streams))[1:])


def test_only_the_last_axis_of_a_grid_grows_with_the_sequence(monkeypatch):
    """CUDA takes 65,535 blocks along all others."""
    grids = []

    def kernel(*args, grid, **options):
        grids.append(grid)
        return made(*args, grid=grid, **options)

    made = plgpu.kernel
    monkeypatch.setattr(plgpu, "kernel", kernel)
    short = sparse_arguments(1, 64, 1, 64, 64, LONG)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, 2**17, *x.shape[2:]), x.dtype), short)
    with host.traced_for("gpu"):
        for function in (sparse_attention, lambda *a: dense_attention(a[1], *a[2][:2])):
            jax.eval_shape(jax.grad(lambda *a, f=function: f(*a).astype(jnp.float32).sum(), 1), *args)
    assert max(grid[-1] for grid in grids) > 65535 and len(grids) >= 9
    assert all(n < 1000 for grid in grids for n in grid[:-1])


LONG = nsa.Config(selected=64, pooling="mean")


def sparse_attention(*args):
    return nsa.attend(*args, LONG, implementation="mosaic_gpu")


def dense_attention(q, k, v):
    return attend(q, k, v, segment_ids=jnp.zeros(q.shape[:2], jnp.int32), implementation="mosaic_gpu")


def test_gradients_have_the_axes_of_a_shard_map():
    q, k, v = normal(1, 70, 2, 64), normal(1, 70, 1, 64), normal(1, 70, 1, 64)
    _, _, _, gates = sparse_arguments(70, 2, 1, 64, 64, SMALL)
    mesh, rows = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",)), jax.sharding.PartitionSpec("rows")
    functions = (
        lambda q, k, v: attend(q, k, v, implementation="mosaic_gpu"),
        lambda q, k, v: nsa.attend({}, q, nsa.shared(k, v), gates, SMALL, implementation="mosaic_gpu"),
    )
    with interpreted():
        for function in functions:

            def loss(*args, function=function):
                return function(*args).astype(jnp.float32).sum()

            grads = jax.shard_map(jax.grad(loss, (0, 1, 2)), mesh=mesh, in_specs=(rows,) * 3, out_specs=(rows,) * 3)
            assert [x.shape for x in jax.eval_shape(grads, q, k, v)] == [q.shape, k.shape, v.shape]


def test_under_vmap_rows_are_those_of_each():
    q, k, v = normal(3, 1, 70, 2, 64), normal(1, 70, 1, 64), normal(3, 1, 70, 1, 64)
    with interpreted():
        function = jax.jit(lambda q, v: attend(q, k, v, implementation="mosaic_gpu"))
        together = jax.jit(jax.vmap(function))(q, v)
        alone = [function(*row) for row in zip(q, v, strict=True)]
    np.testing.assert_array_equal(wide(together), wide(jnp.stack(alone)))


def test_a_hopper_gpu_takes_the_kernels_where_they_can(monkeypatch):
    args = jax.eval_shape(lambda: sparse_arguments(128, 2, 1, 64, 64, nsa.Config()))
    assert nsa.choose(None, *args[1:3], nsa.Config()) == "xla"
    with host.traced_for("gpu"):
        assert nsa.choose(None, *args[1:3], nsa.Config()) == "mosaic_gpu"
        assert nsa.choose(None, *args[1:3], nsa.Config(select_block=32)) == "xla"
        with jax.enable_x64(True):
            assert nsa.choose(None, *args[1:3], nsa.Config()) == "xla"
        monkeypatch.setenv("JRL_KERNELS", "xla")
        assert nsa.choose(None, *args[1:3], nsa.Config()) == "xla"


@pytest.mark.parametrize(
    "config, dims, dtype, why",
    [
        (nsa.Config(select_block=32), (64, 64), jnp.bfloat16, "select_block of 64, got 32"),
        (nsa.Config(), (64, 64), jnp.float32, "takes float16 and bfloat16, one for all, got float32"),
        (nsa.Config(), (64, 80), jnp.float16, "heads of width 64, 128, 192, got 64 and 80"),
        (nsa.Config(selected=65), (64, 64), jnp.float16, "at most 64 selected blocks, got 65"),
        (nsa.Config(block=64, stride=4), (128, 128), jnp.float16, "31 compressed blocks .* take 528 KiB of shared"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(config, dims, dtype, why):
    args = jax.eval_shape(lambda: sparse_arguments(128, 2, 1, *dims, config, dtype))
    with host.traced_for("gpu"), pytest.raises(ValueError, match=f"'mosaic_gpu' cannot do this: .*{why}"):
        jax.eval_shape(lambda *a: nsa.attend(*a, config, implementation="mosaic_gpu"), *args)


def test_no_kernels_where_there_is_no_such_gpu():
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot do this: it needs an NVIDIA Hopper GPU"):
        attend(*(normal(1, 64, 1, 64) for _ in range(3)), implementation="mosaic_gpu")


def test_tiles_are_visited_where_a_row_sees_a_key():
    """A window of 64 tokens over tiles of 64 rows and keys: two tiles each, of which none is seen whole."""
    at = jnp.arange(256, dtype=jnp.int32)[None]
    same = jnp.zeros_like(at)
    rows, keys = spans_hopper.Rows(at - 63, at, same), spans_hopper.Keys(at, at, same)
    seen = np.asarray(spans_hopper.visits(rows, keys, 64, 64))[0]
    assert seen[:, :2].tolist() == [[0, 1], [0, 2], [1, 3], [2, 4]]
    assert (seen[:, 2] >= seen[:, 1]).all() or (seen[:, 2] == seen[:, 3]).all()
    of_keys = np.asarray(spans_hopper.visits(rows, keys, 64, 64, of_keys=True))[0]
    assert of_keys[:, :2].tolist() == [[0, 2], [1, 3], [2, 4], [3, 4]]
    whole = np.asarray(spans_hopper.visits(rows._replace(begin=same), keys, 64, 64))[0]
    assert whole[:, :2].tolist() == [[0, 1], [0, 2], [0, 3], [0, 4]]
    assert whole[1:, 2:].tolist() == [[0, 1], [0, 2], [0, 3]]
