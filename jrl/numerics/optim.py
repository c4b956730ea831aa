"""Optimizers from optax, put together from one typed configuration, their numbers traced.

``make`` builds an ``optax.GradientTransformation`` from numbers that may be traced. Call it where you use it, in the
``init`` and again in each ``update``: the state's structure does not depend on the numbers, so nothing is closed over
and a learning rate, a beta or a weight decay can differ between vmapped runs.

    tx = optim.make(OptimizerConfig("adamw", clip="none"), Hyper(weight_decay=0.1), learning_rate=1e-3)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from jrl.numerics import checks, host, parameters, precision, rounding
from jrl.numerics.parameters import Kind
from jrl.numerics.settings import AboveZero, BelowOne, NonNegative, Positive, Settings, Unit, check
from jrl.numerics.types import Gradients, OptState, Params

Array = jax.Array
Name = Literal["sgd", "adam", "adamw", "rmsprop", "lion", "muon", "schedule_free_adamw"]
Schedule = Literal["constant", "linear", "cosine", "piecewise"]
Clip = Literal["norm", "value", "adaptive", "none"]
Rounding = Literal["nearest", "stochastic", "kahan", "master"]
DECOUPLED = ("adamw", "lion", "muon", "schedule_free_adamw")  # decay weights by themselves


@dataclass(frozen=True)
class OptimizerConfig(Settings, prefix="optimizer"):
    """What an optimizer is made of; its numbers are in ``Hyper``.

    ``adam`` is 1412.6980, ``adamw`` 1711.05101, ``lion`` 2302.06675, ``muon`` Jordan 2024 (adam for embeddings, output heads and what
    is no matrix), ``schedule_free_adamw`` 2405.15682 (best with a constant schedule); ``rmsprop`` corrects its bias.
    """

    name: Name = "adam"  # Rule that turns gradients into steps.
    # Course of the learning rate over the run: constant, linear or cosine down to hyper.optimizer.final of it, or piecewise, times hyper.optimizer.drop
    # at each share in drops.
    schedule: Schedule = "linear"
    warmup: Unit = 0.0  # Share of the run over which the learning rate first rises from 0.
    drops: tuple[Unit, ...] = (0.5, 0.75)  # Shares of the run at which the piecewise schedule drops.
    # Clipping of gradients: by global norm, by value, adaptive (a ratio to each unit's weights, 2102.06171), or none.
    clip: Clip = "norm"
    nesterov: bool = False  # Nesterov momentum for sgd and muon.
    l2: bool = False  # Add weight decay to the gradient, before the optimizer scales it, for sgd, adam and rmsprop.
    # Kinds of parameters that weight decay spares: weights, biases (and whatever else is no matrix), norms, embeddings.
    no_decay: tuple[Kind, ...] = ("biases", "norms", "embeddings")
    accumulate: Positive = 1  # Number of gradients that are averaged into one step.
    # Evaluate with an exponential moving average of the parameters, of decay hyper.optimizer.ema_decay.
    ema: bool = False
    # How parameters of half width are stepped: to the nearest, stochastically, by Kahan's sum, or from a float32 master copy.
    rounding: Rounding = "nearest"
    moments: Literal["float32", "bfloat16"] = "float32"  # Dtype of its state; bfloat16 is rounded stochastically.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.name not in ("sgd", "muon"):
            raise ValueError(f"optimizer.nesterov is for sgd and muon; got {self.name}")
        if self.l2 and self.name in DECOUPLED:
            raise ValueError(f"optimizer.l2 is for sgd, adam and rmsprop; {self.name} decays weights by itself")
        if self.name == "schedule_free_adamw" and (self.ema or self.moments != "float32"):
            raise ValueError(
                "schedule_free_adamw averages parameters by itself, in float32: no optimizer.ema or moments"
            )

    @property
    def uses_length(self) -> bool:
        """Whether the learning rate depends on how long the run is."""
        return self.schedule != "constant" or self.warmup > 0


CONSTANT_ADAM = OptimizerConfig(schedule="constant", clip="none")  # as it stands in most papers


class Hyper(NamedTuple):
    """Numbers of the optimizer, floats or traced float32 scalars; each may be swept.

    A decay of 1 would divide by 1 - 1, and an eps of 0 would divide 0 by 0 where a gradient is 0.
    """

    # Decay of the first moment (adam's family, lion); the interpolation of schedule_free_adamw, at least 0.1.
    b1: BelowOne = 0.9
    b2: BelowOne = 0.999  # Decay of the second moment (adam's family, rmsprop), or of lion's momentum.
    eps: AboveZero = 1e-5  # Added to the root of the second moment.
    # Decay of the weights in a step, times the learning rate; for adamw, lion, muon, schedule_free_adamw, and with l2 for the others.
    weight_decay: NonNegative = 1e-2
    momentum: BelowOne = 0.9  # Momentum of sgd and muon.
    final: NonNegative = 0.0  # Learning rate at the end of a linear or cosine schedule, as a share of its start.
    drop: NonNegative = 0.1  # Factor on the learning rate at each drop of a piecewise schedule.
    ema_decay: BelowOne = 0.999  # Decay per step of the parameters' moving average.


def check_hyper(prefix: str, hyper: Hyper) -> None:
    """Raise ``ValueError`` for a concrete number outside its range, or any of half width: in bfloat16 0.999 is 1."""
    for name, value in hyper._asdict().items():
        dtype = getattr(value, "dtype", None)
        if dtype in (jnp.bfloat16, jnp.float16):
            raise ValueError(f"{prefix}.{name} must be float32; got {dtype}, in which 0.999 may round to 1")
    check(prefix, hyper)


Numbers = Annotated[Hyper, check_hyper]  # a field of an algorithm's hyperparameters


def schedule(config: OptimizerConfig, hyper: Hyper, progress: Array | float, step: Array | float = 0.0) -> Array:
    """Factor on the learning rate at ``progress`` in [0, 1] of the run, float32.

    ``step`` is the share of the run until the next one: the warm-up counts to its end, so that the first is not lost.
    """
    progress = jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0)
    warm = (progress + step) / config.warmup if config.warmup else jnp.ones_like(progress)
    rest = jnp.clip((progress - config.warmup) / max(1 - config.warmup, 1e-6), 0.0, 1.0)
    match config.schedule:
        case "constant":
            factor = jnp.ones_like(progress)
        case "linear":
            factor = 1 - (1 - hyper.final) * rest
        case "cosine":
            factor = hyper.final + (1 - hyper.final) * 0.5 * (1 + jnp.cos(jnp.pi * rest))
        case "piecewise":
            dropped = [jnp.where(progress >= at, hyper.drop, 1.0) for at in config.drops]
            factor = jnp.prod(jnp.stack([jnp.ones_like(progress), *dropped]), axis=0)
    return (jnp.minimum(warm, 1.0) * factor).astype(jnp.float32)


def make(
    config: OptimizerConfig = OptimizerConfig(),
    hyper: Hyper = Hyper(),
    learning_rate: Array | float = 1e-3,
    max_grad: Array | float = float("inf"),
    key: Array | None = None,
) -> optax.GradientTransformation:
    """Clip gradients to ``max_grad``, step as configured, round to the parameters' dtype; all in float32, whatever is given.

    ``max_grad`` is the global norm, the value or the ratio of ``config.clip``. ``key`` seeds stochastic rounding, and is used
    by ``init`` alone. The schedule is not in it: give the learning rate of now. Raises ``ValueError`` for a number that is
    out of range, or would make NaNs.
    """
    check_hyper("hyper", hyper)
    checks.within("learning_rate", learning_rate, 0, float("inf"))
    if config.name == "schedule_free_adamw":
        checks.within("b1 of schedule_free_adamw", hyper.b1, 0.1, 1)
    if not isinstance(max_grad, jax.core.Tracer) and not float(max_grad) > 0:
        raise ValueError(f"gradients must be clipped to more than 0; got {max_grad}")
    hyper, learning_rate, max_grad = jax.tree.map(_float32, (hyper, learning_rate, max_grad))
    key_moments, key_params = (None, None) if key is None else jax.random.split(key)
    tx = optax.chain(_clip(config, max_grad), _step(config, hyper, learning_rate))
    if config.moments == "bfloat16":
        tx = rounding.bfloat16_moments(tx, key_moments)
    if config.ema:
        tx = parameter_average(tx, hyper.ema_decay)
    if config.accumulate > 1:
        tx = optax.MultiSteps(tx, config.accumulate).gradient_transformation()
    match config.rounding:
        case "nearest":
            tx = rounding.in_float32(tx)
            return _refuse_half_width(tx) if config.name == "schedule_free_adamw" else tx
        case "stochastic":
            return rounding.stochastic_rounding(tx, key_params)
        case "kahan":
            return rounding.kahan_summation(tx)
        case "master":
            return rounding.master_weights(tx)


def _float32(number: Array | float) -> Array | float:
    """A number that leaves float32 arrays what they are under ``jax_enable_x64``, too: a Python float stays one."""
    return float(number) if isinstance(number, (int, float)) else jnp.asarray(number, jnp.float32)


def _refuse_half_width(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    def init(params: Params) -> Any:
        if any(p.dtype != jnp.float32 for p in jax.tree.leaves(params)):
            raise ValueError(
                "schedule_free_adamw at half width needs optimizer.rounding stochastic, kahan or master: it would follow "
                "parameters that rounding holds back"
            )
        return tx.init(params)

    return optax.GradientTransformation(init, tx.update)


def _clip(config: OptimizerConfig, most: Array | float) -> optax.GradientTransformation:
    match config.clip:
        case "norm":
            return _clip_by_global_norm(most)
        case "value":
            return optax.clip(most)
        case "adaptive":
            return _clip_by_unit(most)
        case "none":
            return optax.identity()


def _clip_by_global_norm(most: Array | float) -> optax.GradientTransformation:
    """Gradients scaled down to a global norm of at most ``most``."""

    def clip(grads: Gradients, params: Params = None) -> Any:
        norm = global_norm(grads)
        return jax.tree.map(lambda g: jnp.where(norm < most, g, g / norm.astype(g.dtype) * most), grads)

    return optax.stateless(clip)


def _clip_by_unit(most: Array | float) -> optax.GradientTransformation:
    """Gradients of each unit scaled down to a norm of at most ``most`` times its weights', or times 1e-3 (2102.06171, section 4).

    A unit is a column of a matrix, the weights into one output; a vector is one as a whole.
    """

    def clip(grads: Gradients, params: Params = None) -> Any:
        def leaf(path: parameters.Names, grad: Array, param: Array) -> Array:
            rows = parameters.axes_of(path, param).rows
            norm, weight = (jnp.sqrt(jnp.sum(jnp.square(x), rows, keepdims=True)) for x in (grad, param))
            largest = most * jnp.maximum(weight, 1e-3)
            # The division is safe where it is not chosen, too.
            return grad * jnp.where(norm < largest, 1.0, largest / jnp.maximum(norm, 1e-6))

        return parameters.map_with_names(leaf, grads, params)

    return optax.stateless(clip)


def global_norm(tree: Any) -> Array:
    """The Euclidean norm of all leaves together; on a GPU in one reduction, where each leaf would cost a kernel launch or two."""
    if host.platform() != "gpu":
        return optax.global_norm(tree)
    return jnp.sqrt(jnp.sum(jnp.square(jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)]))))


def _step(config: OptimizerConfig, hyper: Hyper, learning_rate: Array | float) -> optax.GradientTransformation:
    """From gradients to updates, by optax's transforms."""
    h = hyper
    decay = optax.add_decayed_weights(h.weight_decay, decays(config.no_decay))
    lr = optax.scale_by_learning_rate(learning_rate)
    match config.name:
        case "sgd":
            parts = [optax.trace(h.momentum, config.nesterov), lr]
        case "adam":
            parts = [optax.scale_by_adam(h.b1, h.b2, h.eps), lr]
        case "adamw":
            parts = [optax.scale_by_adam(h.b1, h.b2, h.eps), decay, lr]
        case "rmsprop":
            parts = [optax.scale_by_rms(h.b2, h.eps, eps_in_sqrt=False, bias_correction=True), lr]
        case "lion":
            parts = [optax.scale_by_lion(h.b1, h.b2), decay, lr]
        case "muon":
            parts = [_muon(h, config.nesterov), decay, lr]
        case "schedule_free_adamw":
            base = optax.chain(optax.scale_by_rms(h.b2, h.eps, eps_in_sqrt=False, bias_correction=True), decay, lr)
            # It divides by b1 to find its average again, rounding and all; traced numbers were not checked.
            parts = [contrib.schedule_free(base, learning_rate, jnp.maximum(h.b1, 0.1))]
    return optax.chain(*([decay] if config.l2 else []), *parts)


# Keller Jordan's (https://kellerjordan.github.io/posts/muon): five steps of it bring singular values near 1.
NEWTON_SCHULZ = np.array([3.4445, -4.7750, 2.0315], np.float32)


def _muon(h: Hyper, nesterov: bool) -> optax.GradientTransformation:
    """The momentum of each matrix, made orthogonal; Adam for embeddings, output heads and what is no matrix (Jordan 2024).

    Each layer, expert and branch has matrices of its own; queries, keys and values have one each, of all heads together. Steps
    are as large as Adam's, so that one learning rate serves both (2502.16982, section 2.2).
    """

    def matrices(params: Params) -> Any:
        return parameters.map_with_names(_muon_matrix, params)

    def labels(params: Params) -> Any:
        return parameters.map_with_names(lambda path, p: "muon" if _muon_matrix(path, p) else "adam", params)

    def as_large_as_adam(updates: Any, params: Params = None) -> Any:
        def leaf(path: parameters.Names, update: Array) -> Array:
            _, rows, columns = parameters.axes_of(path, update)
            size = max(math.prod(update.shape[i] for i in axes) for axes in (rows, columns))
            return 0.2 * size**0.5 * update

        return parameters.map_with_names(leaf, updates)

    orthogonal = contrib.scale_by_muon(
        NEWTON_SCHULZ, beta=h.momentum, eps=1e-7, nesterov=nesterov, weight_dimension_numbers=matrices
    )
    muon = optax.chain(orthogonal, optax.stateless(as_large_as_adam))
    return optax.partition({"muon": muon, "adam": optax.scale_by_adam(h.b1, h.b2, h.eps)}, labels)


def _muon_matrix(path: parameters.Names, param: Array) -> contrib.MuonDimensionNumbers | None:
    """The axes of a parameter that Muon steps; None for one that it leaves to Adam."""
    if parameters.kind_of(path, param) != "weights" or parameters.is_head(path):
        return None
    _, rows, columns = parameters.axes_of(path, param)
    return contrib.MuonDimensionNumbers(rows, columns) if columns else None


def decays(no_decay: tuple[Kind, ...]) -> Callable[[Any], Any]:
    """The mask of weight decay: true for parameters whose kind is not in ``no_decay``."""
    return lambda params: parameters.map_with_names(lambda path, p: parameters.kind_of(path, p) not in no_decay, params)


class ParameterAverage(NamedTuple):
    """State of ``parameter_average``."""

    inner: Any
    average: Any


def parameter_average(inner: optax.GradientTransformation, decay: Array | float) -> optax.GradientTransformation:
    """Beside ``inner``'s steps, the exponential moving average of the parameters they lead to (Polyak & Juditsky 1992).

    It is float32, and starts at the initial parameters; ``eval_params`` finds it in the state.
    """

    def init(params: Params) -> ParameterAverage:
        average = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
        return ParameterAverage(inner.init(params), average)

    def update(grads: Gradients, state: ParameterAverage, params: Params = None) -> tuple[Any, ParameterAverage]:
        updates, inner_state = inner.update(grads, state.inner, params)
        reached = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p.astype(jnp.float32), state.average, reached)
        return updates, ParameterAverage(inner_state, average)

    return optax.GradientTransformation(init, update)


def own(optimizer: Any, hyper: Any, learning_rate: Array | float) -> optax.GradientTransformation:
    """A user's optimizer: an optax transformation, or what a function of the hyperparameters and the learning rate gives. Raises
    ``ValueError`` for anything else."""
    made = optimizer if isinstance(optimizer, optax.GradientTransformation) else None
    if made is None and str(getattr(optimizer, "__module__", "")).startswith("optax"):
        name = optimizer.__name__
        raise ValueError(
            f"optimizer: optax.{name} must be called, as in optax.{name}(1e-3), or stand in a function (hyper, learning_rate)"
        )
    if made is None and callable(optimizer):
        made = optimizer(hyper, learning_rate)
    if not isinstance(made, optax.GradientTransformation):
        raise ValueError(
            "optimizer must be an optax transformation, or a function (hyper, learning_rate) that gives one; "
            f"got {repr(optimizer)[:60]}" + ("" if made is None else f", which gives {repr(made)[:60]}")
        )
    return _in_float32(made)


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation computed in float32, whatever the dtype of the parameters: its state keeps its dtypes."""

    def init(params: Params) -> Any:
        return tx.init(precision.cast(params, "float32"))

    def update(updates: Any, state: Any, params: Params | None = None) -> tuple[Any, Any]:
        return tx.update(precision.cast(updates, "float32"), state, precision.cast(params, "float32"))

    return optax.GradientTransformation(init, update)


def eval_params(opt_state: OptState, params: Params) -> Any:
    """The parameters to evaluate: the moving average, or what a schedule-free optimizer is after, else ``params``."""
    kinds = (ParameterAverage, contrib.ScheduleFreeState)
    for node in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(node, kinds):
            average = isinstance(node, ParameterAverage)
            found = node.average if average else contrib.schedule_free_eval_params(node, params)
            return jax.tree.map(lambda x, p: x.astype(p.dtype), found, params)
    return params


def copied(params: Params) -> Params:
    """The parameters of a target network when it begins: those of the other, float32, in memory of their own."""
    return jax.tree.map(jnp.copy, precision.cast(params, "float32"))


def target_share(every: int, updates: Array, tau: Array | float) -> Array:
    """How far a target network goes after ``updates`` updates: all the way at each ``every`` of them, or ``tau`` if that is 0."""
    return jnp.where(updates % every == 0, 1.0, 0.0) if every else jnp.asarray(tau)


def towards(target: Any, params: Params, share: Array | float) -> Any:
    """``target + share (params - target)`` in float32, in the target's dtypes."""
    moved = optax.incremental_update(precision.cast(params, "float32"), precision.cast(target, "float32"), share)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, target)


class Step(NamedTuple):
    """What one gradient step leaves: parameters, optimizer state, the loss's extra output, and the gradients' norm."""

    params: Params
    opt_state: OptState
    extra: Any
    grad_norm: Array


def minimize(
    tx: optax.GradientTransformation, loss: Callable[[Any], tuple[Array, Any]], params: Params, opt_state: OptState
) -> Step:
    """One step down ``loss: params -> (float32 scalar, extra)``, scaled as the optimizer's state asks.

    ``grad_norm`` is before clipping, and 0 where a scaled gradient overflowed and the step was skipped.
    """
    scale = rounding.loss_scale(opt_state)

    def scaled(params: Params) -> tuple[Array, Any]:
        value, extra = loss(params)
        return value * scale, extra

    grads, extra = jax.grad(scaled, has_aux=True)(params)
    grads = precision.cast(grads, "float32")
    norm = global_norm(grads) / scale
    if not isinstance(scale, float):
        norm = jnp.where(jnp.isfinite(norm) | (scale <= 1), norm, 0.0)
    updates, opt_state = tx.update(grads, opt_state, params)
    return Step(optax.apply_updates(params, updates), opt_state, extra, norm)
