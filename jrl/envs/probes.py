"""Probe environments: each fails for one fault of an agent, and is learned in seconds.

After Andy Jones's "Debugging RL, without the agonizing pain" (2021), with more for memory, truncation and curiosity.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jrl.envs.types import Discrete, Environment, MaskedObs, MultiDiscrete
from jrl.numerics.types import EnvState

Array = jax.Array


def _one_step(name: str, observe: Callable, reward: Callable, num_actions: int) -> Environment:
    """Episodes of one step: ``observe(key) -> obs``, ``reward(obs, action) -> float``."""

    def reset(key: Array) -> tuple[Array, Array]:
        obs = observe(key)
        return obs, obs

    def step(key: Array, state: Array, action: Array) -> tuple[Array, Array, Array, Array, Array]:
        return state, state, reward(state, action), jnp.bool_(True), jnp.bool_(False)

    return Environment(name, reset, step, Discrete(num_actions), time_limit=1)


def _sign(key: Array) -> Array:
    return jax.random.rademacher(key, (1,), jnp.float32)


def value() -> Environment:
    """One step, reward 1, one action: V = 1. Fails if the value loss or its gradient is wrong."""
    return _one_step("Probe-value", lambda key: jnp.zeros(1), lambda obs, action: jnp.float32(1), 1)


def value_from_observation() -> Environment:
    """The reward is the observation, +1 or -1: V(obs) = obs. Fails if values are not conditioned on observations."""
    return _one_step("Probe-observation", _sign, lambda obs, action: obs[0], 1)


def action() -> Environment:
    """Reward +1 for action 1, -1 for action 0: best return 1. Fails if the policy loss has the wrong sign."""
    return _one_step("Probe-action", lambda key: jnp.zeros(1), lambda obs, a: jnp.where(a == 1, 1.0, -1.0), 2)


def action_from_observation() -> Environment:
    """Reward +1 if the action names the sign of the observation: best return 1. Fails if batches are shuffled apart."""
    return _one_step("Probe-policy", _sign, lambda obs, a: jnp.where((obs[0] > 0) == (a == 1), 1.0, -1.0), 2)


def masked_action() -> Environment:
    """Four actions of which one, shown by the mask alone, is legal (+1); an illegal one gives -1."""

    def observe(key: Array) -> MaskedObs:
        legal = jax.random.randint(key, (), 0, 4)
        return MaskedObs(jnp.zeros(1), jnp.arange(4) == legal)

    return _one_step("Probe-mask", observe, lambda obs, a: jnp.where(obs.mask[a], 1.0, -1.0), 4)


def multi_action() -> Environment:
    """Two choices at once, each right if it names the sign of its own observation: best return 2."""
    base = _one_step(
        "Probe-multi",
        lambda key: jax.random.rademacher(key, (2,), jnp.float32),
        lambda obs, a: jnp.sum(jnp.where((obs > 0) == (a == 1), 1.0, -1.0)),
        2,
    )
    return base._replace(action_space=MultiDiscrete((2, 3)))


def discount() -> Environment:
    """Two steps, reward 1 on the second: V(first) = gamma, V(second) = 1. Fails if discounting or bootstrapping is wrong."""

    def reset(key: Array) -> tuple[Array, Array]:
        return jnp.array([0.0]), jnp.int32(0)

    def step(key: Array, t: Array, action: Array) -> tuple[Array, Array, Array, Array, Array]:
        return jnp.array([1.0]), t + 1, jnp.float32(t == 1), t == 1, jnp.bool_(False)

    return Environment("Probe-discount", reset, step, Discrete(1), time_limit=2)


def credit(delay: int = 5) -> Environment:
    """The first action decides a reward that comes ``delay`` steps later: best return 1. Fails if credit does not travel."""

    def observe(t: Array, chosen: Array) -> Array:
        return jnp.stack([t == 0, chosen]).astype(jnp.float32)

    def reset(key: Array) -> tuple[Array, Any]:
        state = (jnp.int32(0), jnp.bool_(False))
        return observe(*state), state

    def step(key: Array, state: EnvState, action: Array) -> tuple[Array, Any, Array, Array, Array]:
        t, chosen = state
        chosen = jnp.where(t == 0, action == 1, chosen)
        end = t + 1 == delay
        reward = jnp.where(end, jnp.where(chosen, 1.0, -1.0), 0.0)
        state = (t + 1, chosen)
        return observe(*state), state, reward, end, jnp.bool_(False)

    return Environment("Probe-credit", reset, step, Discrete(2), time_limit=delay)


def memory(delay: int = 4) -> Environment:
    """A sign is shown once and asked for ``delay`` steps later: best return 1, without memory 0."""

    def observe(t: Array, sign: Array) -> Array:
        return jnp.stack([jnp.where(t == 0, sign, 0.0), (t == delay).astype(jnp.float32)])

    def reset(key: Array) -> tuple[Array, Any]:
        state = (jnp.int32(0), _sign(key)[0])
        return observe(*state), state

    def step(key: Array, state: EnvState, action: Array) -> tuple[Array, Any, Array, Array, Array]:
        t, sign = state
        asked = t == delay
        reward = jnp.where(asked, jnp.where((sign > 0) == (action == 1), 1.0, -1.0), 0.0)
        state = (t + 1, sign)
        return observe(*state), state, reward, asked, jnp.bool_(False)

    return Environment("Probe-memory", reset, step, Discrete(2), time_limit=delay + 1)


def truncation(limit: int = 20) -> Environment:
    """Reward 1 at every step, never terminated, truncated at ``limit``: V = 1 / (1 - gamma), 100 at gamma 0.99.

    An agent that merges truncation into one ``done`` learns about 9.9 instead. The observation does not change, since
    the clock must not be seen.
    """

    def reset(key: Array) -> tuple[Array, Array]:
        return jnp.ones(1), jnp.int32(0)

    def step(key: Array, t: Array, action: Array) -> tuple[Array, Array, Array, Array, Array]:
        return jnp.ones(1), t + 1, jnp.float32(1), jnp.bool_(False), t + 1 >= limit

    return Environment("Probe-truncation", reset, step, Discrete(1), time_limit=limit)


def television(channels: int = 16, length: int = 12) -> Environment:
    """A corridor with a goal at its end (+1), and a television that shows a random channel whenever it is switched: the best return is 1.

    Actions are left, right and switch. The channel cannot be foreseen, so that an agent that is paid for surprise may switch for ever.
    """

    def observe(place: Array, channel: Array) -> Array:
        shown = jax.nn.one_hot(channel, channels, dtype=jnp.float32)
        return jnp.concatenate([jax.nn.one_hot(place, length, dtype=jnp.float32), shown])

    def reset(key: Array) -> tuple[Array, Any]:
        state = (jnp.int32(0), jnp.int32(0), jnp.int32(0))
        return observe(*state[:2]), state

    def step(key: Array, state: EnvState, action: Array) -> tuple[Array, Any, Array, Array, Array]:
        place, channel, t = state
        place = jnp.clip(place + (action == 1) - (action == 0), 0, length - 1)
        channel = jnp.where(action == 2, jax.random.randint(key, (), 0, channels), channel)
        arrived = place == length - 1
        state = (place, channel, t + 1)
        return observe(place, channel), state, arrived.astype(jnp.float32), arrived, t + 1 >= 4 * length

    return Environment("Probe-television", reset, step, Discrete(3), time_limit=4 * length)


PROBES: dict[str, Callable[[], Environment]] = {
    "Probe-value": value,
    "Probe-observation": value_from_observation,
    "Probe-action": action,
    "Probe-policy": action_from_observation,
    "Probe-mask": masked_action,
    "Probe-multi": multi_action,
    "Probe-discount": discount,
    "Probe-credit": credit,
    "Probe-memory": memory,
    "Probe-truncation": truncation,
    "Probe-television": television,
}
