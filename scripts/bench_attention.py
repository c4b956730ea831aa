"""Time and memory of every kind of attention, side by side in one run.

    bash scripts/bench_attention                          forward and backward at 1k to 16k tokens, decoding at 8k to 64k
    bash scripts/bench_attention --lengths 2048 --decode 65536 --repeats 5
    bash scripts/bench_attention --chips v5e              memory on a TPU by its compiler, at 8k, 32k and 64k (needs libtpu)

Each is compiled once, then timed; the figure is the best of --repeats, and the order alternates, since a shared machine
drifts. Memory is what the compiler reserves besides arguments and results. A kind that needs more than --memory-gib is
left out. It leaves attention.csv and attention.png in the folder.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jrl import attention, checks
from jrl.attention import cache, nsa, nsa_cache
from jrl.run import plot, report
from jrl.run.memory import TPUS

Array = jax.Array
SPARSE = nsa.Config()


@dataclass(frozen=True)
class Args:
    """Measure attention.

    Attributes:
        lengths: tokens of a sequence.
        decode: tokens before the one that is decoded.
        heads: query heads.
        kv_heads: key heads.
        head_dim: of keys and values.
        repeats: measurements, of which the best counts.
        memory_gib: leave out what needs more.
        kinds: of dense, jax, blocks, nsa (and splash, on a TPU).
        chips: compile for these TPUs, of v5e, v6e, v5p, and print the memory instead.
        folder: where the table and the plot go.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    decode: tuple[int, ...] = (8192, 16384, 32768, 65536)
    heads: int = 16
    kv_heads: int = 1
    head_dim: int = 64
    repeats: int = 3
    memory_gib: float = 8.0
    kinds: tuple[str, ...] = ("dense", "jax", "blocks", "nsa")
    chips: tuple[str, ...] = ()
    folder: Path = Path("runs/attention")


def inputs(args: Args, length: int, dtype: Any = jnp.float32) -> tuple[Any, ...]:
    """Shapes of queries, keys, values, gates, and phi's parameters."""
    shape = lambda heads, width: jax.ShapeDtypeStruct((1, length, heads, width), dtype)  # noqa: E731
    phi = jax.eval_shape(lambda: nsa.init(jax.random.key(0), SPARSE, args.head_dim, args.head_dim))
    q, kv = shape(args.heads, args.head_dim), shape(args.kv_heads, args.head_dim)
    return q, kv, kv, shape(args.heads, 3), phi


def functions() -> dict[str, Callable[..., Array]]:
    """Each kind as ``(q, k, v, gates, phi) -> out``."""

    def sparse(q: Array, k: Array, v: Array, gates: Array, phi: Any) -> Array:
        return nsa.attend(phi, q, nsa.shared(k, v), gates, SPARSE)

    return {
        "dense": lambda q, k, v, gates, phi: attention.attend(q, k, v, implementation="reference"),
        "jax": lambda q, k, v, gates, phi: jax.nn.dot_product_attention(q, k, v, is_causal=True),
        "blocks": lambda q, k, v, gates, phi: attention.attend(q, k, v, implementation="xla"),
        "splash": lambda q, k, v, gates, phi: attention.attend(q, k, v, implementation="pallas_tpu"),
        "nsa": sparse,
    }


def directions(function: Callable[..., Array]) -> dict[str, Callable[..., Any]]:
    """The function, and the function with its gradients."""

    def both(*args: Any) -> Any:
        return jax.value_and_grad(lambda *a: jnp.sum(function(*a).astype(jnp.float32)), (0, 1, 2))(*args)

    return {"forward": function, "forward and backward": both}


def fill(shapes: Any) -> Any:
    """Random numbers in these shapes."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(tree, [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])


def compare(name: str, programs: dict[str, tuple[Callable[..., Any], Any]], args: Args) -> list[dict[str, Any]]:
    """Rows of a table: seconds of each program, the best of several in alternating order, and GiB that it needs."""
    ready, rows = {}, {}
    for kind, (function, shapes) in programs.items():
        compiled = jax.jit(function).lower(*shapes).compile()
        used: Any = compiled.memory_analysis()
        gib = used.temp_size_in_bytes / 2**30
        rows[kind] = {"what": name, "kind": kind, "seconds": "", "GiB": f"{gib:.3f}"}
        if gib <= args.memory_gib:
            ready[kind] = (compiled, fill(shapes))
            jax.block_until_ready(compiled(*ready[kind][1]))
    best = dict.fromkeys(ready, np.inf)
    for i in range(args.repeats):
        for kind in ready if i % 2 == 0 else reversed(list(ready)):
            function, numbers = ready[kind]
            begin = time.perf_counter()
            jax.block_until_ready(function(*numbers))
            best[kind] = min(best[kind], time.perf_counter() - begin)
    for kind, seconds in best.items():
        rows[kind]["seconds"] = f"{seconds:.4f}"
    return list(rows.values())


def decoders(args: Args, length: int) -> dict[str, tuple[Callable[..., Array], Any]]:
    """A decode step behind ``length`` tokens with each cache."""
    t = length - 1
    q = jax.ShapeDtypeStruct((1, args.heads, args.head_dim), jnp.float32)
    gates = jax.ShapeDtypeStruct((1, args.heads, 3), jnp.float32)
    full = jax.eval_shape(lambda: cache.init(1, length, args.kv_heads, args.head_dim))
    sparse = jax.eval_shape(lambda: nsa_cache.init(SPARSE, 1, length, args.kv_heads, args.head_dim))
    return {
        "dense": (lambda q, c: cache.decode_step(q, c, jnp.int32(t)), (q, full)),
        "nsa": (lambda q, g, c: nsa_cache.decode_step(q, g, c, jnp.int32(t), SPARSE), (q, gates, sparse)),
    }


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Seconds against tokens, one panel for each direction."""
    panels = []
    for what in dict.fromkeys(row["what"] for row in rows):
        lines = []
        for kind in dict.fromkeys(row["kind"] for row in rows):
            points = [
                (r["tokens"], float(r["seconds"]))
                for r in rows
                if (r["what"], r["kind"]) == (what, kind) and r["seconds"]
            ]
            if points:
                x, y = np.array(points).T
                lines.append((kind, x, y[None]))
        panels.append(plot.Panel(what, "tokens", "seconds", lines, "xy"))
    plot.draw(path, panels)


def tpu_memory(args: Args) -> None:
    """Print GiB of forward and backward on one chip, bfloat16, 64 query heads of 128 and 4 key heads, by the TPU's compiler."""
    import libtpu  # noqa: F401
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost")
    sizes = Args(heads=64, kv_heads=4, head_dim=128)
    rows = []
    for chip in args.chips:
        place = SingleDeviceSharding(topologies.get_topology_desc(TPUS[chip].topology, platform="tpu").devices[0])
        for length in (8192, 32768, 65536):
            for kind in ("dense", "blocks", "splash", "nsa"):
                program = jax.jit(
                    directions(functions()[kind])["forward and backward"], in_shardings=place, out_shardings=place
                )
                try:
                    used: Any = program.lower(*inputs(sizes, length, jnp.bfloat16)).compile().memory_analysis()
                    total = used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes
                    gib = f"{total / 2**30:.1f}"
                except RuntimeError as error:  # of the compiler
                    gib = str(error).partition(":")[0]
                rows.append({"chip": chip, "tokens": length, "kind": kind, "GiB": gib})
    report.print_table(args.folder / "tpu.csv", rows)


def main(args: Args) -> None:
    try:
        for kind in args.kinds:
            checks.one_of("kinds", kind, functions())
        for chip in args.chips:
            checks.one_of("chips", chip, TPUS)
        checks.positive_int("repeats", args.repeats)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.chips:
        return tpu_memory(args)
    rows: list[dict[str, Any]] = []
    for length in args.lengths:
        for what in ("forward", "forward and backward"):
            shapes = inputs(args, length)
            programs = {kind: (directions(functions()[kind])[what], shapes) for kind in args.kinds}
            rows += [{"tokens": length} | row for row in compare(what, programs, args)]
            print(f"{length} tokens, {what}: done", flush=True)
    for length in args.decode:
        rows += [{"tokens": length} | row for row in compare("decode", decoders(args, length), args)]
    report.print_table(args.folder / "attention.csv", rows)
    draw(args.folder / "attention.png", rows)
    print(f"{args.folder}/attention.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
