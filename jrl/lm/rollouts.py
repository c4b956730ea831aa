"""Continuations of answers from the middle: what a step is worth, and a search over steps.

values = step_values(key, task, model, params, answers, copies=8)         how often continuations from each token end right
found = step_beam(key, task, model, params, scorer, number=64, beams=4, expansions=4, step=2)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrl.lm.model import Model
from jrl.lm.policy import Answers
from jrl.lm.sampling import Rollout, Support, sample
from jrl.lm.tasks import END, PAD, Problem, Task
from jrl.lm.tasks.types import answer_mask
from jrl.numerics import checks

Array = jax.Array


def continued(
    key: Array, task: Task, model: Model, params: Any, problems: Problem, said: Array, begun: Array, support: Support
) -> Array:
    """Answers int32 ``[N, T]`` that keep the first ``begun`` int ``[N]`` tokens of ``said [N, T]``, and go on from there; answers that have ended stay."""
    length = task.answer_length
    whole = jnp.concatenate([problems.prompt, said], axis=1)
    there = jnp.concatenate([problems.valid, jnp.arange(length)[None] < begun[:, None]], axis=1)
    # What is there moves to the end, so that all go on at one place.
    behind = length - begun
    place = (jnp.arange(whole.shape[1])[None] - behind[:, None]) % whole.shape[1]
    whole, there = (jnp.take_along_axis(x, place, axis=1) for x in (whole, there))
    more = sample(key, model, params, whole, length=length, end=END, valid=there, pad=PAD, support=support)
    at = jnp.arange(length)[None] - begun[:, None]
    new = jnp.take_along_axis(jnp.where(more.mask, more.tokens, PAD), jnp.maximum(at, 0), axis=1)
    ended = jnp.any((said == END) & (jnp.arange(length)[None] < begun[:, None]), axis=1)
    return jnp.where((at < 0) | ended[:, None], jnp.where(at < 0, said, PAD), new)


def step_values(
    key: Array, task: Task, model: Model, params: Any, answers: Answers, copies: int, support: Support = Support()
) -> Array:
    """How often ``copies`` continuations behind each token of the answers are correct, float32 ``[N, T]``; behind the end, whether the answer is."""
    checks.positive_int("copies", copies)
    problems, rollout = answers.problems, answers.rollout
    said = jnp.where(rollout.mask, rollout.tokens, PAD)

    def at(x: tuple[Array, Array]) -> Array:
        """Behind the token at t."""
        t, key = x
        asked, rows = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), (problems, said))
        begun = jnp.full(len(rows), t + 1)
        found = continued(key, task, model, params, asked, rows, begun, support)
        right = jax.vmap(task.verify)(asked, found, answer_mask(found))["correct"]
        return right.reshape(-1, copies).mean(1)

    places = jnp.arange(task.answer_length)
    return jax.lax.map(at, (places, jax.random.split(key, task.answer_length))).T


class Found(NamedTuple):
    """What a search chose: answers ``[N]`` with their parts, and the tokens that were drawn for each problem."""

    answers: Answers
    drawn: Array


def step_beam(
    key: Array,
    task: Task,
    model: Model,
    params: Any,
    scorer: Callable[[Problem, Rollout], Array],
    problems: Problem,
    beams: int,
    expansions: int,
    step: int,
    support: Support = Support(),
) -> Found:
    """Beam search over steps of ``step`` tokens: each beam goes on in ``expansions`` ways, and the best ``beams`` remain.

    Args:
        key: The key that all samples are drawn with.
        task: The task whose problems are asked.
        model: The model that answers.
        params: Parameters of the model.
        scorer: ``(problems [M], rollout [M, T]) -> [M]``, what the answers are worth as far as they go, by the last token that is there.
        problems: Problems ``[N, ...]``.
        beams: Number of answers that are kept of each problem.
        expansions: Number of ways in which each goes on.
        step: Number of tokens of a step.
        support: The distribution that tokens are drawn from.
    """
    for name, value in (("beams", beams), ("expansions", expansions), ("step", step)):
        checks.positive_int(name, value)
    length, number = task.answer_length, len(problems.prompt)
    asked = jax.tree.map(lambda x: jnp.repeat(x, beams * expansions, axis=0), problems)
    said = jnp.full((number * beams, length), PAD, jnp.int32)
    drawn = jnp.zeros(number, jnp.int32)
    scores = jnp.zeros((number, beams * expansions))
    rows = said
    for i, begin in enumerate(range(0, length, step)):
        rows = jnp.repeat(said, expansions, axis=0)
        begun = jnp.full(len(rows), begin)
        rows = continued(jax.random.fold_in(key, i), task, model, params, asked, rows, begun, support)
        end = min(begin + step, length)
        cut = jnp.where(jnp.arange(length)[None] < end, rows, PAD)
        mask = answer_mask(cut) & (jnp.arange(length)[None] < end)
        new = mask & (jnp.arange(length)[None] >= begin)
        drawn += new.reshape(number, -1).sum(1)
        scores = scorer(asked, Rollout(cut, mask, jnp.zeros(mask.shape, jnp.float32), None)).reshape(number, -1)
        best = jax.lax.top_k(scores, beams)[1]
        said = jnp.take_along_axis(cut.reshape(number, -1, length), best[..., None], axis=1).reshape(-1, length)
        rows = said
    first = rows.reshape(number, beams, length)[:, 0]
    mask = answer_mask(first)
    rollout = Rollout(first, mask, jnp.zeros(mask.shape, jnp.float32), None)
    return Found(Answers(problems, rollout, jax.vmap(task.verify)(problems, first, mask)), drawn)


def best_of(score: Array, copies: int) -> Array:
    """Rows of the best answer to each problem, int ``[N]``, by scores ``[N copies]``."""
    return jnp.arange(len(score) // copies) * copies + jnp.argmax(score.reshape(-1, copies), axis=1)


def majority(rollout: Rollout, copies: int, weight: Array | None = None) -> Array:
    """Rows of the most frequent answer to each problem, int ``[N]``; of equals the first (Wang et al. 2022, self-consistency, 2203.11171). With a ``weight``
    float ``[N copies]`` of each answer, such as its probability of being right, those that weigh most together (2312.08935, eq. 8)."""
    said = jnp.where(rollout.mask, rollout.tokens, -1).reshape(-1, copies, rollout.tokens.shape[1])
    same = (said[:, :, None] == said[:, None]).all(-1)
    votes = jnp.ones(same.shape[:2]) if weight is None else weight.reshape(same.shape[:2])
    return best_of(jnp.einsum("nij,nj->ni", same.astype(votes.dtype), votes).ravel(), copies)
