"""What reward models have in common: a decoder, all of it trained or a little beside it, and a linear head on its stream."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algorithm import Metrics, current_optimizer, start_learning
from jrl.lm.model import Model
from jrl.lm.policy import adapted
from jrl.numerics import loops, optim
from jrl.numerics.types import Params

Array = jax.Array


class Scorer(NamedTuple):
    """The parts of a learner; a state has the ``fields`` and any others.

    Attributes:
        fields: ``(key, params, hyper, num_updates=None) -> {name: value}`` of a state: params, frozen, opt_state, updates, num_updates, hyper.
        parameters: ``state -> {"body", "head"}`` of the reward model as it is now.
        learn: ``(state, batch) -> (state, Metrics)``.
        evaluate: ``(state, batch) -> Metrics`` of the parameters as they are now.
    """

    fields: Callable[..., dict[str, Any]]
    parameters: Callable[[Any], Any]
    learn: Callable[[Any, Any], tuple[Any, Metrics]]
    evaluate: Callable[[Any, Any], Metrics]


class Learner(NamedTuple):
    """A reward model's algorithm without its task: batches may come from anywhere.

    Attributes:
        init: ``(key, params, hyper, num_updates=None) -> State``.
        parameters: ``State -> {"body", "head"}`` of the reward model as it is now.
        learn: ``(state, batch) -> (State, Metrics)``.
        evaluate: ``(state, batch) -> Metrics``.
    """

    init: Callable[..., Any]
    parameters: Callable[[Any], Any]
    learn: Callable[..., tuple[Any, Metrics]]
    evaluate: Callable[..., Metrics]


def scorer(
    model: Model,
    config: Any,
    weigh: Callable[[Any], Array],
    scored: Callable[[Any, Any, Any, Array], tuple[Array, Metrics, Any]],
) -> Scorer:
    """A learner of a decoder and a head.

    Args:
        model: The decoder.
        config: Settings with the fields batch_size, micro_batches, adapter, optimizer and precision.
        weigh: ``batch ->`` how much each of its labels counts, of a sum of 1.
        scored: ``(params {"body", "head"}, hyper, batch, weight) -> (loss, metrics, load)``, sums by these weights.

    Raises ``ValueError`` for settings that do not fit each other.
    """
    if config.batch_size % config.micro_batches:
        raise ValueError(
            f"config.micro_batches must divide batch_size = {config.batch_size}; got {config.micro_batches}"
        )
    adapter = model.adapter(config.adapter)

    def learn(state: Any, batch: Any) -> tuple[Any, Metrics]:
        tx = current_optimizer(config, state)
        step = optim.minimize(tx, lambda p: loss(whole(state, p), state.hyper, batch), state.params, state.opt_state)
        metrics, load = step.extra
        params = step.params
        if config.adapter.trains_all:
            params |= {"body": model.balance(params["body"], load)}
        state = state._replace(params=params, opt_state=step.opt_state, updates=state.updates + 1)
        return state, metrics | {"grad_norm": step.grad_norm}

    def loss(params: Any, hyper: Any, batch: Any) -> tuple[Array, tuple[Metrics, Any]]:
        """Of a batch: the sum over its micro-batches, plus the loss of the experts' load."""

        def part(x: tuple[Any, Array]) -> tuple[Array, Metrics, Any]:
            return scored(params, hyper, *x)

        total, metrics, load = loops.sum_over_parts(part, (batch, weigh(batch)), config.micro_batches)
        return total + hyper.balance_weight * model.balance_loss(load), (metrics, load)

    def fields(key: Array, params: Params, hyper: Any, num_updates: Array | int | None = None) -> dict[str, Any]:
        key_adapter, key_optimizer = jax.random.split(key)
        trained = {"body": adapter.init(key_adapter, params), "head": jnp.zeros(width_of(model, params), jnp.float32)}
        frozen = () if config.adapter.trains_all else jax.tree.map(jnp.copy, params)
        return start_learning(config, hyper, trained, key_optimizer, num_updates) | {"frozen": frozen}

    def whole(state: Any, trained: Params) -> Any:
        return {"body": adapted(model, adapter, state.frozen, trained["body"]), "head": trained["head"]}

    def parameters(state: Any) -> Any:
        return whole(state, optim.eval_params(state.opt_state, state.params))

    def evaluate(state: Any, batch: Any) -> Metrics:
        return loss(parameters(state), state.hyper, batch)[1][0]

    return Scorer(fields, parameters, learn, evaluate)


def width_of(model: Model, params: Params) -> int:
    """Width of the decoder's stream."""
    one = jnp.zeros((1, 1), jnp.int32)
    there = jnp.ones(one.shape, bool)
    return jax.eval_shape(lambda p: model.hidden_and_load(p, one, there, there)[0], params).shape[-1]


def by_head(params: Params, hidden: Array) -> Array:
    """The head of streams ``[..., dim]``, float32 ``[...]``."""
    return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), params["head"].astype(jnp.float32))
