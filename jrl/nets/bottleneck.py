"""Small networks behind the sublayers of a decoder, which stays as it is (adapters).

    x + y + f(y)           behind attention and feed-forward      Houlsby et al. 2019, 1902.00751, figure 2;  f has SiLU
    x + y + f(x + y)       behind feed-forward alone              Pfeiffer et al. 2020, 2005.00052, section 3.1;  f has ReLU

for the stream x, a sublayer's output y, and ``f(x) = act(x W_down + b_down) W_up + b_up``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
# Names of the parameters of f in a layer: by the sublayer whose output it reads, or the stream.
PLACES = {"houlsby": ("attention_adapter", "ffn_adapter"), "pfeiffer": ("stream_adapter",)}


def added(layer: Any, sublayer: str, x: Array, y: Array) -> Array:
    """The stream x with the output y of ``sublayer``, "attention" or "ffn", and what the layer has behind it."""
    if f"{sublayer}_adapter" in layer:
        y = y + _narrow(layer[f"{sublayer}_adapter"], y, jax.nn.silu)
    if sublayer == "ffn" and "stream_adapter" in layer:
        y = y + _narrow(layer["stream_adapter"], x + y, jax.nn.relu)
    return x + y


def _narrow(f: Any, x: Array, activation: Callable[[Array], Array]) -> Array:
    down, up = (_affine(f, name, x.dtype) for name in ("down", "up"))
    return up(activation(down(x)))


def _affine(f: Any, name: str, dtype: Any) -> Callable[[Array], Array]:
    w, b = f[name].astype(dtype), f[f"{name}_bias"].astype(dtype)
    return lambda x: x @ w + jnp.broadcast_to(b, (*x.shape[:-1], len(b)))
