"""What of a network is trained: all of it, some of it, or small matrices beside it (LoRA, Hu et al. 2021, 2106.09685).

    trained = lora(rank=8, alpha=16, pattern="/(q|v)$").init(key, params)
    params = lora(rank=8, alpha=16, pattern="/(q|v)$").merge(params, trained)               W + alpha / r A B
    params = lora(rank=8, alpha=16, pattern="/(q|v)$").beside(params, trained, "/(q|v)$")   computed as x W + alpha / r (x A) B

Each is a record of functions, so that an algorithm need not know which: the frozen parameters stay as they are and serve as the
reference model at no cost. ``merge`` makes a second model, of whose weights bfloat16 rounds small changes away; ``beside`` makes none, and
rounds nothing but what is computed. It is for networks whose products are ``product``.
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
        beside: ``(params, trained, pattern) -> params``, in which the adapted matrices whose path matches are ``LowRank``, and the others merged.
    """

    init: Callable[[Array, Any], Any]
    merge: Callable[[Any, Any], Any]
    beside: Callable[[Any, Any, str], Any]


class LowRank(NamedTuple):
    """A matrix ``w [*stack, *rows, *columns]`` and what is added to it: ``a [*stack, *rows, rank]`` times ``b [*stack, rank, *columns]``."""

    w: Array
    a: Array
    b: Array


def product(spec: str, x: Array, w: Any) -> Array:
    """``jnp.einsum(spec, x, w)`` in the dtype of ``x``; of a ``LowRank`` matrix by way of its rank, ``x W + (x A) B``.

    ``spec`` has a letter for each axis of ``w``: first those that stack, then those that are summed over, then the rest.
    """
    if not isinstance(w, LowRank):
        return jnp.einsum(spec, x, w.astype(x.dtype))
    w, a, b = (y.astype(x.dtype) for y in w)
    given, _, result = spec.partition("->")
    of_x, of_w = given.split(",")
    rows = "".join(letter for letter in of_w if letter not in result)
    stack = of_w[: a.ndim - 1 - len(rows)]
    columns = of_w[len(stack) + len(rows) :]
    # No decoder has an axis of its own by this name.
    low = f"{stack}{of_x.removesuffix(rows)}r"
    x_a = jnp.einsum(f"{of_x},{stack}{rows}r->{low}", x, a)
    return jnp.einsum(spec, x, w) + jnp.einsum(f"{low},{stack}r{columns}->{result}", x_a, b)


def full() -> Adapter:
    """All parameters are trained."""
    return _computed_as_merged(lambda key, params: params, lambda params, trained: trained)


def subset(pattern: str) -> Adapter:
    """The parameters whose path, like ``layers/q``, matches the regular expression anywhere; the others stay."""

    def init(key: Array, params: Params) -> dict[str, Array]:
        return _matching(params, pattern)

    def merge(params: Params, trained: dict[str, Array]) -> Any:
        return _with_paths(lambda path, x: trained.get(path, x), params)

    return _computed_as_merged(init, merge)


def _computed_as_merged(init: Callable[[Array, Any], Any], merge: Callable[[Any, Any], Any]) -> Adapter:
    return Adapter(init, merge, lambda params, trained, pattern: merge(params, trained))


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

    def beside(params: Params, trained: dict[str, dict[str, Array]], pattern: str) -> Any:
        there = {path: x for path, x in trained.items() if re.search(pattern, path)}

        def leaf(path: str, x: Array) -> Any:
            if path not in there:
                return x
            stack, rows, columns = ([x.shape[i] for i in axes] for axes in parameters.axes_of(path.split("/"), x))
            a, b = there[path]["a"], alpha / rank * there[path]["b"]
            return LowRank(x, a.reshape(*stack, *rows, rank), b.reshape(*stack, rank, *columns))

        others = merge(params, {path: x for path, x in trained.items() if path not in there})
        return _with_paths(leaf, others)

    return Adapter(init, merge, beside)


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
