"""What of a network is trained: all of it, some of it, or a little beside its matrices.

    adapter = lora(rank=8, alpha=16, pattern="/(q|v)$")
    trained = adapter.init(key, params)
    params = adapter.merge(params, trained)                      W + alpha / r A B
    params = adapter.beside(params, trained, "/(q|v)$")          computed as x W + alpha / r (x A) B

    lora    W + s A B                                    Hu et al. 2021, 2106.09685; s = alpha / r, or alpha / sqrt(r) (2312.03732)
    dora    m (W + s A B) / |W + s A B|                  Liu et al. 2024, 2402.09353, a norm for each output
    ia3     W times a number for each output or input    Liu et al. 2022, 2205.05638

Each is a record of functions, so that an algorithm need not know which: the frozen parameters stay as they are and serve as the
reference model at no cost. ``merge`` makes a second model, of whose weights bfloat16 rounds small changes away; ``beside`` makes none, and
rounds nothing but what is computed. It is for networks whose products are ``product``.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.numerics import checks, parameters
from jrl.numerics.types import Params

Array = jax.Array
MATRICES = r"/(q|k|v|o|gate|up|down)$"


class Adapter(NamedTuple):
    """Which parameters are trained, and how they act on the frozen ones.

    Attributes:
        init: ``(key, params) -> trained``, which leaves the network as it is.
        merge: ``(params, trained) -> params`` of the network that is computed with.
        beside: ``(params, trained, pattern, key=None) -> params``, in which the adapted matrices whose path matches are ``LowRank``, and the
            others merged. With a key, dropout is on.
    """

    init: Callable[[Array, Any], Any]
    merge: Callable[[Any, Any], Any]
    beside: Callable[..., Any]


class LowRank(NamedTuple):
    """A matrix and what stands beside it, ``y = ((x rows) w + (drop(x) a) b) columns``.

    Attributes:
        w: ``[*stack, *rows, *columns]``.
        a: ``[*stack, *rows, rank]``, or None.
        b: ``[*stack, rank, *columns]``, or None.
        rows: ``[*stack, *rows]``, a number for each input, or None for 1.
        columns: ``[*stack, *columns]``, a number for each output, or None for 1.
        drop: Dropout of the input of ``a``, or None.
    """

    w: Array
    a: Array | None = None
    b: Array | None = None
    rows: Array | None = None
    columns: Array | None = None
    drop: "Dropout | None" = None


class Dropout(NamedTuple):
    """Keys ``[*stack]`` and rates ``[*stack]`` of dropout."""

    key: Array
    rate: Array


def product(spec: str, x: Array, w: Any) -> Array:
    """``jnp.einsum(spec, x, w)`` in the dtype of ``x``; of a ``LowRank`` matrix by way of its rank, ``x W + (x A) B``.

    ``spec`` has a letter for each axis of ``w``: first those that stack, then those that are summed over, then the rest.
    """
    if not isinstance(w, LowRank):
        return jnp.einsum(spec, x, w.astype(x.dtype))
    given, _, result = spec.partition("->")
    of_x, of_w = given.split(",")
    rows = "".join(letter for letter in of_w if letter not in result)
    stack = of_w[: of_w.index(rows)]
    columns = of_w[len(stack) + len(rows) :]
    each = of_x if set(stack) <= set(of_x) else f"{stack}{of_x}"

    def of(y: Array) -> Array:
        return y.astype(x.dtype)

    scaled = x if w.rows is None else jnp.einsum(f"{of_x},{stack}{rows}->{each}", x, of(w.rows))
    y = jnp.einsum(f"{of_x if w.rows is None else each},{of_w}->{result}", scaled, of(w.w))
    if w.a is not None and w.b is not None:
        low = f"{stack}{of_x.removesuffix(rows)}r"  # no decoder has an axis of its own by this name
        x_a = jnp.einsum(f"{of_x},{stack}{rows}r->{low}", _dropped(x, w.drop), of(w.a))
        y += jnp.einsum(f"{low},{stack}r{columns}->{result}", x_a, of(w.b))
    return y if w.columns is None else jnp.einsum(f"{result},{stack}{columns}->{result}", y, of(w.columns))


def _dropped(x: Array, drop: Dropout | None) -> Array:
    if drop is None:
        return x
    key, rate = drop.key.ravel()[0], drop.rate.ravel()[0]  # of branches, one for all
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate).astype(x.dtype), 0)


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
    return Adapter(init, merge, lambda params, trained, pattern, key=None: merge(params, trained))


# Beside matrices

Trained = dict[str, Array]  # of one matrix


def lora(
    rank: int = 8,
    alpha: float = 16.0,
    pattern: str = MATRICES,
    *,
    root: bool = False,
    dropout: float = 0.0,
    whole: str | None = None,
) -> Adapter:
    """``W + s A B`` for the matrices whose path matches (2106.09685, section 4.1); A is random, B starts at 0.

    Args:
        rank: r, the columns of A.
        alpha: ``s = alpha / r``.
        pattern: A regular expression for paths such as ``layers/q``.
        root: ``s = alpha / sqrt(r)`` instead (rsLoRA).
        dropout: Share of the inputs of A that are dropped where ``beside`` is given a key.
        whole: A regular expression for parameters that are trained themselves, besides; None for none.

    The axes of a parameter are those of ``parameters.axes_of``: leading ones that stack matrices (layers, branches, experts) get
    matrices of their own, and heads and their width are one axis. Raises ``ValueError`` for a rank below 1 or a pattern that
    matches nothing, or a bias or norm.
    """
    scale = factor(rank, alpha, root)

    def put(path: str, x: Array, now: Trained) -> Array:
        return x + (scale * (now["a"] @ now["b"])).reshape(x.shape).astype(x.dtype)

    def aside(path: str, x: Array, now: Trained, key: Array | None) -> LowRank:
        a, b = _factors(path, x, now, scale)
        return LowRank(x, a, b, drop=_dropout(a, dropout, key))

    return _of_matrices(pattern, partial(_start, rank), put, aside, whole)


def dora(
    rank: int = 8,
    alpha: float = 16.0,
    pattern: str = MATRICES,
    *,
    root: bool = False,
    dropout: float = 0.0,
    whole: str | None = None,
) -> Adapter:
    """``m (W + s A B) / |W + s A B|`` (2402.09353, eq. 5): the length m of each output's row is trained apart from its direction. The norm has
    no gradient (section 4.3). See ``lora``."""
    scale = factor(rank, alpha, root)

    def start(key: Array, path: str, x: Array) -> Trained:
        now = _start(rank, key, path, x)
        return now | {"magnitude": _length(_as_matrix(path, x))}

    def gain(path: str, x: Array, now: Trained) -> Array:
        added = _as_matrix(path, x) + scale * (now["a"] @ now["b"])
        return now["magnitude"] / jax.lax.stop_gradient(_length(added))

    def put(path: str, x: Array, now: Trained) -> Array:
        added = _as_matrix(path, x) + scale * (now["a"] @ now["b"])
        return (gain(path, x, now)[..., None, :] * added).reshape(x.shape).astype(x.dtype)

    def aside(path: str, x: Array, now: Trained, key: Array | None) -> LowRank:
        a, b = _factors(path, x, now, scale)
        stack, _, columns = _axes(path, x)
        return LowRank(x, a, b, columns=gain(path, x, now).reshape(*stack, *columns), drop=_dropout(a, dropout, key))

    return _of_matrices(pattern, start, put, aside, whole)


def ia3(outputs: str = r"/(k|v)$", inputs: str = r"/down$", *, whole: str | None = None) -> Adapter:
    """A number for each output of the matrices whose path matches ``outputs``, and for each input of those of ``inputs`` (2205.05638,
    section 3.3), which start at 1."""

    def start(key: Array, path: str, x: Array) -> Trained:
        stack, rows, columns = _matrix(path, x)
        if re.search(inputs, path):
            return {"row_scale": jnp.ones((*stack, rows), jnp.float32)}
        return {"column_scale": jnp.ones((*stack, columns), jnp.float32)}

    def aside(path: str, x: Array, now: Trained, key: Array | None) -> LowRank:
        stack, rows, columns = _axes(path, x)
        if "row_scale" in now:
            return LowRank(x, rows=now["row_scale"].reshape(*stack, *rows))
        return LowRank(x, columns=now["column_scale"].reshape(*stack, *columns))

    def put(path: str, x: Array, now: Trained) -> Array:
        beside = aside(path, x, now, None)
        stack, rows, columns = (len(n) for n in _axes(path, x))
        of_rows = 1.0 if beside.rows is None else jnp.expand_dims(beside.rows, tuple(range(-columns, 0)))
        ahead = tuple(range(stack, stack + rows))
        of_columns = 1.0 if beside.columns is None else jnp.expand_dims(beside.columns, ahead)
        return (x * of_rows * of_columns).astype(x.dtype)

    return _of_matrices(f"{outputs}|{inputs}", start, put, aside, whole)


def _of_matrices(
    pattern: str,
    start: Callable[[Array, str, Array], Trained],
    put: Callable[[str, Array, Trained], Array],
    aside: Callable[[str, Array, Trained, Array | None], LowRank],
    whole: str | None,
) -> Adapter:
    """An adapter of the matrices whose path matches: how one is started, merged into its matrix, or put beside it."""

    def init(key: Array, params: Params) -> dict[str, Any]:
        found = _matching(params, pattern)
        keys = jax.random.split(key, len(found))
        trained: dict[str, Any] = {
            path: start(one, path, x) for one, (path, x) in zip(keys, found.items(), strict=True)
        }
        return trained | (_matching(params, whole) if whole else {})

    def merge(params: Params, trained: dict[str, Any]) -> Any:
        def leaf(path: str, x: Array) -> Array:
            now = trained.get(path, x)
            return put(path, x, now) if isinstance(now, dict) else now

        return _with_paths(leaf, params)

    def beside(params: Params, trained: dict[str, Any], pattern: str, key: Array | None = None) -> Any:
        there = [path for path, x in trained.items() if isinstance(x, dict) and re.search(pattern, path)]
        keys = {} if key is None else dict(zip(there, jax.random.split(key, max(1, len(there))), strict=False))

        def leaf(path: str, x: Array) -> Any:
            return aside(path, x, trained[path], keys.get(path)) if path in there else x

        others = merge(params, {path: x for path, x in trained.items() if path not in there})
        return _with_paths(leaf, others)

    return Adapter(init, merge, beside)


def factor(rank: int, alpha: float, root: bool) -> float:
    """What A B is multiplied with."""
    checks.positive_int("lora.rank", rank)
    checks.above_zero("lora.alpha", alpha)
    return alpha / (math.sqrt(rank) if root else rank)


def _start(rank: int, key: Array, path: str, x: Array) -> Trained:
    stack, rows, columns = _matrix(path, x)
    a = jax.random.normal(key, (*stack, rows, rank), jnp.float32) * rows**-0.5
    return {"a": a, "b": jnp.zeros((*stack, rank, columns), jnp.float32)}


def _factors(path: str, x: Array, now: Trained, scale: float) -> tuple[Array, Array]:
    """A and ``s B``, with the axes of their matrix."""
    stack, rows, columns = _axes(path, x)
    a, b = now["a"], scale * now["b"]
    return a.reshape(*stack, *rows, a.shape[-1]), b.reshape(*stack, b.shape[-2], *columns)


def _dropout(a: Array, rate: float, key: Array | None) -> Dropout | None:
    """A key for each of the layers, which are the first axis."""
    if key is None or not rate:
        return None
    return Dropout(jax.random.split(key, len(a)), jnp.full(len(a), rate))


def _as_matrix(path: str, x: Array) -> Array:
    """In float32, rows by columns."""
    stack, rows, columns = _matrix(path, x)
    return x.astype(jnp.float32).reshape(*stack, rows, columns)


def _length(matrix: Array) -> Array:
    """Of each column."""
    return jnp.sqrt(jnp.sum(jnp.square(matrix), axis=-2))


def _axes(path: str, x: Any) -> tuple[list[int], list[int], list[int]]:
    """Sizes of the axes that stack matrices, of their rows and of their columns."""
    stack, rows, columns = ([x.shape[i] for i in axes] for axes in parameters.axes_of(path.split("/"), x))
    return stack, rows, columns


def _matrix(path: str, x: Any) -> tuple[tuple[int, ...], int, int]:
    """Stacking axes, rows and columns of a parameter of that path."""
    stack, rows, columns = _axes(path, x)
    if parameters.kind_of(path.split("/"), x) in ("biases", "norms") or not columns:
        raise ValueError(f"lora: {path} {list(x.shape)} is no matrix")
    return tuple(stack), math.prod(rows), math.prod(columns)


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
