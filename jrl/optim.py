"""Optimizers from optax, their numbers traced.

``make`` builds an ``optax.GradientTransformation`` from numbers that may be traced. Call it where you use it, in the
``init`` and again in each ``update``: the state's structure does not depend on the numbers, so nothing is closed over
and a learning rate, a beta or a weight decay can differ between vmapped runs.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from jrl import checks

Array = jax.Array
Name = Literal["adam", "adamw", "sgd"]
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Config:
    """What an optimizer is made of; its numbers are in ``Hyper``.

    Attributes:
        name: adam (Kingma & Ba 2015, arXiv 1412.6980), adamw (Loshchilov & Hutter 2019, arXiv 1711.05101), or sgd
            with momentum.
        schedule: course of the learning rate over the run: constant, linear to 0, or cosine to 0.
        nesterov: Nesterov momentum for sgd.
    """

    name: Name = "adam"
    schedule: Schedule = "linear"
    nesterov: bool = False

    def __post_init__(self) -> None:
        checks.one_of("optimizer.name", self.name, get_args(Name))
        checks.one_of("optimizer.schedule", self.schedule, get_args(Schedule))


class Hyper(NamedTuple):
    """Numbers of the optimizer, floats or traced scalars; each may be swept.

    Attributes:
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.
        eps: added to the root of Adam's second moment.
        weight_decay: decoupled decay of adamw, on weights only (arrays of two or more axes), a share of the step.
        momentum: of sgd.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-5
    weight_decay: float = 1e-2
    momentum: float = 0.9


def schedule(name: Schedule, progress: Array) -> Array:
    """Factor on the learning rate at ``progress`` in [0, 1] of the run, float32."""
    progress = jnp.clip(progress, 0.0, 1.0)
    match name:
        case "constant":
            return jnp.ones_like(progress)
        case "linear":
            return 1 - progress
        case "cosine":
            return 0.5 * (1 + jnp.cos(jnp.pi * progress))


def make(
    config: Config, hyper: Hyper, learning_rate: Array | float, max_grad_norm: Array | float
) -> optax.GradientTransformation:
    """Clip by global norm, then the configured optimizer, then the learning rate."""
    match config.name:
        case "sgd":
            scale = optax.trace(decay=hyper.momentum, nesterov=config.nesterov)
        case "adam":
            scale = optax.scale_by_adam(hyper.b1, hyper.b2, hyper.eps)
        case "adamw":
            scale = optax.chain(
                optax.scale_by_adam(hyper.b1, hyper.b2, hyper.eps),
                optax.add_decayed_weights(hyper.weight_decay, mask=is_weight),
            )
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), scale, optax.scale_by_learning_rate(learning_rate))


def is_weight(params: Any) -> Any:
    """True for weight matrices and kernels, False for biases, norms and other vectors; the mask of weight decay."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)
