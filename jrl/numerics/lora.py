"""What of a network is trained: all of it, some of it, or small matrices beside it (LoRA, Hu et al. 2021, 2106.09685).

    trained = lora(rank=8, alpha=16, pattern="/(q|v)$").init(key, params)
    params = lora(rank=8, alpha=16, pattern="/(q|v)$").merge(params, trained)

Each is a pair of functions, so that an algorithm need not know which: the frozen parameters stay as they are and serve as the
reference model at no cost.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.numerics import checks, parameters
from jrl.numerics.types import Params

Array = jax.Array


class Adapter(NamedTuple):
    """Which parameters are trained, and how they act on the frozen ones.

    Attributes:
        init: ``(key, params) -> trained``, which leaves the network as it is.
        merge: ``(params, trained) -> params`` of the network that is computed with.
    """

    init: Callable[[Array, Any], Any]
    merge: Callable[[Any, Any], Any]


def full() -> Adapter:
    """All parameters are trained."""
    return Adapter(lambda key, params: params, lambda params, trained: trained)


def subset(pattern: str) -> Adapter:
    """The parameters whose path, like ``layers/q``, matches the regular expression anywhere; the others stay."""

    def init(key: Array, params: Params) -> dict[str, Array]:
        return _matching(params, pattern)

    def merge(params: Params, trained: dict[str, Array]) -> Any:
        return _with_paths(lambda path, x: trained.get(path, x), params)

    return Adapter(init, merge)


def lora(rank: int = 8, alpha: float = 16.0, pattern: str = r"/(q|k|v|o|gate|up|down)$") -> Adapter:
    """``W + alpha / rank * A B`` for the matrices whose path matches (2106.09685, section 4.1); A is random, B starts at 0.

    The axes of a parameter are those of ``parameters.axes_of``: leading ones that stack matrices (layers, branches, experts) get
    matrices of their own, and heads and their width are one axis. Raises ``ValueError`` for a rank below 1 or a pattern that
    matches nothing, or a bias or norm.
    """
    checks.positive_int("lora.rank", rank)
    checks.above_zero("lora.alpha", alpha)

    def init(key: Array, params: Params) -> dict[str, dict[str, Array]]:
        found = _matching(params, pattern)
        trained = {}
        for one, (path, x) in zip(jax.random.split(key, len(found)), found.items(), strict=True):
            stack, rows, columns = _matrix(path, x)
            a = jax.random.normal(one, (*stack, rows, rank), jnp.float32) * rows**-0.5
            trained[path] = {"a": a, "b": jnp.zeros((*stack, rank, columns), jnp.float32)}
        return trained

    def merge(params: Params, trained: dict[str, dict[str, Array]]) -> Any:
        def leaf(path: str, x: Array) -> Array:
            if path not in trained:
                return x
            a, b = (trained[path][name] for name in ("a", "b"))
            return x + (alpha / rank * (a @ b)).reshape(x.shape).astype(x.dtype)

        return _with_paths(leaf, params)

    return Adapter(init, merge)


def _matrix(path: str, x: Any) -> tuple[tuple[int, ...], int, int]:
    """Stacking axes, rows and columns of a parameter of that path."""
    kind = parameters.kind_of(path.split("/"), x)
    batch, rows, columns = ([x.shape[i] for i in axes] for axes in parameters.axes_of(path.split("/"), x))
    if kind in ("biases", "norms") or not columns:
        raise ValueError(f"lora: {path} {list(x.shape)} is no matrix")
    return tuple(batch), math.prod(rows), math.prod(columns)


def _matching(params: Params, pattern: str) -> dict[str, Array]:
    found: dict[str, Array] = {}
    _with_paths(lambda path, x: found.update({path: x}) if re.search(pattern, path) else None, params)
    if not found:
        paths: list[str] = []
        _with_paths(lambda path, x: paths.append(path), params)
        raise ValueError(f"no parameter matches {pattern!r}; there are {', '.join(paths)}")
    return found


def _with_paths(function: Callable[[str, Any], Any], params: Params) -> Any:
    return parameters.map_with_names(lambda path, x: function("/".join(path), x), params)
