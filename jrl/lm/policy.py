"""A language model on a task, as algorithms and the run loop see it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.lm.model import Model, decoder
from jrl.lm.own import checked, computed_in
from jrl.lm.sampling import Rollout, Support, sample, supported
from jrl.lm.tasks import END, PAD, Problem, Task
from jrl.nets import transformer
from jrl.numerics import checks, lora, optim, precision
from jrl.numerics.types import Params

Array = jax.Array


def language_model(task: Task, shape: transformer.Config, policy: str, own: Model | None = None) -> Model:
    """A decoder with the task's vocabulary, or the user's ``own`` model, that computes as the precision policy says.

    Raises ``ValueError`` if the shape or the model has another vocabulary.
    """
    if own is not None:
        checks.instances("make", model=(own, Model))
        if own.vocab_size != len(task.symbols):
            raise ValueError(
                f"model: {task.name} has {len(task.symbols)} symbols, the model a vocabulary of {own.vocab_size}"
            )
        return computed_in(checked(own, task.prompt_length), precision.parse(policy))
    if shape.vocab_size not in (0, len(task.symbols)):
        raise ValueError(
            f"config.model.vocab_size must be the {len(task.symbols)} symbols of {task.name}, or 0; got {shape.vocab_size}"
        )
    parsed = precision.parse(policy)
    model = decoder(replace(shape, vocab_size=len(task.symbols)), jnp.dtype(parsed.compute))
    return model._replace(init=lambda key: precision.cast_params(model.init(key), parsed.params))


def adapted(model: Model, adapter: lora.Adapter, frozen: Params, trained: Any, key: Array | None = None) -> Any:
    """The parameters that are computed with: adapters stand beside their matrices where the model can compute that. With a key, dropout is on."""
    if model.low_rank is None:
        return adapter.merge(frozen, trained)
    return adapter.beside(frozen, trained, model.low_rank, key)


class Reading(NamedTuple):
    """What an agent remembers while it reads and says a sequence: caches of one row, and where the next token stands."""

    cache: Any
    position: Array


def reader(
    task: Task,
    model: Model,
    params_of: Callable[[Any], Any],
    support_of: Callable[[Any], Support] = lambda state: Support(),
) -> Callable[..., tuple[Array, Reading]]:
    """``act`` of an algorithm in ``as_environment(task)``: one token read, one said, drawn as answers are or greedy.

    Its state has ``params`` and ``opt_state``, whose average of the parameters answers where there is one.
    """
    capacity = task.prompt_length + task.answer_length

    def act(state: Any, obs: Array, key: Array | None = None, memory: Reading | None = None) -> tuple[Array, Reading]:
        params = params_of(state._replace(params=optim.eval_params(state.opt_state, state.params)))
        if memory is None:
            shapes = jax.eval_shape(
                lambda: model.prefill(params, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool), capacity)[1]
            )
            empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            memory = Reading(empty, jnp.int32(0))
        logits, cache = model.step(params, obs[None], memory.cache, memory.position, jnp.zeros(1, jnp.int32))
        token = jnp.argmax(logits[0])
        if key is not None:
            token = jax.random.categorical(key, supported(logits[0], support_of(state))[0])
        return token.astype(jnp.int32), Reading(cache, memory.position + 1)

    return act


class Answers(NamedTuple):
    """Sampled answers to problems, each asked ``group_size`` times, side by side: rows ``[N]``."""

    problems: Problem
    rollout: Rollout
    parts: dict[str, Array]  # of the verifier, float32 [N]


def answer(
    key: Array, task: Task, model: Model, params: Params, num_prompts: int, group_size: int, support: Support
) -> Answers:
    """Draw problems, answer each ``group_size`` times, and verify."""
    key_draw, key_sample = jax.random.split(key)
    problems = jax.vmap(task.draw)(jax.random.split(key_draw, num_prompts))
    rollout = sample(
        key_sample,
        model,
        params,
        problems.prompt,
        length=task.answer_length,
        end=END,
        valid=problems.valid,
        pad=PAD,
        support=support,
        copies=group_size,
    )
    problems = jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=0), problems)
    parts = jax.vmap(task.verify)(problems, rollout.tokens, rollout.mask)
    return Answers(problems, rollout, parts)
