"""Gradient transforms for training at half width, in optax's form.

Each wraps another transform and computes it in float32; alone (without one) it stands in an ``optax.chain`` as is:

    stochastic_rounding(optax.adam(1e-3))
    optax.chain(in_float32(optax.adam(1e-3)), stochastic_rounding())      the same

In a chain, what comes before should be ``in_float32``: by itself optax's Adam keeps bfloat16 moments for bfloat16
parameters, and rounds its decay of 0.999 to 1.

A bfloat16 number has 8 significant bits: adding less than 1/512 of it changes nothing when rounded to nearest, so that
plain bfloat16 parameters stall. Stochastic rounding moves them rightly on average, Kahan summation carries what was lost in
a second bfloat16 (both: Zamirai et al. 2020, arXiv 2010.06192), a float32 master copy loses nothing (Micikevicius et al.
2018, arXiv 1710.03740, section 3.1).

Updates leave in float32: the difference between the rounded parameter and the old one, for ``optax.apply_updates``.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jrl.numerics.precision import cast
from jrl.numerics.types import Gradients, OptState, Params

Array = jax.Array
Transform: TypeAlias = optax.GradientTransformation
IDENTITY = optax.identity()


class _Rounded(NamedTuple):
    inner: Any
    key: Array


class _Compensated(NamedTuple):
    inner: Any
    lost: Any  # dtype of the parameters: what they still lack


class _Master(NamedTuple):
    inner: Any
    params: Params  # float32


class LossScale(NamedTuple):
    """State of ``dynamic_loss_scaling``: the scale (float32), and the good steps in a row at that scale (int32)."""

    inner: Any
    scale: Array
    steps: Array


def in_float32(inner: Transform) -> Transform:
    """``inner`` on gradients and parameters in float32, whatever their dtype; parameters are rounded to nearest."""

    def update(grads: Gradients, state: Any, params: Params = None) -> tuple[Any, Any]:
        return inner.update(cast(grads, "float32"), state, cast(params, "float32"))

    return Transform(lambda params: inner.init(cast(params, "float32")), update)


def stochastic_rounding(inner: Transform = IDENTITY, key: Array | None = None) -> Transform:
    """Parameters rounded up or down with the probability that makes the mean right.

    bfloat16 leaves are rounded so; float32 leaves need no rounding. ``key`` (default ``jax.random.key(0)``) is kept in the
    state and split at every step. Raises ``ValueError`` for float16 parameters.
    """

    def init(params: Params) -> _Rounded:
        if any(p.dtype == jnp.float16 for p in jax.tree.leaves(params)):
            raise ValueError("stochastic rounding is for bfloat16 and float32 parameters; got float16")
        return _Rounded(inner.init(cast(params, "float32")), _own_key(key, 1))

    def update(grads: Gradients, state: _Rounded, params: Params = None) -> tuple[Any, _Rounded]:
        _need(params, "stochastic_rounding")
        wide = cast(params, "float32")
        updates, inner_state = inner.update(cast(grads, "float32"), state.inner, wide)
        key, key_now = jax.random.split(state.key)
        wanted = jax.tree.map(lambda p, u: p + u, wide, updates)
        rounded = round_tree(key_now, wanted, params)
        return jax.tree.map(lambda new, p: new - p, rounded, wide), _Rounded(inner_state, key)

    return Transform(init, update)


def kahan_summation(inner: Transform = IDENTITY) -> Transform:
    """Parameters whose rounding errors are carried in a second array of their dtype and added to the next step."""

    def init(params: Params) -> _Compensated:
        return _Compensated(inner.init(cast(params, "float32")), jax.tree.map(jnp.zeros_like, params))

    def update(grads: Gradients, state: _Compensated, params: Params = None) -> tuple[Any, _Compensated]:
        _need(params, "kahan_summation")
        wide = cast(params, "float32")
        updates, inner_state = inner.update(cast(grads, "float32"), state.inner, wide)
        wanted = jax.tree.map(lambda u, c: u + c, updates, cast(state.lost, "float32"))
        steps = jax.tree.map(lambda p, y, like: nearest(p + y, like.dtype) - p, wide, wanted, params)
        lost = jax.tree.map(lambda y, s, c: (y - s).astype(c.dtype), wanted, steps, state.lost)
        return steps, _Compensated(inner_state, lost)

    return Transform(init, update)


def master_weights(inner: Transform = IDENTITY) -> Transform:
    """Parameters that are the rounding of a float32 copy, which is what ``inner`` steps.

    A float32 parameter is its own copy, so that what moves it between steps lasts (the bias of a router: ``moe.balance``).
    """

    def init(params: Params) -> _Master:
        # A copy even where the parameters are float32 already: both may be donated to one program.
        master = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
        return _Master(inner.init(master), master)

    def update(grads: Gradients, state: _Master, params: Params = None) -> tuple[Any, _Master]:
        _need(params, "master_weights")
        master = jax.tree.map(lambda m, p: p if p.dtype == jnp.float32 else m, state.params, params)
        updates, inner_state = inner.update(cast(grads, "float32"), state.inner, master)
        master = jax.tree.map(lambda m, u: m + u, master, updates)
        wide = cast(params, "float32")
        steps = jax.tree.map(lambda m, p, like: nearest(m, like.dtype) - p, master, wide, params)
        return steps, _Master(inner_state, master)

    return Transform(init, update)


def bfloat16_moments(inner: Transform, key: Array | None = None) -> Transform:
    """``inner`` with what its state keeps for each parameter in bfloat16, rounded stochastically; all else stays as it is.

    Rounded to nearest, an Adam second moment with a decay of 0.999 would never fall: each step changes it by less than
    half of its last bit.
    """

    def narrow(key: Array, state: Any) -> Any:
        moment = optax.tree_utils.tree_map_params(
            inner, lambda x: x.dtype == jnp.float32, state, transform_non_params=lambda x: False
        )
        like = jax.tree.map(lambda x, yes: jax.ShapeDtypeStruct((), "bfloat16") if yes else x, state, moment)
        rounded = round_tree(key, state, like)
        return jax.tree.map(lambda x, yes: x.astype("bfloat16") if yes else x, rounded, moment)

    def init(params: Params) -> _Rounded:
        key_state, key_init = jax.random.split(_own_key(key, 2))
        return _Rounded(narrow(key_init, inner.init(cast(params, "float32"))), key_state)

    def update(grads: Gradients, state: _Rounded, params: Params = None) -> tuple[Any, _Rounded]:
        key, key_now = jax.random.split(state.key)
        wide = cast(state.inner, "float32")
        updates, inner_state = inner.update(cast(grads, "float32"), wide, cast(params, "float32"))
        return updates, _Rounded(narrow(key_now, inner_state), key)

    return Transform(init, update)


def dynamic_loss_scaling(
    inner: Transform = IDENTITY, initial: float = 2.0**15, growth_interval: int = 1000, most: float = 2.0**24
) -> Transform:
    """Gradients of a loss that was multiplied by ``loss_scale(state)``, unscaled (1710.03740, section 3.2).

    Where a gradient is not finite, nothing is stepped (neither parameters nor the state of ``inner``) and the scale is
    halved, to at least 1; after ``growth_interval`` good steps it is doubled, to at most ``most``: the usual practice.
    Stateful transforms belong into ``inner``, so that they too skip the step: ``dynamic_loss_scaling(optax.adam(1e-3))``.
    """

    def init(params: Params) -> LossScale:
        state = inner.init(params)
        # Gradients come in float32, so an optimizer of half-width parameters keeps wider state after its first update.
        grads = cast(jax.tree.map(jnp.zeros_like, params), "float32")
        later = jax.eval_shape(inner.update, grads, state, params)[1]
        state = jax.tree.map(lambda x, to: x if x.dtype == to.dtype else x.astype(to.dtype), state, later)
        return LossScale(state, jnp.float32(initial), jnp.int32(0))

    def update(grads: Gradients, state: LossScale, params: Params = None) -> tuple[Any, LossScale]:
        grads = jax.tree.map(lambda g: g / state.scale, cast(grads, "float32"))
        good = jnp.stack([jnp.bool_(True), *(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))]).all()
        finite = jax.tree.map(lambda g: jnp.where(good, g, 0.0), grads)
        updates, inner_state = inner.update(finite, state.inner, params)
        updates = jax.tree.map(lambda u: jnp.where(good, u, 0.0), updates)
        inner_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), inner_state, state.inner)
        steps = jnp.where(good, state.steps + 1, 0)
        grow = steps >= growth_interval
        scale = jnp.where(good, jnp.where(grow, state.scale * 2, state.scale), state.scale / 2)
        return updates, LossScale(inner_state, jnp.clip(scale, 1.0, most), jnp.where(grow, 0, steps))

    return Transform(init, update)


def loss_scale(opt_state: OptState) -> Array | float:
    """The factor that the loss wants before it is differentiated: of ``dynamic_loss_scaling`` in the state, else 1."""
    for node in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, LossScale)):
        if isinstance(node, LossScale):
            return node.scale
    return 1.0


def nearest(x: Array, dtype: Any) -> Array:
    """float32 ``x`` rounded to the numbers of ``dtype``, as float32. XLA may drop a cast there and back; this it keeps."""
    if dtype == jnp.bfloat16:
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    # Reducing the precision to float16's would flush its subnormal numbers.
    return x if dtype == jnp.float32 else jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)


def stochastic(key: Array, x: Array) -> Array:
    """float32 ``x`` rounded to bfloat16's numbers with the right mean, as float32; what is not finite stays.

    The 16 bits that bfloat16 lacks carry into the rest when random bits are added to them.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x)


def round_tree(key: Array, tree: Any, like: Any) -> Any:
    """Leaves rounded stochastically, as float32, where ``like`` is bfloat16; all others as they are."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(1, len(leaves)))[: len(leaves)]
    narrow = [x.dtype == jnp.bfloat16 for x in jax.tree.leaves(like)]
    rounded = [stochastic(k, x) if yes else x for k, x, yes in zip(keys, leaves, narrow, strict=True)]
    return jax.tree.unflatten(structure, rounded)


def _own_key(key: Array | None, purpose: int) -> Array:
    """A key of the transform's own, so that neither a key given to several nor a default is used twice."""
    return jax.random.fold_in(jax.random.key(0) if key is None else key, purpose)


def _need(params: Params, name: str) -> None:
    if params is None:
        raise ValueError(f"{name} needs the parameters: update(grads, state, params)")
