"""Time and memory of every kind of attention, and of every cache to decode with, side by side in one run.

    bash scripts/bench_attention                          forward and backward at 1k to 16k tokens, decoding behind 8k to 64k
    bash scripts/bench_attention --lengths 2048 --decode 65536 --repeats 5
    bash scripts/bench_attention --kinds blocks cudnn nsa --dtype bfloat16 --lengths 4096 16384 65536     on a GPU, against cuDNN
    bash scripts/bench_attention --kinds cudnn nsa 'nsa xla' 'nsa compression' 'nsa selection' 'nsa window' --dtype bfloat16     by parts
    bash scripts/bench_attention --errors --kinds cudnn nsa --dtype bfloat16 --lengths 2048     against float64, gradients included
    bash scripts/bench_attention --chips v5e              memory on a TPU by its compiler, at 8k, 32k and 64k (needs libtpu)

Each is compiled and run once, then timed; the figure is the best of --repeats, with the worst beside it, and the order alternates,
since a shared machine drifts; what takes over ten seconds is timed once. Memory is what the compiler reserves besides arguments and results. A kind that
needs more than --memory-gib is left out. It leaves attention.csv and attention.png in the folder, and caches.csv and caches.png of
decoding.

A step of decoding writes one token to the cache and attends to it, without the projections before and after; it is the mean of 16
steps, for --rows sequences. All have one width, heads * head_dim: dense (a cache of keys and values), window (of the last 512 tokens),
nsa, mla (latents, with DeepSeek-V2's sizes for a head: 4 head_dim numbers a token and head_dim / 2 for positions) and rwkv.
Dense with a key head for every query head is there besides: it is what mla is in place of.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jrl import attention
from jrl.attention import cache, mla, nsa, nsa_cache, rwkv
from jrl.nets.mixers import Recurrent
from jrl.numerics import checks
from jrl.run import plot, report
from jrl.run.memory import TPUS, state_bytes
from jrl.run.timing import fastest, spread

Array = jax.Array
SPARSE = nsa.Config()
STEPS = 16  # of decoding in one program: as many as complete one block of nsa's compression
NEEDS = {"splash": "tpu", "nsa kernels": "tpu", "cudnn": "gpu"}
TPU_KINDS = ("dense", "blocks", "splash", "nsa", "nsa kernels")


@dataclass(frozen=True)
class Args:
    """Measure attention."""

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)  # Tokens of a sequence; none for decoding alone.
    # Tokens in the cache that is decoded with; none for whole sequences alone.
    decode: tuple[int, ...] = (8192, 16384, 32768, 65536)
    heads: int = 16  # Query heads.
    kv_heads: int = 1  # Key heads.
    head_dim: int = 64  # Width of keys and values.
    repeats: int = 3  # Measurements, of which the best counts.
    memory_gib: float = 8.0  # Skip what needs more memory than this, in GiB.
    rows: int = 1  # Sequences that are decoded at once.
    # Dtype; cudnn takes only bfloat16 and float16.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # Kinds for whole sequences: dense, jax, blocks, nsa (what is fast here), nsa xla, and its parts: nsa compression, nsa selection (with the
    # choice of blocks), nsa window. On a TPU also splash, nsa kernels; on a GPU also cudnn.
    kinds: tuple[str, ...] = ("dense", "jax", "blocks", "nsa")
    chips: tuple[str, ...] = ()  # Compile for these TPUs (v5e, v6e, v5p), and print the memory instead.
    # Compare whole sequences with float64 instead: root mean square of the difference, over that of the exact numbers.
    errors: bool = False
    folder: Path = Path("runs/attention")  # Folder for tables and plots.


def check(args: Args) -> None:
    """Raise ``ValueError`` for what cannot be measured, before anything compiles."""
    checks.not_empty(kinds=args.kinds)
    for kind in args.kinds:
        checks.one_of("kinds", kind, functions())
        if NEEDS.get(kind, jax.default_backend()) != jax.default_backend():
            raise ValueError(
                f"kinds: {kind!r} needs a {NEEDS[kind].upper()}; this is a {jax.default_backend().upper()}"
            )
    if "cudnn" in args.kinds and args.dtype == "float32":
        raise ValueError("kinds: 'cudnn' needs --dtype bfloat16 or float16")
    for chip in args.chips:
        checks.one_of("chips", chip, TPUS)
    for name in ("heads", "kv_heads", "repeats", "rows"):
        checks.positive_int(name, getattr(args, name))
    if args.heads % args.kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads = {args.kv_heads}; got {args.heads}")
    if args.head_dim < 4 or args.head_dim % 4:
        raise ValueError(f"head_dim must be a multiple of 4; got {args.head_dim}")
    for length in args.lengths:
        checks.positive_int("lengths", length)
    for length in args.decode:
        checks.positive_int("decode", length, at_least=STEPS)
    checks.above_zero("memory_gib", args.memory_gib)


# Whole sequences


def inputs(args: Args, length: int, dtype: Any) -> tuple[Any, ...]:
    """Shapes of queries, keys, values, gates, and phi's parameters."""

    def shape(heads, width):
        return jax.ShapeDtypeStruct((1, length, heads, width), dtype)

    q, kv = shape(args.heads, args.head_dim), shape(args.kv_heads, args.head_dim)
    return q, kv, kv, shape(args.heads, 3), phi(args)


def phi(args: Args) -> Any:
    """Shapes of the parameters of nsa's compression."""
    return jax.eval_shape(lambda: nsa.init(jax.random.key(0), SPARSE, args.head_dim, args.head_dim))


def functions() -> dict[str, Callable[..., Array]]:
    """Each kind as ``(q, k, v, gates, phi) -> out``."""

    def sparse(implementation: nsa.Implementation | None) -> Callable[..., Array]:
        return lambda q, k, v, gates, phi: nsa.attend(
            phi, q, nsa.shared(k, v), gates, SPARSE, implementation=implementation
        )

    return {
        "dense": lambda q, k, v, gates, phi: attention.attend(q, k, v, implementation="reference"),
        "jax": lambda q, k, v, gates, phi: jax.nn.dot_product_attention(q, k, v, is_causal=True),
        "blocks": lambda q, k, v, gates, phi: attention.attend(q, k, v, implementation="xla"),
        "cudnn": lambda q, k, v, gates, phi: attention.attend(q, k, v, implementation="cudnn"),
        "splash": lambda q, k, v, gates, phi: attention.attend(q, k, v, implementation="pallas_tpu"),
        "nsa": sparse(None if jax.default_backend() == "gpu" else "xla"),
        "nsa xla": sparse("xla"),
        "nsa kernels": sparse("pallas_tpu"),
        "nsa compression": lambda q, k, v, gates, phi: branches(phi, q, k, v)[0],
        "nsa selection": lambda q, k, v, gates, phi: branches(phi, q, k, v)[1],
        "nsa window": lambda q, k, v, gates, phi: attention.attend(q, k, v, window=SPARSE.window),
    }


def branches(phi: Any, q: Array, k: Array, v: Array, implementation: Any = None) -> tuple[Array, Array]:
    """Compression and selection; the compiler leaves out what is not asked for."""
    t = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    streams, start = nsa.shared(k, v), jnp.zeros_like(t)
    return nsa.compress_and_select(phi, q, streams, t, start, SPARSE, implementation=implementation, in_order=True)


def exact(kind: str) -> Callable[..., Array]:
    """What computes a kind in float64."""
    parts = {"nsa compression": 0, "nsa selection": 1}
    if kind in parts:
        return lambda q, k, v, gates, phi: branches(phi, q, k, v, "xla")[parts[kind]]
    if kind == "nsa window":
        return lambda q, k, v, gates, phi: attention.attend(q, k, v, window=SPARSE.window, implementation="xla")
    return functions()["nsa xla" if kind.startswith("nsa") else "blocks"]


def error(args: Args, length: int, kind: str) -> dict[str, Any]:
    """A row of the table of errors: of the output, and of each gradient."""
    params = nsa.init(jax.random.key(1), SPARSE, args.head_dim, args.head_dim)
    cast = jax.tree.map(lambda x: x.astype(args.dtype), params)
    numbers = (*fill(inputs(args, length, args.dtype)[:4]), cast)

    def of(function: Callable[..., Array], numbers: Any) -> Any:
        def loss(*a: Any) -> tuple[Array, Array]:
            out = function(*a)
            return jnp.sum(jnp.sin(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype) * out), out

        grads, out = jax.jit(jax.grad(loss, tuple(range(4)), has_aux=True))(*numbers)
        return jax.tree.map(lambda x: np.asarray(x, np.float64), (out, *grads))

    given = of(functions()[kind], numbers)
    with jax.enable_x64(True):
        wanted = of(exact(kind), jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), numbers))
    row: dict[str, Any] = {"tokens": length, "kind": kind}
    for name, x, y in zip(("output", "queries", "keys", "values", "gates"), given, wanted, strict=True):
        row[name] = f"{np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)):.1e}" if y.any() else ""
    return row


def directions(function: Callable[..., Array]) -> dict[str, Callable[..., Any]]:
    """The function, and the function with all its gradients."""

    def both(*args: Any) -> Any:
        return jax.value_and_grad(lambda *a: jnp.sum(function(*a).astype(jnp.float32)), tuple(range(5)))(*args)

    return {"forward": function, "forward and backward": both}


def fill(shapes: Any) -> Any:
    """Random numbers in these shapes."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(tree, [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])


def over(rows: list[dict[str, Any]], name: str, column: str) -> None:
    """Give each row how often its seconds go into those of the kind ``name`` among them."""
    base = [row[column] for row in rows if row["kind"] == name]
    for row in rows:
        known = base and base[0] and row[column]
        row[f"{name} over it"] = f"{float(base[0]) / float(row[column]):.2f}" if known else ""


def compare(args: Args, length: int, what: str) -> list[dict[str, Any]]:
    """Rows of the table: seconds of each kind, and GiB that it needs."""
    calls, rows, shapes = {}, [], inputs(args, length, args.dtype)
    for kind in args.kinds:
        compiled = jax.jit(directions(functions()[kind])[what]).lower(*shapes).compile()
        used: Any = compiled.memory_analysis()
        gib = used.temp_size_in_bytes / 2**30
        row = {"tokens": length, "what": what, "kind": kind, "seconds": "", "at most": "", "GiB": f"{gib:.3f}"}
        rows.append(row)
        if gib <= args.memory_gib:
            calls[kind] = lambda compiled=compiled, numbers=fill(shapes): compiled(*numbers)
    taken = spread(calls, args.repeats)
    for row in rows:
        if row["kind"] in taken:
            row["seconds"], row["at most"] = (f"{x:.4f}" for x in taken[row["kind"]])
    for name in ("dense", "blocks"):
        over(rows, name, "seconds")
    return rows


# Decoding


class Decoder(NamedTuple):
    """Decoding with one kind of cache.

    Attributes:
        step: ``(weights, cache, token, position) -> (cache, out)``.
        weights: shapes of the parameters, if any.
        cache: shapes.
        tokens: shapes of what STEPS tokens bring, ``[STEPS, 1, ...]``.
        read: bytes of the cache that a step reads.
    """

    step: Callable[[Any, Any, Any, Array], tuple[Any, Array]]
    weights: Any
    cache: Any
    tokens: Any
    read: int


def decoders(args: Args, length: int) -> dict[str, Decoder]:
    """Each kind of cache, full of ``length`` tokens."""
    heads, dim = args.heads, args.head_dim

    def tokens(*shape):
        return jax.ShapeDtypeStruct((STEPS, args.rows, *shape), args.dtype)

    def keys(kv_heads: int, window: int | None = None) -> Decoder:
        def step(_: Any, held: cache.KV, token: Any, t: Array) -> tuple[cache.KV, Array]:
            q, k, v = token
            held = cache.write(held, k, v, t)
            return held, cache.decode_step(q, held, t, window=window)

        held = jax.eval_shape(
            lambda: cache.init(args.rows, min(length, window or length), kv_heads, dim, dtype=jnp.dtype(args.dtype))
        )
        kv = tokens(kv_heads, dim)
        return Decoder(step, (), held, (tokens(heads, dim), kv, kv), state_bytes(held))

    every = {f"dense, {heads} key heads": keys(heads)} if heads != args.kv_heads else {}
    return {"dense": keys(args.kv_heads)} | every | {
        "window": keys(args.kv_heads, SPARSE.window),
        "nsa": sparse_decoder(args, length, tokens),
        "mla": latent_decoder(args, length, tokens),
        "rwkv": recurrent_decoder(args, tokens),
    }  # fmt: skip


def sparse_decoder(args: Args, length: int, tokens: Callable[..., Any]) -> Decoder:
    def step(weights: Any, held: nsa_cache.Cache, token: Any, t: Array) -> tuple[nsa_cache.Cache, Array]:
        q, k, v, gates = token
        held = nsa_cache.write(weights, held, nsa.shared(k, v), t, SPARSE)
        return held, nsa_cache.decode_step(q, gates, held, t, SPARSE)

    held = jax.eval_shape(
        lambda: nsa_cache.init(SPARSE, args.rows, length, args.kv_heads, args.head_dim, dtype=jnp.dtype(args.dtype))
    )
    chosen = min(SPARSE.selected * SPARSE.select_block, held.select.k.shape[1])
    read = state_bytes(held) - state_bytes(held.select) * (1 - chosen / held.select.k.shape[1])
    kv = tokens(args.kv_heads, args.head_dim)
    given = tokens(args.heads, args.head_dim), kv, kv, tokens(args.heads, 3)
    return Decoder(step, phi(args), held, given, round(read))


def latent_decoder(args: Args, length: int, tokens: Callable[..., Any]) -> Decoder:
    heads, dim = args.heads, args.head_dim
    config = mla.Config(latent=4 * dim, nope_dim=dim, rope_dim=dim // 2, value_dim=dim)

    def step(weights: Any, held: mla.Cache, token: Any, t: Array) -> tuple[mla.Cache, Array]:
        nope, turned, latent, key = token
        held = mla.write(held, latent, key, t)
        return held, mla.decode_step(weights, nope, turned, held, t, config)

    weights = jax.eval_shape(lambda: mla.init(jax.random.key(0), config, heads * dim, heads))
    held = jax.eval_shape(lambda: mla.init_cache(config, args.rows, length, dtype=jnp.dtype(args.dtype)))
    given = tokens(heads, dim), tokens(heads, dim // 2), tokens(config.latent), tokens(config.rope_dim)
    return Decoder(step, weights, held, given, state_bytes(held))


def recurrent_decoder(args: Args, tokens: Callable[..., Any]) -> Decoder:
    heads, dim = args.heads, args.head_dim

    def step(bonus: Array, held: Recurrent, token: Any, _: Array) -> tuple[Recurrent, Array]:
        r, k, v, w, x = token
        y, state = rwkv.recur(r, k, v, -jnp.exp(w), bonus, held.state)
        return Recurrent(state, x), y

    held = jax.eval_shape(
        lambda: Recurrent(jnp.zeros((args.rows, heads, dim, dim)), jnp.zeros((args.rows, heads * dim), args.dtype))
    )
    given = (*[tokens(heads, dim)] * 4, tokens(heads * dim))
    return Decoder(step, jax.ShapeDtypeStruct((heads, dim), jnp.float32), held, given, state_bytes(held))


def decoding(decoder: Decoder, length: int) -> Callable[[], Array]:
    """Decodes the last STEPS tokens of ``length``, again at each call, in one cache that is updated in place."""

    def program(weights: Any, held: Any, tokens: Any) -> tuple[Any, Array]:
        def one(held, x):
            return decoder.step(weights, held, *x)

        return jax.lax.scan(one, held, (tokens, jnp.arange(length - STEPS, length)))

    weights, held, tokens = fill((decoder.weights, decoder.cache, decoder.tokens))
    compiled = jax.jit(program, donate_argnums=1).lower(weights, held, tokens).compile()

    def call() -> Array:
        nonlocal held
        held, out = compiled(weights, held, tokens)
        return out

    return call


def compare_caches(args: Args, length: int) -> list[dict[str, Any]]:
    """Rows of the table of caches."""
    rows, calls = [], {}
    for kind, decoder in decoders(args, length).items():
        size = state_bytes(decoder.cache)
        if size / 2**30 <= args.memory_gib:
            calls[kind] = decoding(decoder, length)
        row = {"tokens": length, "kind": kind, "bytes of cache": size, "bytes per token": f"{size / length:.1f}"}
        rows.append(row | {"bytes read a step": decoder.read})
    best = fastest(calls, args.repeats)
    for row in rows:
        row["seconds of a step"] = f"{best[row['kind']] / STEPS:.6f}" if row["kind"] in best else ""
    over(rows, "dense", "seconds of a step")
    return rows


# Tables and plots


def lines(rows: list[dict[str, Any]], column: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """A line of a plot for each kind, over tokens, where there are numbers."""
    found = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        points = [(r["tokens"], float(r[column])) for r in rows if r["kind"] == kind and r[column] != ""]
        if points:
            x, y = np.array(points).T
            found.append((kind, x, y[None]))
    return found


def tpu_gib(chip: str, length: int, kind: str) -> str:
    """GiB of forward and backward on one chip, by the TPU's compiler: bfloat16, 64 query heads of 128 and 4 key heads."""
    from jax.experimental import topologies
    from jax.sharding import Mesh, SingleDeviceSharding

    device = topologies.get_topology_desc(TPUS[chip].topology, platform="tpu").devices[0]
    place, mesh = SingleDeviceSharding(device), Mesh(np.array([device]), ("chip",))
    shapes = inputs(Args(heads=64, kv_heads=4, head_dim=128), length, jnp.bfloat16)
    both = directions(functions()[kind])["forward and backward"]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells the kernels their chip
        lowered = jax.jit(both, in_shardings=place, out_shardings=place).lower(*shapes)
    try:
        used: Any = lowered.compile().memory_analysis()
    except RuntimeError as error:  # of the compiler
        return f"over {TPUS[chip].gib}" if "RESOURCE_EXHAUSTED" in str(error) else str(error).partition(":")[0]
    total = used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes
    return f"{total / 2**30:.1f}"


def tpu_memory(args: Args) -> None:
    """Print a table of ``tpu_gib``."""
    import libtpu  # noqa: F401

    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost")
    rows = []
    for chip in args.chips:
        for length in (8192, 32768, 65536):
            for kind in TPU_KINDS:
                rows.append({"chip": chip, "tokens": length, "kind": kind, "GiB": tpu_gib(chip, length, kind)})
                print(f"{chip}, {length} tokens, {kind}: done", flush=True)
    report.print_table(args.folder / "tpu.csv", rows)


def sequences(args: Args) -> None:
    """Measure whole sequences."""
    rows: list[dict[str, Any]] = []
    for length in args.lengths:
        for what in ("forward", "forward and backward"):
            rows += compare(args, length, what)
            found = ", ".join(f"{row['kind']} {row['seconds'] or 'left out'}" for row in rows[-len(args.kinds) :])
            print(f"{length} tokens, {what}: {found}", flush=True)
    report.print_table(args.folder / "attention.csv", rows)

    def of(what):
        return [row for row in rows if row["what"] == what]

    panels = [
        plot.Panel(x, "tokens", "seconds", lines(of(x), "seconds"), "xy") for x in ("forward", "forward and backward")
    ]
    plot.draw(args.folder / "attention.png", panels)
    print(f"{args.folder}/attention.png")


def errors(args: Args) -> None:
    """Compare whole sequences with float64."""
    rows = []
    for length in args.lengths:
        for kind in args.kinds:
            rows.append(error(args, length, kind))
            print(f"{length} tokens, {kind}: done", flush=True)
    report.print_table(args.folder / "errors.csv", rows)


def caches(args: Args) -> None:
    """Measure decoding."""
    rows: list[dict[str, Any]] = []
    for length in args.decode:
        rows += compare_caches(args, length)
        print(f"decoding behind {length} tokens: done", flush=True)
    report.print_table(args.folder / "caches.csv", rows)
    panels = [
        plot.Panel("cache of a sequence", "tokens", "bytes", lines(rows, "bytes of cache"), "xy"),
        plot.Panel("a step of decoding", "tokens", "seconds", lines(rows, "seconds of a step"), "xy"),
    ]
    plot.draw(args.folder / "caches.png", panels)
    print(f"{args.folder}/caches.png")


def main(args: Args) -> None:
    try:
        check(args)
        args.folder.mkdir(parents=True, exist_ok=True)
        if args.chips:
            return tpu_memory(args)
    except ImportError:
        raise SystemExit("error: --chips needs the package libtpu (pip install libtpu; Linux on x86-64)") from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    if args.errors:
        return errors(args)
    if args.lengths:
        sequences(args)
    if args.decode:
        caches(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
