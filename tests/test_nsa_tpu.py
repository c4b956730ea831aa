"""Native sparse attention's kernels for TPUs: numbers in Pallas's interpreter, and compiled ahead of time by the TPU's compiler."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jrl.attention import nsa, nsa_tpu
from jrl.run.memory import TPUS

RANK_PROMOTION = "allow"  # splash attention promotes
SMALL = nsa.Config(block=16, stride=8, select_block=16, selected=5, window=24)


def arguments(length, heads, kv_heads, dim, value_dim, config, batch=1, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 8)

    def normal(key, heads, dim):
        return jax.random.normal(key, (batch, length, heads, dim), dtype)

    streams = [normal(keys[i], kv_heads, value_dim if i % 2 else dim) for i in range(6)]
    gates = jax.nn.sigmoid(normal(keys[7], heads, 3))
    return (
        nsa.init(jax.random.key(1), config, dim, value_dim),
        normal(keys[6], heads, dim),
        nsa.Streams(*streams),
        gates,
    )


def both(config, args, **options):
    """Answers and gradients, by XLA and by the kernels in the interpreter."""
    found = []
    for implementation in ("xla", "pallas_tpu"):

        def loss(*a, i=implementation):
            out = nsa.attend(*a, config, implementation=i, interpret=True, **options)
            return jnp.sum(jnp.sin(out)), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*args)
        found.append((out, grads))
    return found


@pytest.mark.thorough(1)
@pytest.mark.parametrize(
    "config, length, heads, kv_heads, dim, value_dim, segments",
    [
        (SMALL, 150, 4, 2, 16, 8, None),
        (nsa.Config(32, 16, 64, 4, initial=0, local=1, pooling="mean"), 300, 3, 1, 24, 16, [3, 130, 167]),
        (nsa.Config(8, 8, 128, 3, window=5), 260, 2, 2, 8, 8, None),
        (SMALL, 9, 1, 1, 8, 8, None),
    ],
)
def test_kernels_give_what_xla_gives(config, length, heads, kv_heads, dim, value_dim, segments):
    ids = None if segments is None else jnp.repeat(jnp.arange(len(segments)), jnp.array(segments))[None]
    (out, grads), (kernel_out, kernel_grads) = both(
        config, arguments(length, heads, kv_heads, dim, value_dim, config), segment_ids=ids
    )
    np.testing.assert_allclose(kernel_out, out, atol=2e-6)
    for x, y in zip(jax.tree.leaves(kernel_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(y).max()) + 1e-5)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_padding_changes_nothing(implementation):
    params, *row = arguments(128, 2, 1, 8, 8, SMALL)
    attend = jax.jit(
        lambda row, ids: nsa.attend(params, *row, SMALL, segment_ids=ids, implementation=implementation, interpret=True)
    )
    pads = np.array([0, 1, 3, 5, 8, 13])

    def behind(x):
        return jnp.concatenate([jnp.roll(x, n, axis=1) for n in pads])

    out = attend(jax.tree.map(behind, tuple(row)), jnp.array(np.arange(128)[None] >= pads[:, None], jnp.int32))
    for n, x in zip(pads, out, strict=True):
        np.testing.assert_allclose(x[n:], out[0, : 128 - n], atol=2e-5)


def _lanes(tokens):
    """Bytes of keys and values in float32."""
    return tokens * 2 * nsa_tpu.LANES * 4


@pytest.mark.slow
def test_sums_in_parts_are_the_same(monkeypatch):
    args = arguments(128, 2, 1, 8, 8, SMALL)
    (_, grads), _ = both(SMALL, args)
    room = _lanes(128) + _lanes(32)  # for all tokens, and for the sums of a quarter of them
    monkeypatch.setattr(nsa_tpu, "vmem", lambda: nsa_tpu.SPARE + room)
    _, (_, in_parts) = both(SMALL, args)
    for x, y in zip(jax.tree.leaves(in_parts), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(y).max()) + 1e-5)


@pytest.mark.slow
def test_half_width_and_vmap():
    args = arguments(140, 4, 1, 16, 16, SMALL, batch=2)
    exact = jax.jit(lambda *a: nsa.attend(*a, SMALL))(*args)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), args)

    def one(q, s, g):
        return nsa.attend(half[0], q, s, g, SMALL, implementation="pallas_tpu", interpret=True)

    rows = jax.tree.map(lambda x: x[:, None], half[1:])
    out = jax.jit(jax.vmap(one))(*rows)[:, 0]
    assert out.dtype == jnp.bfloat16
    # Half width picks other blocks now and then: most rows must be near, not all.
    assert (jnp.abs(out.astype(jnp.float32) - exact).max((-1, -2)) < 0.06).mean() > 0.9


@pytest.mark.parametrize(
    "config, dtype, length, why",
    [
        (nsa.Config(select_block=48), jnp.float32, 64, "select_block of 16, 32, 64 or a multiple of 128, got 48"),
        (SMALL, jnp.float16, 64, "takes float32 and bfloat16, got float16"),
        (SMALL, jnp.float32, 2**20, "a key head of 1048576 tokens takes 1024 MiB of VMEM, more than 118"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(config, dtype, length, why):
    args = jax.eval_shape(lambda: arguments(length, 2, 1, 8, 8, config, dtype=dtype))
    with pytest.raises(ValueError, match=f"implementation='pallas_tpu' cannot do this: .*{why}"):
        jax.eval_shape(lambda *a: nsa.attend(*a, config, implementation="pallas_tpu"), *args)


def compiled(chip, args, devices=1, spec=None, config=nsa.Config()):
    """Forward and backward of the kernels, compiled for one chip or several."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost")
    topology = topologies.get_topology_desc(TPUS[chip].topology, platform="tpu").devices
    mesh = Mesh(np.array(topology[:devices]), ("heads",))

    def f(*a):
        return nsa.attend(*a, config, implementation="pallas_tpu")

    if spec is not None:
        heads = PartitionSpec(None, None, spec)
        f = jax.shard_map(
            f, mesh=mesh, in_specs=(PartitionSpec(), heads, heads, heads), out_specs=heads, check_vma=False
        )
        place = (NamedSharding(mesh, PartitionSpec()), *[NamedSharding(mesh, heads)] * 3)
    else:
        place = SingleDeviceSharding(topology[0])
    grad = jax.grad(lambda *a: jnp.sum(f(*a).astype(jnp.float32)), (1, 2, 3))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells the kernels their chip
        lowered = jax.jit(grad, in_shardings=place).lower(*args)
    return lowered.compile()


def shapes(length, heads=64, kv_heads=4, dim=128, value_dim=128, dtype=jnp.bfloat16):
    return jax.eval_shape(
        lambda: arguments(length, heads, kv_heads, dim, value_dim, nsa.Config(), dtype=jnp.dtype(dtype))
    )


def gib(program):
    used = program.memory_analysis()
    return (used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes) / 2**30


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p"])
def test_the_kernels_compile_for_tpus(chip):
    assert gib(compiled(chip, shapes(8192))) < 16


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p"])
def test_64k_tokens_fit_16_gib(chip):
    assert gib(compiled(chip, shapes(65536))) < 16


@pytest.mark.slow
@pytest.mark.parametrize("heads, kv_heads, dim, value_dim", [(4, 4, 64, 64), (8, 2, 192, 128), (32, 1, 256, 256)])
def test_odd_sizes_compile(heads, kv_heads, dim, value_dim):
    compiled("v5e", shapes(1000, heads, kv_heads, dim, value_dim))


@pytest.mark.slow
def test_over_key_heads_nothing_is_communicated():
    program = compiled("v5e", shapes(2048, 16, 4, 64, 64), devices=4, spec="heads").as_text()
    messages = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "all-reduce")
    assert not any(name in program for name in messages)
