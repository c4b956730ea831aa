"""Spaces of actions, and the spaces of gymnasium and gymnax as ours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl.numerics import checks

Array = jax.Array


@dataclass(frozen=True)
class Discrete:
    """Actions 0 .. n - 1, int32 ``[]``."""

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", _count("Discrete", self.n))


@dataclass(frozen=True)
class MultiDiscrete:
    """Several discrete choices at once, int32 ``[len(nvec)]``."""

    nvec: tuple[int, ...]

    def __post_init__(self) -> None:
        counts = _vector("MultiDiscrete: nvec", self.nvec)
        object.__setattr__(self, "nvec", tuple(_count("MultiDiscrete", n) for n in counts))


@dataclass(frozen=True)
class Box:
    """Real actions float32 ``[len(low)]`` between ``low`` and ``high`` (sequences of floats, which may be infinite)."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        low, high = (tuple(map(float, _vector(f"Box: {name}", getattr(self, name)))) for name in ("low", "high"))
        if len(low) != len(high):
            raise ValueError(f"Box: low and high must have one length; got {len(low)} and {len(high)}")
        for i, (a, b) in enumerate(zip(low, high, strict=True)):
            if not a <= b or a == math.inf or b == -math.inf:
                raise ValueError(f"Box: low must be at most high; got {a:g} and {b:g} at position {i}")
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)


Space = Discrete | MultiDiscrete | Box


def as_space(space: Any) -> Space:
    """The space, converted where it is a ``Discrete``, ``MultiDiscrete``, ``MultiBinary`` or ``Box`` of gymnasium or gymnax.

    Raises ``ValueError`` for any other object, for choices that do not start at 0, and for boxes that are no vectors.
    """
    if isinstance(space, Discrete | MultiDiscrete | Box):
        return space
    kind = type(space).__name__ if type(space).__module__.split(".")[0] in ("gymnasium", "gymnax", "gym") else ""
    if kind in ("Discrete", "MultiDiscrete") and np.any(np.asarray(getattr(space, "start", 0)) != 0):
        raise ValueError(f"action_space {space}: choices must start at 0")
    match kind:
        case "Discrete":
            return Discrete(space.n)
        case "MultiDiscrete":
            return MultiDiscrete(space.nvec)
        case "MultiBinary":
            return MultiDiscrete(np.full(space.shape, 2))  # type: ignore[arg-type]
        case "Box":
            low, high = (np.broadcast_to(np.asarray(x, float), space.shape) for x in (space.low, space.high))
            return Box(low, high)  # type: ignore[arg-type]
    raise ValueError(f"action_space must be Discrete, MultiDiscrete or Box (of jrl.envs or gymnasium); got {space!r}")


def to_env(space: Space, action: Array) -> Array:
    """Convert a policy's action to the environment's: continuous ones are clipped to [-1, 1] and mapped onto finite bounds."""
    if not isinstance(space, Box):
        return action
    low, high = np.array(space.low, np.float32), np.array(space.high, np.float32)
    finite = np.isfinite(low) & np.isfinite(high)
    least, most = np.where(finite, low, -1), np.where(finite, high, 1)
    center, half = (least + most) / 2, (most - least) / 2
    mapped = center + half * jnp.where(finite, jnp.clip(action, -1, 1), action)
    return jnp.clip(mapped, low, high)


def from_env(space: Space, action: Array) -> Array:
    """An environment's action as a policy's: what ``to_env`` makes of the result."""
    if not isinstance(space, Box):
        return action
    low, high = np.array(space.low, np.float32), np.array(space.high, np.float32)
    finite = np.isfinite(low) & np.isfinite(high) & (high > low)
    least, most = np.where(finite, low, -1), np.where(finite, high, 1)
    return (action - (least + most) / 2) / ((most - least) / 2)


def counts(space: Space) -> tuple[int, ...]:
    """How many choices each part of an action has; 1 for a real number."""
    match space:
        case Discrete(n):
            return (n,)
        case MultiDiscrete(nvec):
            return nvec
        case Box(low):
            return (1,) * len(low)


def to_vector(space: Space, action: Array) -> Array:
    """Actions ``[...]`` as float32 ``[..., sum(counts(space))]``: one-hot for each choice, real numbers as they are."""
    if isinstance(space, Box):
        return action.astype(jnp.float32)
    parts = action[..., None] if isinstance(space, Discrete) else action
    return jnp.concatenate(
        [jax.nn.one_hot(parts[..., i], n, dtype=jnp.float32) for i, n in enumerate(counts(space))], axis=-1
    )


def _count(space: str, n: Any) -> int:
    n = int(n) if isinstance(n, np.integer) or (getattr(n, "shape", None) == () and n == int(n)) else n
    checks.positive_int(f"{space}: the number of choices", n)
    return n


def _vector(name: str, values: Any) -> Sequence[Any]:
    shape = np.shape(values)
    if len(shape) != 1 or not shape[0]:
        raise ValueError(f"{name} must be a vector, such as (1, 2); got {values!r} of shape {shape}")
    return np.asarray(values).tolist()
