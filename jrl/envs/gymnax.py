"""gymnax environments behind the protocol.

gymnax is imported when an environment is made, since it takes seconds. Its own ``step`` resets at every step; this
adapter calls ``step_env`` and leaves the reset to the rollout, which draws each reset state once.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl.envs.pictures import without_a_screen
from jrl.envs.types import Box, Discrete, Environment, Space, with_settings
from jrl.numerics import checks
from jrl.numerics.types import EnvState, Observation
from jrl.user_file import same_kind

# Listed here so that a wrong name is refused without the import. MNISTBandit-bsuite downloads its images: left out.
IDS = [
    "CartPole-v1",
    "Pendulum-v1",
    "Acrobot-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "Asterix-MinAtar",
    "Breakout-MinAtar",
    "Freeway-MinAtar",
    "Seaquest-MinAtar",
    "SpaceInvaders-MinAtar",
    "Catch-bsuite",
    "DeepSea-bsuite",
    "MemoryChain-bsuite",
    "UmbrellaChain-bsuite",
    "DiscountingChain-bsuite",
    "SimpleBandit-bsuite",
    "FourRooms-misc",
    "MetaMaze-misc",
    "PointRobot-misc",
    "BernoulliBandit-misc",
    "GaussianBandit-misc",
    "Reacher-misc",
    "Swimmer-misc",
    "Pong-misc",
    "FrozenLake-misc",
]


def make(name: str, **params: Any) -> Environment:
    """A gymnax environment by id; ``params`` replace fields of its ``EnvParams`` (``memory_length=10``) or numbers that it is built with
    (``size=20`` of DeepSea).

    Observations keep gymnax's dtype, with two exceptions: those of a discrete space (FrozenLake) come one-hot as
    float32, and MinAtar's binary planes as bool, a quarter of the memory.
    Raises ``ValueError`` for a field that the environment does not have.
    """
    import gymnax

    env, defaults = gymnax.make(name)
    numbers = _numbers(type(env))
    allowed = vars(defaults) | numbers
    for field in params:
        if field not in allowed:
            raise ValueError(f"{name} has no parameter {field!r}; it has: {', '.join(allowed)}")
        same_kind(f"{name}: {field}", params[field], allowed[field])
    built = {field: value for field, value in params.items() if field in numbers}
    for field, value in built.items():
        if not isinstance(value, bool):
            checks.positive_int(f"{name}: {field}", value, at_least=min(numbers[field], 1))
    if built:
        env, defaults = gymnax.make(name, **built)
    env_params = defaults.replace(**{field: value for field, value in params.items() if field not in built})
    num_values = getattr(env.observation_space(env_params), "n", None)

    def observe(obs: Observation) -> Any:
        if num_values is not None:
            return jax.nn.one_hot(obs, num_values, dtype=jnp.float32)
        return obs.astype(bool) if name.endswith("-MinAtar") else obs

    def reset(key: jax.Array) -> tuple[Any, Any]:
        obs, state = env.reset_env(key, env_params)
        return observe(obs), state

    def step(key: jax.Array, state: EnvState, action: jax.Array) -> tuple[Any, Any, Any, Any, Any]:
        obs, state, reward, terminated, _ = env.step_env(key, state, action, env_params)
        return observe(obs), state, reward, terminated, env.is_truncated(state, env_params)

    listed = ", ".join(f"{field}={value}" for field, value in params.items())
    made = Environment(
        name=f"{name}({listed})" if params else name,
        reset=reset,
        step=step,
        action_space=_space(env.action_space(env_params)),
        time_limit=int(env_params.max_steps_in_episode),
        first_truncation=int(env_params.max_steps_in_episode),
        draw=_drawer(env, env_params),
    )
    return with_settings(made, vars(env_params) | built)


def _numbers(kind: type) -> dict[str, Any]:
    """The whole numbers and switches that an environment is built with, and their defaults."""
    found = inspect.signature(kind).parameters.values()
    return {x.name: x.default for x in found if isinstance(x.default, int)}


def _space(space: Any) -> Space:
    if hasattr(space, "n"):
        return Discrete(int(space.n))
    low, high = (np.broadcast_to(np.asarray(x, float), space.shape).tolist() for x in (space.low, space.high))
    return Box(tuple(low), tuple(high))


def _drawer(env: Any, env_params: Any) -> Any:
    def draw(states: list[Any], path: str) -> None:
        without_a_screen()
        import matplotlib

        matplotlib.use("Agg")
        from gymnax.visualize import Visualizer

        Visualizer(env, env_params, states).animate(path)

    return draw
