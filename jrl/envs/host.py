"""Environments that live on the host, such as gymnasium's, behind the protocol of pure functions.

``step`` of all agents is one call from the compiled program to the host, which steps one simulator for each. The state is a ticket: the number
of the simulator, how often it was stepped or reset, and the newest observation. A simulator whose episode ends begins the next one at once, so that
``Host.restart`` only hands out what is there.

A simulator's own state is not part of a run's. Where a ticket fits none, since the run was resumed in another process or a state is used for a
second time, the episode counts as truncated after its last observation, and another begins.
"""

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental import io_callback

from jrl.envs.pictures import animate, without_a_screen
from jrl.envs.spaces import Box, Discrete, MultiDiscrete, Space, as_space
from jrl.envs.types import Environment, Host
from jrl.numerics import checks

Array = jax.Array


class Ticket(NamedTuple):
    """The state of an environment on the host."""

    simulator: Any  # int32 []
    clock: Any  # int32 [], its steps and resets so far
    obs: Any  # the observation that the next action is for


class Stepped(NamedTuple):
    """What the host returns of a step."""

    ticket: Ticket
    obs: Any  # before any reset
    reward: Any
    terminated: Any
    truncated: Any
    lost: Any  # no simulator stands where the ticket says


def on_host(make: Callable[[], Any], name: str = "", time_limit: int | None = None) -> Environment:
    """An environment of which ``make()`` gives simulators, each with the interface of ``gymnasium.Env``.

    Observations keep their structure (a dictionary or a tuple of arrays stays one); float64 becomes float32, int64 int32, and discrete ones
    one-hot. ``make`` is called once now, and again for each agent that acts at a time.
    Raises ``ValueError`` for what is no such function, and for spaces that have no arrays, such as texts.
    """
    checks.function("on_host: make", make)
    first = make()
    missing = [part for part in ("reset", "step", "action_space", "observation_space") if not hasattr(first, part)]
    if missing or isinstance(first, type):
        raise ValueError(f"on_host: make must return an environment with gymnasium's interface; got {first!r}")
    name = name or getattr(first.spec, "id", None) or type(first.unwrapped).__name__
    try:
        action_space, to_host = actions(first.action_space)
        space = first.observation_space
        spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), to_arrays(space, space.sample()))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    simulators = Simulators(make, first, to_host, name)
    scalar = {dtype: jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.float32, jnp.bool_)}
    ticket = Ticket(scalar[jnp.int32], scalar[jnp.int32], spec)
    flag = scalar[jnp.bool_]
    on_reset = batched(io_callback, simulators.reset, ticket)
    # Not an io_callback: loops that are vmapped take none. Nothing is lost, since each step needs the ticket of the one before.
    on_step = batched(jax.pure_callback, simulators.step, Stepped(ticket, spec, scalar[jnp.float32], flag, flag, flag))
    on_release = batched(io_callback, simulators.release, scalar[jnp.int32])

    def reset(key: Array) -> tuple[Any, Ticket]:
        ticket = on_reset(seed_of(key))
        return ticket.obs, ticket

    def step(key: Array, state: Ticket, action: Array) -> tuple[Any, Ticket, Array, Array, Array]:
        after = on_step(jnp.stack([state.simulator, state.clock, seed_of(key)]), action)  # each argument costs time
        obs = jax.tree.map(lambda old, new: jnp.where(after.lost, old, new), state.obs, after.obs)
        return obs, after.ticket, after.reward, after.terminated, after.truncated

    host = Host(
        restart=lambda state: (state.obs, state),
        release=lambda state: on_release(state.simulator),
        render=simulators.render if getattr(first, "render_mode", None) == "rgb_array" else None,
    )
    draw = animate if host.render else None
    return Environment(name, reset, step, action_space, time_limit, draw=draw, host=host)


def seed_of(key: Array) -> Array:
    """A seed for a simulator's ``reset``, int32 and not negative."""
    return (jax.random.bits(key, (), jnp.uint32) >> 1).astype(jnp.int32)


def batched(
    callback: Callable[..., Any], function: Callable[..., Any], result: Any, axes: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """``function`` of the host as one of JAX: vmapped, however often, it is called once with all that is asked, ``[N, ...]``.

    ``callback`` is JAX's, and ``result`` the shapes of what the function returns for one.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*axes, *x.shape), x.dtype), result)

    def flat(*args: Any) -> Any:
        rows = [np.asarray(x).reshape(-1, *np.shape(x)[len(axes) :]) for x in args]
        return jax.tree.map(lambda x, s: np.asarray(x, s.dtype).reshape(s.shape), function(*rows), shapes)

    @custom_vmap
    def call(*args: Any) -> Any:
        return callback(flat, shapes, *args)

    @call.def_vmap
    def call_batched(size: int, in_batched: list[bool], *args: Any) -> Any:
        args = tuple(
            x if mapped else jnp.broadcast_to(x, (size, *x.shape)) for x, mapped in zip(args, in_batched, strict=True)
        )
        out = batched(callback, function, result, (size, *axes))(*args)
        return out, jax.tree.map(lambda _: True, out)

    return call


class Simulator:
    """An environment on the host, and how often it was stepped or reset."""

    def __init__(self, env: Any) -> None:
        self.env, self.clock = env, 0

    def reset(self, seed: int) -> Any:
        self.clock += 1
        returned = self.env.reset(seed=seed)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise ValueError(f"reset must return (obs, info); got {_number_of(returned)}")
        return to_arrays(self.env.observation_space, returned[0])

    def step(self, action: Any, seed: int) -> tuple[Any, ...]:
        """``(next observation, the one to act on, reward, terminated, truncated)``: these differ where the episode ends."""
        self.clock += 1
        returned = self.env.step(action)
        if not isinstance(returned, tuple) or len(returned) != 5:
            raise ValueError(f"step must return (obs, reward, terminated, truncated, info); got {_number_of(returned)}")
        obs, reward, terminated, truncated, _ = returned
        obs = to_arrays(self.env.observation_space, obs)
        if reward is None or np.size(reward) != 1:
            raise ValueError(f"step must return a number as the reward; got {reward!r}")
        following = self.reset(seed) if terminated or truncated else obs
        return obs, following, float(np.reshape(reward, ())), bool(terminated), bool(truncated)


def _number_of(returned: Any) -> str:
    return f"{len(returned)} values" if isinstance(returned, tuple) else type(returned).__name__


class Simulators:
    """All simulators of an environment. The methods are called from compiled programs, with a row for each agent."""

    def __init__(self, make: Callable[[], Any], first: Any, to_host: Callable[[np.ndarray], Any], name: str) -> None:
        self._make, self._to_host, self._name = make, to_host, name
        self._free = [Simulator(first)]
        self._busy: dict[int, Simulator] = {}
        # Numbers begin anywhere, so that the tickets of another process, in a checkpoint, fit none of this one.
        self._made = secrets.randbits(30)
        self._lock = threading.Lock()

    def _take(self) -> int:
        """The number of a simulator that was free, or is new."""
        with self._lock:
            self._made += 1
            self._busy[self._made] = self._free.pop() if self._free else Simulator(self._make())
            return self._made

    def reset(self, seeds: np.ndarray) -> Ticket:
        numbers = [self._take() for _ in seeds]
        taken = [self._busy[number] for number in numbers]
        with self._blamed():
            obs = [simulator.reset(int(seed)) for simulator, seed in zip(taken, seeds, strict=True)]
        return Ticket(np.array(numbers), np.array([simulator.clock for simulator in taken]), stacked(obs))

    def step(self, tickets: np.ndarray, actions: np.ndarray) -> Stepped:
        with self._blamed():
            rows = [self._step(ticket, action) for ticket, action in zip(tickets.tolist(), actions, strict=True)]
        after, obs, *rest = zip(*rows, strict=True)
        return Stepped(stacked(after), stacked(obs), *map(np.array, rest))

    def _step(self, ticket: list[int], action: np.ndarray) -> tuple[Any, ...]:
        number, clock, seed = ticket
        simulator = self._busy.get(number)
        if simulator is None or simulator.clock != clock:
            number = self._take() if simulator is None else number
            simulator = self._busy[number]
            obs = simulator.reset(seed)
            return Ticket(number, simulator.clock, obs), obs, 0.0, False, True, True
        obs, following, *rest = simulator.step(self._to_host(action), seed)
        return Ticket(number, simulator.clock, following), obs, *rest, False

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        """Name the environment in whatever its simulators raise."""
        try:
            yield
        except Exception as error:
            raise ValueError(f"{self._name}: {type(error).__name__}: {error}") from error

    def release(self, numbers: np.ndarray) -> np.ndarray:
        with self._lock:
            self._free += [self._busy.pop(number) for number in numbers.tolist() if number in self._busy]
        return numbers

    def render(self, state: Ticket) -> np.ndarray:
        """The picture of a simulator as it is now."""
        without_a_screen()
        return np.asarray(self._busy[int(state.simulator)].env.render())


def _one_hot(counts: Any, values: Any, space: Any) -> np.ndarray:
    """Choices one-hot and side by side, float32. Raises ``ValueError`` for one that the space does not have."""
    parts = [np.arange(n) == x for n, x in zip(counts, values, strict=True)]
    if not all(part.any() for part in parts):
        raise ValueError(f"an observation is not in its space {space}")
    return np.concatenate(parts).astype(np.float32)


def _narrow(space: Any) -> Any:
    """The dtype of a space's observations here: 64 bits become 32, and integers that these do not hold float32."""
    if space.dtype in (np.float64, np.uint64, np.uint32):
        return np.float32
    if space.dtype != np.int64:
        return space.dtype
    bound = 2**31 - 1
    held = type(space).__name__ != "Box" or (
        np.abs(np.asarray(space.low, float)).max(initial=0) <= bound
        and np.abs(np.asarray(space.high, float)).max(initial=0) <= bound
    )
    return np.int32 if held else np.float32


def stacked(trees: Any) -> Any:
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def actions(space: Any) -> tuple[Space, Callable[[np.ndarray], Any]]:
    """The space of gymnasium as ours, and how an action of ours becomes one of it. Boxes of several axes become vectors."""
    kind, shape, dtype = type(space).__name__, getattr(space, "shape", ()) or (), getattr(space, "dtype", None)
    if kind == "Discrete":
        return Discrete(int(space.n)), lambda action: int(action) + int(space.start)
    if kind == "MultiDiscrete":
        return MultiDiscrete(space.nvec.ravel()), lambda action: action.reshape(shape).astype(dtype) + space.start
    if kind == "Box":
        return Box(space.low.ravel(), space.high.ravel()), lambda action: action.reshape(shape).astype(dtype)
    return as_space(space), lambda action: action.astype(dtype)


def to_arrays(space: Any, value: Any) -> Any:
    """An observation of a space of gymnasium as arrays."""
    match type(space).__name__:
        case "Dict":
            return {name: to_arrays(part, value[name]) for name, part in space.spaces.items()}
        case "Tuple":
            return tuple(to_arrays(part, x) for part, x in zip(space.spaces, value, strict=True))
        case "Discrete":
            return _one_hot([space.n], [value - space.start], space)
        case "MultiDiscrete":
            return _one_hot(space.nvec.ravel(), np.ravel(value - space.start), space)
        case "Box" | "MultiBinary":
            value = np.asarray(value)
            if value.shape != space.shape:
                raise ValueError(f"observations of the space {space} must have shape {space.shape}; got {value.shape}")
            if not np.can_cast(value.dtype, space.dtype, "same_kind"):
                raise ValueError(f"observations of the space {space} must be {space.dtype}; got {value.dtype}")
            return value.astype(_narrow(space))
    raise ValueError(f"observations must be arrays; got the space {space}")
