"""Pairs of answers to one prompt, of which one is preferred: what reward models and DPO learn from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.equations import token_losses
from jrl.lm.model import Model
from jrl.lm.policy import Answers, answer
from jrl.lm.sampling import Rollout, Support
from jrl.lm.scoring import score
from jrl.lm.tasks import Task, answer_mask
from jrl.nets import moe
from jrl.numerics import checks

Array = jax.Array


class Pairs(NamedTuple):
    """Prompts and two answers to each, ``[N, ...]``.

    Attributes:
        prompt: int32 ``[N, P]``, padded on the left.
        valid: bool ``[N, P]``, false for that padding.
        chosen: int32 ``[N, T]``, the preferred answer, ended and padded.
        rejected: int32 ``[N, T]``, the other one.
        weight: float32 ``[N]``, 1 for a pair that counts, 0 for one whose answers are equally good.
        chosen_mask: bool ``[N, T]``, true for the answer's tokens; None where it ends as those of a task do, with the token 1.
        rejected_mask: bool ``[N, T]``, the same of the rejected answer.
    """

    prompt: Array
    valid: Array
    chosen: Array
    rejected: Array
    weight: Array
    chosen_mask: Array | None = None
    rejected_mask: Array | None = None


def draw(
    key: Array,
    task: Task,
    model: Model,
    params: Any,
    number: int,
    reward: Callable[[Answers], Array],
    support: Support = Support(),
    certainty: Array | float | None = None,
) -> tuple[Pairs, Answers]:
    """``number`` pairs of answers of a policy, ranked by ``reward``, float32 ``[2 number]`` of the answers side by side; the answers, too.

    The better one is preferred, or, with ``certainty`` c, each with the probability ``sigmoid(c (r - r'))`` of Bradley and Terry. Pure: vmap it.
    """
    key_answer, key_label = jax.random.split(key)
    answers = answer(key_answer, task, model, params, number, 2, support)
    gain = reward(answers).reshape(number, 2) @ jnp.array([1.0, -1.0])
    first_wins = gain > 0
    if certainty is not None:
        first_wins = jax.random.bernoulli(key_label, jax.nn.sigmoid(certainty * gain))
    return ranked(answers, first_wins, jnp.ones(number) if certainty is not None else 1.0 * (gain != 0)), answers


def ranked(answers: Answers, first_wins: Array, weight: Array) -> Pairs:
    """Pairs of answers that stand side by side, of which the first is preferred where ``first_wins [N]``."""
    problems, said = answers.problems, answers.rollout
    tokens = jnp.where(said.mask, said.tokens, 0).reshape(len(first_wins), 2, -1)
    wins = first_wins[:, None]
    chosen, rejected = jnp.where(wins, tokens[:, 0], tokens[:, 1]), jnp.where(wins, tokens[:, 1], tokens[:, 0])
    return Pairs(problems.prompt[::2], problems.valid[::2], chosen, rejected, weight.astype(jnp.float32))


def mismatched(pairs: Pairs) -> Pairs:
    """Each prompt with the answers to the one before it, which nobody gave to it."""
    turned = {
        name: jnp.roll(x, 1, axis=0)
        for name, x in pairs._asdict().items()
        if "chosen" in name or "rejected" in name
        if x is not None
    }
    return pairs._replace(**turned)


def check(task: Task, pairs: Pairs) -> int:
    """How many pairs there are. Raises ``ValueError`` unless they fit the task."""
    checks.instances("pairs", pairs=(pairs, Pairs))
    number = len(pairs.weight)
    shapes = [(number, task.prompt_length)] * 2 + [(number, task.answer_length)] * 2 + [(number,)]
    given: tuple[Any, ...] = pairs[: len(shapes)]
    for name, x, wanted in zip(Pairs._fields, given, shapes, strict=False):
        if jnp.shape(x) != wanted:
            raise ValueError(f"pairs.{name} must be {list(wanted)} for {task.name}; got {list(jnp.shape(x))}")
    return number


class PairLogProbs(NamedTuple):
    """Log-probabilities ``[N]`` of both answers of each pair: sums over their tokens, and how many these are; and the load of experts."""

    chosen: Array
    rejected: Array
    chosen_length: Array
    rejected_length: Array
    load: moe.Load


def log_probs(model: Model, params: Any, pairs: Pairs) -> PairLogProbs:
    """Log-probabilities of both answers of each pair, differentiable, in one pass over ``2 N`` rows."""
    prompt, valid, said = answers_of(pairs)
    scored = score(model, params, prompt, said, valid=valid)
    total = jnp.sum(token_losses.masked(scored.log_prob, said.mask), axis=-1)
    length = said.mask.sum(-1, dtype=jnp.float32)
    (chosen, rejected), (chosen_length, rejected_length) = jnp.split(total, 2), jnp.split(length, 2)
    return PairLogProbs(chosen, rejected, chosen_length, rejected_length, scored.load)


def answers_of(pairs: Pairs) -> tuple[Array, Array, Rollout]:
    """Prompts, which of their tokens are valid, and answers, ``[2 N, ...]``: all that are chosen, then all that are rejected."""
    prompt, valid, tokens = (
        jnp.concatenate(x) for x in ((pairs.prompt,) * 2, (pairs.valid,) * 2, (pairs.chosen, pairs.rejected))
    )
    if pairs.chosen_mask is None or pairs.rejected_mask is None:
        return prompt, valid, as_rollout(tokens)
    return prompt, valid, as_rollout(tokens, jnp.concatenate([pairs.chosen_mask, pairs.rejected_mask]))


def as_rollout(tokens: Array, mask: Array | None = None) -> Rollout:
    """Answers ``[N, T]`` that nobody drew; without a ``mask``, those of a task, which end with its token."""
    mask = answer_mask(tokens) if mask is None else mask
    return Rollout(tokens, mask, jnp.zeros(tokens.shape, jnp.float32), None)
