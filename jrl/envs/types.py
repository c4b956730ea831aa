"""The environment protocol: a record of pure functions with one convention for time.

``reset(key) -> (obs, state)`` and ``step(key, state, action) -> (obs, state, reward, terminated, truncated)``, both
unbatched and **without auto-reset**: the observation that ``step`` returns is the one before any reset, also when the
episode ends. ``terminated`` says that nothing follows (its value is 0); ``truncated`` that the clock ran out (its value
is still to be estimated). Both may be true. The rollout resets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
State = Any
Obs = Any


@dataclass(frozen=True)
class Discrete:
    """Actions 0 .. n - 1, int32 ``[]``."""

    n: int


@dataclass(frozen=True)
class MultiDiscrete:
    """Several discrete choices at once, int32 ``[len(nvec)]``."""

    nvec: tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """Real actions float32 ``[len(low)]`` between ``low`` and ``high`` (tuples of floats)."""

    low: tuple[float, ...]
    high: tuple[float, ...]


Space = Discrete | MultiDiscrete | Box


class MaskedObs(NamedTuple):
    """What an environment with illegal actions returns as its observation.

    ``mask`` is bool ``[n]`` (for ``MultiDiscrete`` ``[sum(nvec)]``), true where an action is legal.
    """

    obs: Array
    mask: Array


class Environment(NamedTuple):
    """An environment; any record or module with these names will do.

    Attributes:
        name: shown to people.
        reset: ``key -> (obs, state)``.
        step: ``(key, state, action) -> (obs, state, reward, terminated, truncated)``; reward float32 ``[]``, flags bool ``[]``.
        action_space: ``Discrete``, ``MultiDiscrete`` or ``Box``.
        time_limit: no episode is longer than this many steps; None if unknown. It bounds evaluation; it does not truncate
            (``wrappers.time_limit`` does).
        first_truncation: no episode is truncated sooner than after this many steps; None if unknown. It lets a learner
            skip values that cannot be needed.
        draw: ``(states: list, path) -> None`` writes a GIF of an episode, or None.
    """

    name: str
    reset: Callable[[Array], tuple[Obs, State]]
    step: Callable[[Array, State, Array], tuple[Obs, State, Array, Array, Array]]
    action_space: Space
    time_limit: int | None = None
    first_truncation: int | None = None
    draw: Callable[[list[State], str], None] | None = None


def observation_spec(env: Environment) -> Any:
    """Shapes and dtypes of an observation (``jax.ShapeDtypeStruct`` leaves)."""
    return jax.eval_shape(env.reset, jax.eval_shape(jax.random.key, 0))[0]


def example_action(space: Space) -> Array:
    """A legal-looking action of the space, for shapes."""
    match space:
        case Discrete():
            return jnp.zeros((), jnp.int32)
        case MultiDiscrete(nvec):
            return jnp.zeros(len(nvec), jnp.int32)
        case Box(low, high):
            return jnp.clip(jnp.zeros(len(low), jnp.float32), np.array(low, np.float32), np.array(high, np.float32))


def strict(env: Environment) -> Environment:
    """Check the environment by abstract evaluation and make its dtypes strict.

    Rewards come out float32, flags bool, no leaf is weakly typed (else a second call would compile again), and states
    keep their dtypes from step to step. Raises ``ValueError`` naming the function and the mismatch.
    """
    key = jax.eval_shape(jax.random.key, 0)
    obs, state = _evaluate(env, "reset", lambda k: _strengthen(env.reset(k)), key)
    answer = _evaluate(env, "step", env.step, key, state, example_action(env.action_space))
    if not isinstance(answer, tuple) or len(answer) != 5:
        raise ValueError(f"{env.name}: step must return (obs, state, reward, terminated, truncated)")
    for name, wanted, given in (("observation", obs, answer[0]), ("state", state, answer[1])):
        _same_tree(env.name, name, wanted, given)
    for name, given in zip(("reward", "terminated", "truncated"), answer[2:], strict=True):
        if jnp.shape(given) != ():
            raise ValueError(f"{env.name}: step must return a scalar {name}, got shape {jnp.shape(given)}")

    def reset(key: Array) -> tuple[Obs, State]:
        return _strengthen(env.reset(key))

    def step(key: Array, env_state: State, action: Array) -> tuple[Obs, State, Array, Array, Array]:
        next_obs, next_state, reward, terminated, truncated = env.step(key, env_state, action)
        return (
            jax.tree.map(_as, next_obs, obs),
            jax.tree.map(_as, next_state, state),
            jnp.asarray(reward, jnp.float32),
            jnp.asarray(terminated, bool),
            jnp.asarray(truncated, bool),
        )

    return env._replace(reset=reset, step=step)


def _evaluate(env: Environment, name: str, function: Callable, *args: Any) -> Any:
    try:
        return jax.eval_shape(function, *args)
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{env.name}: {name} cannot be traced: {line}") from error


def _same_tree(env: str, name: str, wanted: Any, given: Any) -> None:
    if str(jax.tree.structure(wanted)) != str(jax.tree.structure(given)):
        raise ValueError(f"{env}: step returns another {name} structure than reset: {given} against {wanted}")
    shapes = [
        (jnp.shape(w), jnp.shape(g)) for w, g in zip(jax.tree.leaves(wanted), jax.tree.leaves(given), strict=True)
    ]
    for w, g in shapes:
        if w != g:
            raise ValueError(f"{env}: step returns a {name} of shape {g}, reset one of shape {w}")


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _strengthen(tree: Any) -> Any:
    def leaf(x: Any) -> Array:
        x = jnp.asarray(x)
        return x if _is_key(x) else jax.lax.convert_element_type(x, x.dtype)

    return jax.tree.map(leaf, tree)


def _as(x: Any, like: Any) -> Array:
    return x if _is_key(like) else jnp.asarray(x, like.dtype)
