"""The programs of a run, compiled for its devices, and the state with which it begins."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.algorithm import Algorithm, over_members
from jrl.numerics import host
from jrl.run import layout, program
from jrl.run.layout import Layout
from jrl.run.members import Members
from jrl.run.scores import Scorer


class Compiled(NamedTuple):
    """What a run needs on its devices.

    Attributes:
        layout: how the members lie over devices and in groups.
        chunk: ``program.chunk`` of all members, compiled; it takes its first argument's memory.
        max_rows: rows of metrics that a chunk can hold.
        start: the members at the beginning, with an empty row.
        scorer: evaluates all members; None where no episodes were asked for.
        seconds: time taken by compiling and initializing.
    """

    layout: Layout
    chunk: Any
    max_rows: int
    start: program.LoopState
    scorer: Scorer | None
    seconds: float


def build(
    algo: Algorithm,
    members: Members,
    names: list[str],
    total: int,
    every: int,
    eval_episodes: int,
    chosen: Layout,
    automatic: bool,
) -> Compiled:
    """Initialize all members while the chunk compiles; where that does not fit the device and the layout was chosen
    automatically, it is for smaller groups.

    ``names`` are those of the metrics, ``total`` is the number of updates, ``every`` that of a row.
    """

    def scorer_of(chosen: Layout) -> Scorer | None:
        return Scorer(algo, members.cells, chosen, eval_episodes) if eval_episodes else None

    begin = time.perf_counter()
    max_rows = program.max_rows(chosen.num_members)
    init = over_members(algo).init

    def start(pair: Any) -> Any:
        return init(*pair, total)

    pairs = layout.put(chosen, layout.pad(chosen, (members.keys, members.hypers)))
    lowered = jax.jit(layout.over_members(chosen, start)).lower(pairs)
    run = program.chunk(algo, names, every, max_rows)
    with ThreadPoolExecutor(1) as pool:
        initialized = pool.submit(lambda: lowered.compile()(pairs))
        fitting, chunk, scorer = _compile_chunk(run, lowered.out_info, len(names), chosen, automatic, scorer_of)
        states = initialized.result()
    if fitting != chosen:
        real = jax.tree.map(lambda x: x[: chosen.num_members], states)
        states = layout.put(fitting, layout.pad(fitting, real))
    row = layout.put(fitting, np.zeros((fitting.num_slots, len(names)), np.float32))
    begun = program.LoopState(states, row)
    return Compiled(fitting, chunk, max_rows, begun, scorer, time.perf_counter() - begin)


def _compile_chunk(
    run: Any,
    states: Any,
    num_metrics: int,
    chosen: Layout,
    automatic: bool,
    scorer_of: Callable[[Layout], Scorer | None],
) -> tuple[Layout, Any, Scorer | None]:
    """Compile the chunk for states of these shapes, in smaller groups until it fits."""
    while True:
        row: Any = jax.ShapeDtypeStruct((1, num_metrics), jnp.float32)
        members = layout.shapes(chosen, program.LoopState(states, row))
        smallest = not automatic or chosen.group_size == 1
        try:
            lowered = jax.jit(layout.over_members(chosen, run), donate_argnums=0).lower(
                members, jnp.int32(1), jnp.int32(0)
            )
            scorer = scorer_of(chosen)
            if scorer is not None and chosen.devices[0].platform != "cpu":
                # Traced while the compiler works on the chunk. On a CPU that would take the cores from training: there evaluation
                # is compiled when it is needed.
                scorer.compile(states)
            chunk = lowered.compile(compiler_options=host.chunk_compiler_options())
            if smallest or fits(chunk, chosen):
                return chosen, chunk, scorer
        except jax.errors.JaxRuntimeError as error:  # a TPU's compiler refuses what does not fit
            if smallest or "RESOURCE_EXHAUSTED" not in str(error):
                raise
        devices = list(chosen.devices)
        chosen = layout.choose(chosen.num_members, devices, max(1, chosen.group_size // 2) * len(devices))


def fits(chunk: Any, chosen: Layout) -> bool:
    """Whether a compiled program fits the memory of its first device, where that is known."""
    device, used = chosen.devices[0], chunk.memory_analysis()
    limit = None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")
    if limit is None or used is None:
        return True
    return used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes <= 0.95 * limit
