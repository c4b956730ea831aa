"""A mixture of experts in place of a feed-forward layer: each token goes through a few of many SwiGLUs, and none is dropped.

    softmax   Mixtral (2401.04088, section 2): the k largest router logits, weighted by their softmax. A term of the loss evens the
              load: ``balance_loss``.
    sigmoid   DeepSeek-V3 (2412.19437, eq. 12-16): s = sigmoid(logits); the k largest s + bias, weighted by s over the sum of the
              chosen s, times a factor. The bias evens the load and has no gradient: ``balance`` moves it after each step.

Shared experts see every token besides. Tokens are sorted by expert and multiplied group by group (``jax.lax.ragged_dot``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jrl.numerics.settings import NonNegativeInt, Positive, Settings
from jrl.numerics.types import Params

Array = jax.Array


@dataclass(frozen=True)
class Config(Settings, prefix="moe"):
    """Shape of a mixture of experts."""

    experts: NonNegativeInt = 0  # Number of experts; 0 for a plain feed-forward layer.
    chosen: Positive = 2  # Experts that each token goes through.
    expert_dim: Positive = 128  # Width of an expert.
    shared: NonNegativeInt = 0  # Experts that every token goes through, as one of their joint width.
    scores: Literal["softmax", "sigmoid"] = "softmax"  # Scores of the router, as in Mixtral or in DeepSeek-V3.
    groups: Positive = 1  # Groups of experts, of which a token may choose chosen_groups (sigmoid only).
    chosen_groups: Positive = 1  # Groups chosen: those with the largest sum of their two best scores.
    normalize: bool = True  # The chosen experts' weights sum to one before the factor (always with softmax).
    scale: float = 1.0  # Factor on the chosen experts' weights.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts and self.chosen > self.experts:
            raise ValueError(f"moe.chosen must be at most moe.experts = {self.experts}; got {self.chosen}")
        if self.experts and (self.experts % self.groups or self.chosen_groups > self.groups):
            raise ValueError(
                f"moe.groups must divide moe.experts = {self.experts} and be at least moe.chosen_groups = "
                f"{self.chosen_groups}; got {self.groups}"
            )
        within = self.chosen_groups * self.experts // self.groups
        if self.experts and self.chosen > within:
            raise ValueError(f"moe.chosen must be at most the {within} experts of moe.chosen_groups; got {self.chosen}")
        if self.groups > 1 and self.scores == "softmax":
            raise ValueError("moe.groups needs moe.scores=sigmoid")
        if not self.normalize and self.scores == "softmax":
            raise ValueError("moe.normalize=False needs moe.scores=sigmoid")


def shapes(config: Config, dim: int) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and axis names of each parameter, for tokens of width ``dim``."""
    e, f = config.experts, config.expert_dim
    found: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "router": ((dim, e), ("dim", "experts")),
        "gate": ((e, dim, f), ("experts", "dim", "ffn")),
        "up": ((e, dim, f), ("experts", "dim", "ffn")),
        "down": ((e, f, dim), ("experts", "ffn", "dim")),
    }
    if config.scores == "sigmoid":
        found["bias"] = ((e,), ("experts",))
    if config.shared:
        width = config.shared * f
        found |= {
            "shared_gate": ((dim, width), ("dim", "ffn")),
            "shared_up": ((dim, width), ("dim", "ffn")),
            "shared_down": ((width, dim), ("ffn", "dim")),
        }
    return found


def route(params: Params, x: Array, config: Config) -> tuple[Array, Array]:
    """Experts of each token, int32 ``[N, k]``, and their weights, float32 ``[N, k]``, for tokens ``[N, dim]``."""
    return _choose(params, _logits(params, x), config)


def _logits(params: Params, x: Array) -> Array:
    """The router's, float32 ``[N, E]``, in full precision on every platform: half a width would send tokens elsewhere."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x.astype(wide), params["router"].astype(wide), precision="highest")


def _choose(params: Params, logits: Array, config: Config) -> tuple[Array, Array]:
    if config.scores == "softmax":
        best, chosen = jax.lax.top_k(logits, config.chosen)
        return chosen, jax.nn.softmax(best) * config.scale
    scores = jax.nn.sigmoid(logits)
    biased = jax.lax.stop_gradient(scores + jnp.broadcast_to(params["bias"].astype(jnp.float32), scores.shape))
    if config.groups > 1:
        by_group = biased.reshape(len(logits), config.groups, -1)
        strength = jax.lax.top_k(by_group, min(2, by_group.shape[-1]))[0].sum(-1)
        _, kept = jax.lax.top_k(strength, config.chosen_groups)
        allowed = jax.nn.one_hot(kept, config.groups, dtype=bool).any(1)
        biased = jnp.where(allowed[..., None], by_group, -jnp.inf).reshape(biased.shape)
    _, chosen = jax.lax.top_k(biased, config.chosen)
    weight = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.normalize:
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
    return chosen, weight * config.scale


class Load(NamedTuple):
    """How tokens fell on experts, as sums over tokens: the load of a batch is the sum of the loads of its parts.

    Attributes:
        chosen: tokens that chose each expert, int32 ``[..., E]``.
        probability: softmax of the router's logits, summed over tokens, float32 ``[..., E]``; this has a gradient.
    """

    chosen: Array
    probability: Array


def no_load() -> Load:
    """Of a layer without experts."""
    return Load(jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.float32))


def apply(params: Params, x: Array, config: Config, counted: Array | None = None) -> tuple[Array, Load]:
    """The layer for tokens ``[..., dim]``, and the load of its experts ``[E]`` by the tokens that are ``counted``, bool ``[...]``
    (all if not given): where padding goes is nothing to be evened."""
    tokens = x.reshape(-1, x.shape[-1])
    logits = _logits(params, tokens)
    chosen, weight = _choose(params, logits, config)
    order = jnp.argsort(chosen.ravel(), stable=True)
    sizes = jnp.bincount(chosen.ravel(), length=config.experts).astype(jnp.int32)
    rows = tokens[order // config.chosen]

    def p(name):
        return params[name].astype(x.dtype)

    inner = jax.nn.silu(by_group(rows, p("gate"), sizes)) * by_group(rows, p("up"), sizes)
    outputs = by_group(inner, p("down"), sizes)
    outputs = outputs * weight.ravel()[order][:, None].astype(x.dtype)
    out = jnp.zeros_like(tokens).at[order // config.chosen].add(outputs)
    if config.shared:
        out = out + (jax.nn.silu(tokens @ p("shared_gate")) * (tokens @ p("shared_up"))) @ p("shared_down")
    return out.reshape(x.shape), _load(chosen, logits, counted)


def _load(chosen: Array, logits: Array, counted: Array | None) -> Load:
    counted = jnp.ones(len(chosen), bool) if counted is None else counted.ravel()
    times = jnp.zeros(logits.shape[-1], jnp.int32).at[chosen].add(counted[:, None].astype(jnp.int32))
    return Load(times, jnp.sum(jax.nn.softmax(logits), axis=0, where=counted[:, None]))


def _under_vmap(product: Callable[..., Array]) -> Callable[..., Array]:
    """The product with the groups of all mapped rows side by side, for which JAX has no rule unless all arguments are mapped."""
    one = jax.custom_batching.custom_vmap(product)

    @one.def_vmap
    def rule(size: int, mapped: list[bool], *args: Array) -> tuple[Array, bool]:
        every = [x if m else jnp.broadcast_to(x[None], (size, *x.shape)) for x, m in zip(args, mapped, strict=True)]
        output = one(*(x.reshape(-1, *x.shape[2:]) for x in every))
        return output.reshape(size, -1, *output.shape[1:]), True

    return one


_OUTER = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
_times = _under_vmap(lambda x, w, sizes: jax.lax.ragged_dot(x, w, sizes))
_outer = _under_vmap(lambda x, y, sizes: jax.lax.ragged_dot_general(x, y, sizes, _OUTER))


@jax.custom_vjp
def by_group(x: Array, w: Array, sizes: Array) -> Array:
    """``[N, d]`` times ``[E, d, f]``: so many rows as ``sizes [E]`` says with each matrix in turn, ``[N, f]``."""
    return _times(x, w, sizes)


def _backward(saved: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    x, w, sizes = saved
    return _times(dy, w.mT, sizes), _outer(x, dy, sizes).astype(w.dtype), None


by_group.defvjp(lambda x, w, sizes: (_times(x, w, sizes), (x, w, sizes)), _backward)


def balance(bias: Array, chosen: Array, rate: Array | float = 1e-3) -> Array:
    """The bias ``[..., E]`` after a step: up by ``rate`` where an expert was ``chosen`` less often than the mean, down where more often.

    2412.19437, section 2.1.2 (auxiliary-loss-free balancing, 2408.15664).
    """
    step = rate * jnp.sign(chosen.mean(-1, keepdims=True) - chosen)
    return bias + step.astype(bias.dtype)


def balance_loss(load: Load, config: Config) -> Array:
    """``E sum_i f_i P_i``, averaged over layers: least where the load is even, and k there (2101.03961, eq. 4-6).

    f_i is the number of tokens that chose expert i over the number of tokens, so that the f of a layer sum to k, as in Mixtral of
    ``transformers``; P_i is the mean probability of expert i. 0 without tokens.
    """
    tokens = jnp.maximum(load.chosen.sum(-1, keepdims=True) / config.chosen, 1)
    f, p = load.chosen / tokens, load.probability / tokens
    return config.experts * jnp.mean(jnp.sum(f * p, axis=-1))
