"""Algorithms, one file each, with long settings in a file beside it; ``jrl.algos.ppo`` is imported when it is first used."""

import importlib
from typing import Any

__all__ = [
    "bc",
    "dpo",
    "dqfd",
    "dqn",
    "ebu",
    "fbrl",
    "grpo",
    "option_critic",
    "ppo",
    "ppo_cma",
    "ppo_lm",
    "pqn",
    "prediction",
    "presets",
    "process_reward",
    "r2d2",
    "reverse_curriculum",
    "reward_model",
    "rudder",
    "sac",
    "sft",
    "td",
    "td3",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"jrl.algos.{name}")
    raise AttributeError(f"module 'jrl.algos' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
