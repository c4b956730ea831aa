"""Multi-token prediction (DeepSeek-V3, 2412.19437, section 2.2): modules behind a decoder, each of which predicts one token further ahead.

    h_i^0 = the decoder's stream at token i, after its last norm
    h_i^k = layer_k( M_k [ norm(Emb(t_{i+k})) ; norm(h_i^{k-1}) ] )                            equations 21 and 22
    P(t_{i+k+1}) = head( norm_k(h_i^k) )                                                       equation 23
    L = L_main + weight / D sum_k  cross-entropy of t_{i+k+1}                                  equations 24 and 25

Embedding and head are the decoder's; what is joined stands in the order of the published weights, the token first. ``lm.speculative`` decodes
with the first module.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jrl.attention.rotary import rms_norm
from jrl.nets import transformer
from jrl.nets.mixers import Tokens
from jrl.nets.transformer import Config
from jrl.numerics.lora import product
from jrl.numerics.types import Params

Array = jax.Array


def streams(
    params: Params, hidden: Array, tokens: Array, config: Config, *, segment_ids: Array | None = None
) -> list[Array]:
    """The stream of each module before the head, ``[B, T - k, dim]`` for k of 1, 2 ...: at i it predicts the token at ``i + k + 1``.

    Args:
        params: Parameters of the decoder.
        hidden: The decoder's stream ``[B, T, dim]`` after the last norm.
        tokens: int ``[B, T]``, what the decoder read.
        config: Shape of the decoder.
        segment_ids: int ``[B, T]``: tokens see their own segment alone.
    """
    found = []
    shape = _of_module(config)
    for k in range(1, config.ahead + 1):
        module = jax.tree.map(lambda x, k=k: x[k - 1], params["ahead"])
        x = joined(module, params["embedding"][tokens[:, k:]], hidden[:, :-1], config)
        ids = None if segment_ids is None else segment_ids[:, : x.shape[1]]
        places = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        if ids is not None:
            first = jnp.pad(ids[:, 1:] != ids[:, :-1], [(0, 0), (1, 0)], constant_values=True)
            places = places - jax.lax.cummax(jnp.where(first, places, 0), axis=1)
        hidden, _ = transformer.one_layer(x, module, Tokens(places, ids, None), None, shape)
        found.append(rms_norm(hidden, module["norm"], config.norm_eps))
    return found


def joined(module: Any, token: Array, hidden: Array, config: Config) -> Array:
    """What goes into a module's layer: embeddings ``[..., dim]`` of the tokens ahead, and the stream so far."""
    parts = [
        rms_norm(token, module["token_norm"], config.norm_eps),
        rms_norm(hidden, module["hidden_norm"], config.norm_eps),
    ]
    return product("...d,df->...f", jnp.concatenate(parts, axis=-1), module["join"])


def as_decoder(params: Params, config: Config) -> tuple[Any, Config]:
    """The first module as a decoder of one layer, of vectors that are ``joined``."""
    module = jax.tree.map(lambda x: x[:1], params["ahead"])
    return {"layers": module, "norm": module["norm"][0]}, _of_module(config)


def _of_module(config: Config) -> Config:
    last = list(transformer.stacks(config).values())[-1]
    return replace(last, num_layers=1, dense_layers=0, ahead=0, vocab_size=0)
