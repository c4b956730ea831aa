"""Environments of gymnasium, which are stepped on the host: MuJoCo's such as HalfCheetah-v5, and Atari's such as ALE/Breakout-v5."""

from typing import Any

import gymnasium
import numpy as np

from jrl.envs import host
from jrl.envs.types import Environment
from jrl.numerics import checks

ATARI_STEPS = 27_000  # half an hour of play, at four frames a step


def names() -> list[str]:
    _register_atari()
    others = ("GymV", "phys2d/", "tabular/")  # wrappers of older versions, and environments in JAX of another kind
    return sorted(
        name
        for name, spec in gymnasium.registry.items()
        if not name.startswith(others) and ("ale_py" not in str(spec.entry_point) or name.startswith("ALE/"))
    )


def make(name: str, steps: int | None = None, num_frames: int = 1, **params: Any) -> Environment:
    """An environment of gymnasium, whose episodes are truncated after ``steps`` (gymnasium's number, of Atari 27,000, if not given); ``params``
    go to it.

    Games of Atari are played as Mnih et al. (2015) do: pictures uint8 ``[84, 84, num_frames]``, four frames a step, up to 30 steps of waiting at
    the beginning. Unlike theirs, a lost life does not end an episode, and an action is repeated with probability 0.25 (Machado et al. 2018,
    arXiv 1709.06009), unless ``repeat_action_probability`` says otherwise.
    """
    checks.positive_int("num_frames", num_frames)
    if steps is not None:
        checks.positive_int("steps", steps)
    atari = name.startswith("ALE/")
    if num_frames > 1 and not atari:
        raise ValueError(f"num_frames is for games of Atari; got {num_frames} for {name}")
    limit: Any = ATARI_STEPS if atari and steps is None else steps
    params |= {"render_mode": "rgb_array"} if _draws(name) else {}
    params |= {"frameskip": 1} if atari else {"max_episode_steps": limit}

    def simulator() -> Any:
        env = gymnasium.make(name, **params)
        return gymnasium.wrappers.TimeLimit(_as_in_the_paper(env, num_frames), limit) if atari else env

    try:
        made = host.on_host(simulator, name)
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise ValueError(f"gymnasium cannot make {name}: {' '.join(str(error).split())}") from None
    spec = gymnasium.spec(name)
    return made._replace(time_limit=limit or spec.max_episode_steps)


def _as_in_the_paper(env: Any, num_frames: int) -> Any:
    """A game of Atari with the preparation of Mnih et al. (2015)."""
    from gymnasium import spaces, wrappers

    stacked: Any = wrappers.FrameStackObservation(wrappers.AtariPreprocessing(env), num_frames)
    space = spaces.Box(0, 255, (84, 84, num_frames), np.uint8)
    return wrappers.TransformObservation(stacked, lambda frames: np.moveaxis(frames, 0, -1), space)


def _draws(name: str) -> bool:
    """Whether the environment can give pictures, and what it needs for that is installed."""
    entry: Any = gymnasium.spec(name).entry_point
    creator = entry if callable(entry) else gymnasium.envs.registration.load_env_creator(entry)
    return "rgb_array" in getattr(creator, "metadata", {}).get("render_modes", ())


def _register_atari() -> None:
    try:
        import ale_py
    except ImportError:
        return
    gymnasium.register_envs(ale_py)
