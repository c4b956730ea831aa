"""Kernels that a compiled GPU program launches, counted in its text: each costs a microsecond or more however little it does."""

import re
from typing import Any, NamedTuple

NO_KERNELS = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast", "fusion-done", "while", "after-all"}


class Loop(NamedTuple):
    """A loop of a program: how often its body runs (None if that is not known before), and the kernels of one run."""

    trips: int | None
    kernels: int


class Launches(NamedTuple):
    """Kernels of one call, loops of unknown length counted once, and the loops, the largest first."""

    total: int
    loops: list[Loop]


def launches(compiled: Any) -> Launches:
    """Count the kernels of a compiled program (``jax.stages.Compiled``): fusions, copies and library calls."""
    entry, bodies, whiles = _computations(compiled.as_text())

    def count(name: str) -> tuple[int, list[Loop]]:
        own, loops = bodies[name], []
        for body, trips in whiles.get(name, []):
            inside, inner = count(body)
            own += inside * (trips or 1)
            loops += [Loop(trips, bodies[body]), *inner]
        return own, loops

    total, loops = count(entry)
    return Launches(total, sorted(loops, key=lambda loop: -(loop.trips or 1) * loop.kernels))


def _computations(text: str) -> tuple[str, dict[str, int], dict[str, list[tuple[str, int | None]]]]:
    """The entry's name, kernels by computation, and the loops ``(body, trips)`` that each computation runs."""
    entry, current = "", ""
    kernels: dict[str, int] = {}
    whiles: dict[str, list[tuple[str, int | None]]] = {}
    for line in text.splitlines():
        opened = re.match(r"^(ENTRY )?%?([\w.\-]+).*\{$", line)
        if opened and not line.startswith(" "):
            current = opened.group(2)
            kernels[current] = 0
            entry = current if opened.group(1) else entry
        elif current and (operation := re.search(r"[\])}] ([a-z\-]+)\(", line)):
            kernels[current] += operation.group(1) not in NO_KERNELS
            if operation.group(1) == "while":
                body = re.search(r"body=%?([\w.\-]+)", line)
                trips = re.search(r'"n":"(\d+)"', line)
                assert body is not None
                whiles.setdefault(current, []).append((body.group(1), int(trips.group(1)) if trips else None))
    return entry, kernels, whiles
