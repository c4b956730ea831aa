"""A task as a token-level decision process: what evaluation plays."""

import jax
import jax.numpy as jnp

from jrl.envs.types import Discrete, Environment
from jrl.lm.tasks.types import END, Task, answer_mask

Array = jax.Array


def as_environment(task: Task) -> Environment:
    """The observation is the token to read next, int32 ``[]``, the action the token to say: it counts once the prompt is read.

    The reward is 1 at the end of a correct answer. An episode ends with the end token, or after ``answer_length`` tokens.
    """
    before, length = task.prompt_length, task.answer_length

    def reset(key: Array) -> tuple[Array, tuple]:
        problem = task.draw(key)
        return problem.prompt[0], (problem, jnp.zeros(length, jnp.int32), jnp.int32(0))

    def step(key: Array, state: tuple, action: Array) -> tuple[Array, tuple, Array, Array, Array]:
        problem, said, t = state
        at = t + 1 - before
        said = jnp.where((jnp.arange(length) == at) & (at >= 0), action, said)
        ended = (at >= 0) & ((action == END) | (at == length - 1))
        mask = answer_mask(said) & (jnp.arange(length) <= at)
        reward = jnp.where(ended, task.verify(problem, said, mask)["correct"], 0.0)
        token = jnp.where(at >= 0, action, problem.prompt[jnp.minimum(t + 1, before - 1)]).astype(jnp.int32)
        return token, (problem, said, t + 1), reward, ended, jnp.bool_(False)

    return Environment(task.name, reset, step, Discrete(len(task.symbols)), time_limit=before + length - 1)
