"""Compile an algorithm's whole update for an NVIDIA H100 ahead of time, without a GPU, and print what it will need and launch.

    bash scripts/gpu_check                      PPO, DQN, R2D2 and PQN at 32 and 2048 seeds
    bash scripts/gpu_check --algos ppo --env Breakout-MinAtar --seeds 64
    bash scripts/gpu_check --algos --language qwen3-0.6b --length 4096      sampling, training and GRPO of a language model
    bash scripts/gpu_check --algos --attention 8192 65536 --width 128 128   sparse attention, 64 query heads on 4 key heads

For each program: GiB of memory, the kernels that one update launches, and its largest loops as trips x kernels. A launch costs
a microsecond or two, which up to some hundreds of small agents is all the time there is. Of attention's own kernels also the registers of a
thread (255 at most), and the bytes that did not fit and go through memory. It says that the program compiles and what it needs, not
that it ran.
"""

import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_language
import jax
import jax._src.xla_bridge as xla_bridge
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jrl import envs
from jrl.algorithm import Algorithm, over_seeds
from jrl.algos import dqn, ppo, pqn, presets, r2d2
from jrl.attention import nsa
from jrl.numerics import checks, host
from jrl.run.kernels import launches

ALGOS = {
    "ppo": (ppo, presets.ppo_preset),
    "dqn": (dqn, presets.dqn_preset),
    "r2d2": (r2d2, presets.r2d2_preset),
    "pqn": (pqn, presets.pqn_preset),
}


@dataclass(frozen=True)
class Args:
    """Compile the update of algorithms for an H100."""

    algos: tuple[str, ...] = tuple(ALGOS)  # Algorithms: ppo, dqn, r2d2, pqn.
    seeds: tuple[int, ...] = (32, 2048)  # Numbers of seeds in one program.
    env: str = "CartPole-v1"  # Environment, with its preset.
    language: bench_language.Shape | None = None  # Shape of a published language model, smollm2-135m or qwen3-0.6b.
    rows: int = 64  # Rows of its training step, and answers that it samples at once.
    length: int = 256  # Tokens of these rows.
    micro_batches: int = 1  # Parts in which its training step is computed.
    attention: tuple[int, ...] = ()  # Lengths of sequences for sparse attention, in bfloat16.
    width: tuple[int, int] = (128, 128)  # Of its heads: queries and keys, and values.


def h100() -> NamedSharding:
    """The placement of a program on one H100 that is not there."""
    canonical = xla_bridge.canonicalize_platform

    def without_a_device(platform: str) -> str:  # JAX asks for a live GPU here, which its compiler does not need
        try:
            return canonical(platform)
        except RuntimeError:
            return "cuda" if platform in ("gpu", "cuda") else platform

    xla_bridge.canonicalize_platform = without_a_device
    target = (Path(__file__).parent / "h100_target.txt").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    mesh = Mesh(np.array(topology.devices).reshape(-1), ("gpu",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec())


def compile_update(algo: Algorithm, num_seeds: int, place: NamedSharding) -> Any:
    """The update of ``num_seeds`` seeds, compiled."""
    algo = over_seeds(algo)
    state = jax.eval_shape(algo.init, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_seeds)))
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)
    return jax.jit(algo.update, donate_argnums=0, out_shardings=place).lower(placed).compile()


def table(name: str, args: Args, place: NamedSharding) -> None:
    """One algorithm's programs, a row for each number of seeds."""
    module, preset_of = ALGOS[name]
    preset = preset_of("auto", args.env)
    algo = module.make(envs.make(args.env), preset.config, preset.hyper)
    print(f"\n{name.upper()} on {algo.env.name}: one update, compiled for an H100\n")
    print("| seeds | GiB | kernels | largest loops, trips x kernels | compile s |\n| --- | --- | --- | --- | --- |")
    for num_seeds in args.seeds:
        begin = time.perf_counter()
        compiled = compile_update(algo, num_seeds, place)
        print(row(num_seeds, compiled, time.perf_counter() - begin), flush=True)


def language(args: Args, place: NamedSharding) -> None:
    """The programs of a language model, a row for each."""
    assert args.language is not None
    sizes = {
        "rows": args.rows,
        "train_rows": args.rows,
        "train_length": args.length,
        "micro_batches": args.micro_batches,
    }
    sizes["group_size"] = math.gcd(8, args.rows)
    found = bench_language.programs(bench_language.Args(args.language, **sizes))  # type: ignore[arg-type]
    print(f"\n{args.language}, compiled for an H100\n")
    print("| program | GiB | kernels | largest loops, trips x kernels | compile s |\n| --- | --- | --- | --- | --- |")
    for name, program in found.items():
        begin = time.perf_counter()
        compiled = bench_language.compiled(program, place)
        print(row(name, compiled, time.perf_counter() - begin), flush=True)


def attention(args: Args, place: NamedSharding) -> None:
    """Sparse attention with its own kernels, a row for each length and direction, and what the kernels need."""
    print("\nSparse attention, compiled for an H100\n")
    print("| tokens | GiB | kernels | largest loops, trips x kernels | compile s |\n| --- | --- | --- | --- | --- |")
    needs: dict[str, tuple[str, str]] = {}
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # the assembler says what kernels need
    for length in args.attention:
        for what, function in (("forward", sparse), ("forward and backward", with_gradients)):
            shapes = jax.eval_shape(lambda length=length: sparse_inputs(length, args.width))
            placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
            begin = time.perf_counter()
            compiled, printed = with_output(
                lambda f=function, p=placed: jax.jit(f, out_shardings=place).lower(*p).compile()
            )
            print(row(f"{length:,} {what}", compiled, time.perf_counter() - begin), flush=True)
            needs |= registers(printed)
    print("\n| kernel | registers | bytes that did not fit |\n| --- | --- | --- |")
    for name, (used, spilled) in needs.items():
        print(f"| {name} | {used} | {spilled} |")


def sparse(*args: Any) -> jax.Array:
    return nsa.attend(*args, nsa.Config(), implementation="mosaic_gpu")


def with_gradients(*args: Any) -> Any:
    return jax.grad(lambda *a: jnp.sum(sparse(*a).astype(jnp.float32)), (0, 1, 2, 3))(*args)


def sparse_inputs(length: int, width: tuple[int, int], heads: int = 64, kv_heads: int = 4) -> tuple[Any, ...]:
    """Parameters, queries, keys and values, and gates."""

    def of(heads: int, dim: int) -> jax.Array:
        return jnp.zeros((1, length, heads, dim), jnp.bfloat16)

    params = nsa.init(jax.random.key(0), nsa.Config(), *width)
    return params, of(heads, width[0]), nsa.shared(*(of(kv_heads, dim) for dim in width)), of(heads, 3)


def with_output(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call gives, and what the GPU's assembler printed meanwhile, past Python."""
    with tempfile.TemporaryFile("w+") as file:
        before = [os.dup(stream) for stream in (1, 2)]
        try:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            result = call()
        finally:
            for stream, old in zip((1, 2), before, strict=True):
                os.dup2(old, stream)
                os.close(old)
        file.seek(0)
        return result, file.read()


def registers(printed: str) -> dict[str, tuple[str, str]]:
    """Registers and spilled bytes by kernel, as the assembler prints them."""
    found = re.findall(
        r"entry function '(\w+?)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores.*?Used (\d+) registers",
        printed,
        re.DOTALL,
    )
    return {name: (used, spilled) for name, spilled, used in found}


def row(name: object, compiled: Any, seconds: float) -> str:
    """What a compiled program needs and launches, as a line of a table."""
    found = launches(compiled)
    loops = ", ".join(f"{loop.trips or '?'} x {loop.kernels}" for loop in found.loops[:3])
    return f"| {name} | {bench_language.gib(compiled):.3f} | {found.total:,} | {loops} | {seconds:.0f} |"


def main(args: Args) -> None:
    try:
        for name in args.algos:
            checks.one_of("algos", name, tuple(ALGOS))
        for name in ("seeds", "attention", "width"):
            for count in getattr(args, name):
                checks.positive_int(name, count)
        place = h100()
        with host.traced_for("gpu"):
            for name in args.algos:
                table(name, args, place)
            if args.language is not None:
                language(args, place)
            if args.attention:
                attention(args, place)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
