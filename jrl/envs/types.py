"""The environment protocol: a record of pure functions with one convention for time.

``reset(key) -> (obs, state)`` and ``step(key, state, action) -> (obs, state, reward, terminated, truncated)``, both
unbatched and **without auto-reset**: the observation that ``step`` returns is the one before any reset, also when the
episode ends. ``terminated`` says that nothing follows (its value is 0); ``truncated`` that the clock ran out (its value
is still to be estimated). Both may be true. The rollout resets.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jrl.envs.spaces import Box, Discrete, MultiDiscrete, Space

Array = jax.Array
State = Any
Obs = Any


class MaskedObs(NamedTuple):
    """What an environment with illegal actions returns as its observation.

    ``mask`` is bool ``[n]`` (for ``MultiDiscrete`` ``[sum(nvec)]``), true where an action is legal. A state in which no action is
    legal is terminal: nothing follows it, and its value is 0, whatever ``terminated`` says. ``reset`` leaves a legal action.
    """

    obs: Array
    mask: Array


def without_mask(obs: Any) -> Any:
    """An observation without the mask of illegal actions."""
    return obs.obs if isinstance(obs, MaskedObs) else obs


class Host(NamedTuple):
    """What an environment can do besides whose ``step`` calls the host (``jrl.envs.host``), and begins the next episode by itself.

    Attributes:
        restart: ``state -> (obs, state)``, the first observation and state of the next episode, from the state after one that ended.
        release: ``state -> None``: nobody will act in this state, so that what the host holds for it may serve another.
        render: ``state -> picture``, uint8 ``[height, width, 3]``, of a state that nobody has acted in; None if it has none.
    """

    restart: Callable[[State], tuple[Obs, State]]
    release: Callable[[State], Any]
    render: Callable[[State], np.ndarray] | None


class Environment(NamedTuple):
    """An environment; any record or module with these names will do. ``envs.strict`` checks it.

    Attributes:
        name: shown to people.
        reset: ``key -> (obs, state)``.
        step: ``(key, state, action) -> (obs, state, reward, terminated, truncated)``; reward float32 ``[]``, flags bool ``[]``.
        action_space: ``Discrete``, ``MultiDiscrete`` or ``Box``.
        time_limit: no episode is longer than this many steps; None if unknown. It bounds evaluation; it does not truncate
            (``wrappers.time_limit`` does).
        first_truncation: no episode is truncated sooner than after this many steps; None if unknown. It lets a learner
            skip values that cannot be needed.
        steps_per_reset: a rollout draws one fresh first state for so many steps of each environment. Where it is more than 1, an
            environment whose episodes end twice within these steps begins twice in the same state; the default is exact.
        draw: ``(states: list, path) -> None`` writes an animation of an episode, or None. Where ``host.render`` is there, it is given pictures
            instead of states.
        drawn_as: Suffix of the files that ``draw`` writes.
        settings: what it was made of, as pairs of a name and a value, which a run records and compares: parameters, wrappers,
            a file's text.
        host: what it can do besides if its ``step`` calls the host, else None.
    """

    name: str
    reset: Callable[[Array], tuple[Obs, State]]
    step: Callable[[Array, State, Array], tuple[Obs, State, Array, Array, Array]]
    action_space: Space
    time_limit: int | None = None
    first_truncation: int | None = None
    draw: Callable[[list[State], str], None] | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    steps_per_reset: int = 1
    drawn_as: str = ".gif"
    host: Host | None = None


def next_episode(env: Environment, key: Array, state: State) -> tuple[Obs, State]:
    """First observation and state of the episode that follows one which ended in ``state``."""
    return env.reset(key) if env.host is None else env.host.restart(state)


R = TypeVar("R", bound=Any)


def with_settings(record: R, settings: Mapping[str, Any]) -> R:
    """An environment (or another record with ``settings``) with more of them on record; it stays hashable."""
    plain = {name: x if isinstance(x, int | float | str | tuple | None) else str(x) for name, x in settings.items()}
    return record._replace(settings=tuple((dict(record.settings) | plain).items()))


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
