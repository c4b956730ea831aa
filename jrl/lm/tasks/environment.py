"""A task as an environment: the machinery that evaluates agents evaluates a language model that reads and says one token a step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jrl.envs.types import Discrete, Environment
from jrl.lm.tasks.types import END, PAD, Problem, Task, answer_mask

Array = jax.Array


class Reading(NamedTuple):
    """A problem, the position of the token that was observed last (``P`` and beyond: what was said), and what was said ``[T]``."""

    problem: Problem
    position: Array
    said: Array


def as_environment(task: Task) -> Environment:
    """An episode is one problem: the prompt's tokens are observed one by one, without the padding, then what the agent said.

    Observations are token ids, int32 ``[]``; an action is the token to come next. What is said before the whole prompt is read
    is ignored. The reward is ``verify``'s "correct", at the end: the episode terminates with the end token, or after
    ``answer_length`` tokens.
    """
    asked, size = task.prompt_length, task.answer_length

    def reset(key: Array) -> tuple[Array, Reading]:
        problem = task.draw(key)
        start = asked - jnp.sum(problem.valid, dtype=jnp.int32)
        return problem.prompt[start], Reading(problem, start, jnp.full(size, PAD, jnp.int32))

    def step(key: Array, state: Reading, action: Array) -> tuple[Array, Reading, Array, Array, Array]:
        problem, position, said = state
        position = position + 1
        place = position - asked
        reads = place < 0
        said = said.at[jnp.where(reads, size, place)].set(action, mode="drop")
        ends = ~reads & ((action == END) | (place == size - 1))
        reward = jnp.where(ends, task.verify(problem, said, answer_mask(said))["correct"], 0.0)
        obs = jnp.where(reads, problem.prompt[jnp.minimum(position, asked - 1)], action)
        return obs, Reading(problem, position, said), reward, ends, jnp.bool_(False)

    limit = asked + size - 1
    return Environment(task.name, reset, step, Discrete(len(task.symbols)), time_limit=limit, settings=task.settings)
