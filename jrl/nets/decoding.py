"""A decoder of ``nets.transformer`` one token after another, behind caches: the same numbers as those of the whole sequence.

logits, cache = prefill(params, prompt, init_cache(config, batch, capacity), config)        the prompt at once
logits, cache = decode(params, token, cache, position, config)                              a token [B] of each row
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jrl.attention import cache as kv_cache
from jrl.attention.rotary import rms_norm
from jrl.nets import bottleneck, transformer
from jrl.nets.mixers import MIXERS, Tokens, steps
from jrl.numerics.types import Params

Array = jax.Array


def prefill(
    params: Params, tokens: Array, cache: Any, config: transformer.Config, *, valid: Array | None = None
) -> tuple[Array, Any]:
    """Logits ``[B, V]`` of the last of ``tokens`` int ``[B, P]``, and the empty ``cache`` filled with all of them: see ``prefill_blocks``."""
    x, cache = prefill_blocks(params, params["embedding"][tokens], cache, config, valid=valid)
    return transformer.logits(params, x[:, -1], config), cache


def prefill_blocks(
    params: Params, x: Array, cache: Any, config: transformer.Config, *, valid: Array | None = None
) -> tuple[Array, Any]:
    """All layers and the last norm for vectors ``[B, P, dim]``, and the empty ``cache`` filled with all of them.

    ``valid`` bool ``[B, P]`` is false for padding, which stands on the left: decoding goes on at position P with
    ``start = P - valid.sum(1)``. Raises ``ValueError`` for more tokens than the cache has room for.
    """
    if not config.causal:
        raise ValueError("a decoder with causal=False has no cache: its tokens see those that follow")
    length, room = x.shape[1], capacity(cache, config)
    if length > room:
        raise ValueError(f"prefill: {length} tokens do not fit in a cache for {room}")
    valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
    start = (length - valid.sum(1)).astype(jnp.int32)
    place = Tokens(jnp.arange(length)[None] - start[:, None], valid.astype(jnp.int32), None)

    whole = MIXERS[config.attention].prefill

    def mix(layer, y, cache, config):
        return whole(layer, y, place, kv_cache.seen(cache), config)

    x, cache = _with_caches(params, x, cache, config, mix)
    return rms_norm(x, params["norm"], config.norm_eps), cache


def init_cache(config: transformer.Config, batch: int, capacity: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Any:
    """Empty caches of each stack of layers, leaves ``[layers, B, ...]``, for sequences of up to ``capacity`` tokens."""
    one = MIXERS[config.attention].init_cache(config, batch, capacity, dtype)

    def stack(n):
        return jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), one)

    return {name: stack(shape.num_layers) for name, shape in transformer.stacks(config).items()}


def grown(cache: Any, config: transformer.Config, capacity: int) -> Any:
    """The caches with room for ``capacity`` tokens, of sequences that fitted in them so far."""
    batch = jax.tree.leaves(cache)[0].shape[1]
    wanted = jax.eval_shape(lambda: init_cache(config, batch, capacity))
    return jax.tree.map(
        lambda x, y: jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, y.shape, strict=True)]), cache, wanted
    )


def capacity(cache: Any, config: transformer.Config) -> float:
    """Tokens that there is room for; infinitely many where the cache keeps the last ones alone."""
    held = cache["layers"]
    match config.attention:
        case "dense":
            return held.k.shape[2]
        case "nsa":
            return held.select.k.shape[2]
        case "mla":
            return held.latent.shape[2]
        case "dsa":
            return held.key.shape[2]
        case _:
            return float("inf")


def decode(
    params: Params, token: Array, cache: Any, position: Array, config: transformer.Config, *, start: Array | int = 0
) -> tuple[Array, Any]:
    """Logits ``[B, V]`` of ``token`` int ``[B]`` at ``position`` (int32 ``[]`` or ``[B]``), and the caches with it.

    It sees positions from ``start`` on; rotary positions count from there, too.
    """
    x, cache = decode_blocks(params, params["embedding"][token], cache, position, config, start=start)
    return transformer.logits(params, x, config), cache


def decode_blocks(
    params: Params, x: Array, cache: Any, position: Array, config: transformer.Config, *, start: Array | int = 0
) -> tuple[Array, Any]:
    """All layers for one vector ``[B, dim]`` of each row."""
    if not config.causal:
        raise ValueError("a decoder with causal=False has no decode step: its tokens see those that follow")
    step = MIXERS[config.attention].step

    def mix(layer, y, cache, config):
        return step(layer, y, cache, position, start, config)

    x, cache = _with_caches(params, x, cache, config, mix)
    return rms_norm(x, params["norm"], config.norm_eps), cache


def decode_several(
    params: Params, x: Array, cache: Any, position: Array, config: transformer.Config, *, start: Array | int = 0
) -> tuple[Array, Any]:
    """All layers for vectors ``[B, S, dim]`` of each row, at ``position`` int32 ``[B]`` and behind; what an earlier call wrote there is replaced.
    Raises ``ValueError`` unless attention is dense."""
    if config.attention != "dense":
        raise ValueError(f"decode_several needs transformer.attention=dense; got {config.attention}")

    def mix(layer, y, cache, config):
        return steps(layer, y, cache, position, start, config)

    x, cache = _with_caches(params, x, cache, config, mix)
    return rms_norm(x, params["norm"], config.norm_eps), cache


def _with_caches(
    params: Params, x: Array, cache: Any, config: transformer.Config, mix: Callable[..., tuple[Array, Any]]
) -> tuple[Array, Any]:
    """All layers, each with its cache; ``mix`` is ``(layer, normalized x, cache, config) -> (heads, cache)``."""

    # The caches of all layers are carried and written in place: as inputs and outputs of the scan they would be copied whole.
    def run(
        carry: tuple[Array, Any], both: tuple[Any, Array], config: transformer.Config
    ) -> tuple[tuple[Array, Any], None]:
        (x, caches), (layer, number) = carry, both
        mine = jax.tree.map(lambda rows: kv_cache.Layer(rows, number), caches)
        mixed, mine = mix(layer, rms_norm(x, layer["attention_norm"], config.norm_eps), mine, config)
        x = bottleneck.added(layer, "attention", x, transformer.out(layer, mixed))
        x = bottleneck.added(layer, "ffn", x, transformer.ffn(layer, x, config))
        return (x, jax.tree.map(partial(_kept, number), caches, mine)), None

    written = {}
    for name, shape in transformer.stacks(config).items():
        numbers = jnp.arange(shape.num_layers)
        (x, written[name]), _ = jax.lax.scan(partial(run, config=shape), (x, cache[name]), (params[name], numbers))
    return x, written


def _kept(number: Array, rows: Array, mine: Any) -> Array:
    """The rows of all layers with those of one, unless these are in their place already."""
    if kv_cache.is_layer(mine):
        return mine.rows
    return jax.lax.dynamic_update_index_in_dim(rows, mine, number, 0)
