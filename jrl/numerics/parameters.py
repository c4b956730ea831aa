"""What a parameter is, by its path: its kind, and which of its axes make a matrix.

Layers, experts and branches are stacked, so that the rank of an array does not tell a bias from a matrix:

    layers/q        [layers, dim, heads, width]      a matrix of each layer, dim x (heads width)
    layers/o        [layers, heads, width, dim]      a matrix of each layer, (heads width) x dim
    layers/up       [layers, experts, dim, ffn]      a matrix of each expert of each layer
    layers/q_bias   [layers, heads, width]           a vector of each layer

``LAYOUTS`` lists the parameters of ``jrl.nets.transformer``, of its adapters (``jrl.numerics.lora``) too; others go by the names that flax gives
them and by their rank, less one below a module called ``layers``.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax

Array = jax.Array
Names = Sequence[str]
Kind = Literal["weights", "biases", "norms", "embeddings"]

NORM = re.compile(r"(^|_|layer|rms|batch|group|instance)norm(s|_|\d|$)")
HEAD = re.compile(r"(^|/)(head|value|values|baseline|policy/out)(/|$)")

# How many of the last axes are inputs and how many outputs; a vector has inputs alone. All axes before them stack.
LAYOUTS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("q", "k", "v", "r", "g", "query", "up_key", "up_value", "decay_up", "branch_gate"), (1, 2)),
    "o": (2, 1),
    **dict.fromkeys(("gate", "up", "down", "router", "shared_gate", "shared_up", "shared_down", "join"), (1, 1)),
    **dict.fromkeys(("key", "query_down", "shift_down", "shift_up", "decay_down"), (1, 1)),
    **dict.fromkeys(("w_in", "w_out", "position", "a", "b"), (1, 1)),
    **dict.fromkeys(("q_bias", "k_bias", "v_bias", "branch_gate_bias"), (2, 0)),
    **dict.fromkeys(("head_norm", "head_norm_bias", "decay", "bonus"), (2, 0)),
    **dict.fromkeys(
        ("norm", "attention_norm", "ffn_norm", "q_norm", "k_norm", "query_norm", "token_norm", "hidden_norm"), (1, 0)
    ),
    **dict.fromkeys(("bias", "o_bias", "gate_bias", "up_bias", "down_bias", "b_in", "b_out"), (1, 0)),
    **dict.fromkeys(("shift", "shift_all", "magnitude", "row_scale", "column_scale"), (1, 0)),
    **dict.fromkeys(("prefix_k", "prefix_v"), (1, 2)),
}
STACKS = ("layers", "first", "ahead")
# A layer may have several: of branches, of experts, of mixtures of tokens.
STACKED_IN_A_LAYER = (
    "k", "v", "k_bias", "v_bias", "gate", "up", "down", "shift", "shift_down", "shift_up", "a", "b", "magnitude", "row_scale",
    "column_scale",
)  # fmt: skip


class Axes(NamedTuple):
    """Axes of a parameter: ``batch`` axes stack matrices, each from ``rows``, its inputs, to ``columns``, its outputs.

    A vector has no columns.
    """

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


def names(path: Any) -> tuple[str, ...]:
    """The names on a path of ``jax.tree_util``; a key such as ``layers/q``, as adapters have them, is two."""
    parts = (str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
    return tuple("/".join(parts).split("/"))


def map_with_names(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """``jax.tree.map`` of ``function(names, leaf, ...)``."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(names(path), *leaves), tree, *rest)


def axes_of(path: Names, param: Any) -> Axes:
    """Which axes of a parameter stack, and which make its matrix or vector.

    Raises ``ValueError`` for more than two axes whose meaning no name tells: to guess would be to train them wrongly.
    """
    layout = _layout(path, param.ndim)
    if layout is None:
        raise ValueError(
            f"which axes of parameter {'/'.join(path)} {list(param.shape)} make its matrix is unknown: "
            "add its name to jrl.numerics.parameters.LAYOUTS"
        )
    axes = tuple(range(param.ndim))
    batch, split = param.ndim - sum(layout), param.ndim - layout[1]
    return Axes(axes[:batch], axes[batch:split], axes[split:])


def kind_of(path: Names, param: Any) -> Kind:
    """What a parameter is: by the names on its path, else a vector counts as a bias.

    So do all numbers that are added or that scale one by one, as RWKV's decays and the noise of noisy networks: what is no matrix.
    """
    path = [name.lower() for name in path]
    if path[-1] == "kernel":
        return "weights"
    if any("embed" in name for name in path) or path[-1] == "position":
        return "embeddings"
    if any(NORM.search(name) for name in path) or path[-1] == "scale":
        return "norms"
    layout = _layout(path, param.ndim)
    vector = layout is not None and layout[1] == 0
    return "biases" if vector or path[-1].endswith(("bias", "_sigma")) else "weights"


def is_head(path: Names) -> bool:
    """Whether a parameter belongs to an output head: of symbols, of a policy or of values."""
    return HEAD.search("/".join(path).lower()) is not None


def _layout(path: Names, rank: int) -> tuple[int, int] | None:
    """Numbers of input and output axes; None where they cannot be told."""
    *parents, name = path
    if name in LAYOUTS:
        batch = rank - sum(LAYOUTS[name]) - sum(parent in STACKS for parent in parents)
        if batch == 0 or (batch == 1 and name in STACKED_IN_A_LAYER):
            return LAYOUTS[name]
    inner = rank - ("layers" in parents)
    if name == "kernel":  # of a dense layer, or of a convolution over two axes
        return {2: (1, 1), 4: (3, 1)}.get(inner)
    return {0: (0, 0), 1: (1, 0), 2: (1, 1)}.get(max(inner, 0))
