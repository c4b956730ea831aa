"""The command ``jrl``: training without a script, and a look at runs.

jrl ppo                                           16 seeds of CartPole-v1
jrl dqn --env Acrobot-v1 --num-seeds 8
jrl pqn --env my_env.py --run-dir runs/mine       and, after Ctrl-C, the same with --resume
jrl ebu --env DelayedChoice                       DQN whose targets are made backwards along episodes
jrl sac --env gymnasium/HalfCheetah-v5            real actions, from replay; also td3
jrl r2d2 --help                                   all settings
jrl show runs/mine                                what was run, and what it reached; jrl show for a table of all runs
jrl watch runs/mine                               follow a run
jrl compare runs/a runs/b                         curves and scores side by side
jrl record runs/mine --out policy.mp4              an episode of the best policy
jrl envs                                          the environments
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from jrl.algos import dqn, ebu, ppo, ppo_cma, pqn, presets, r2d2, sac, td3
from jrl.run import Result, cli, tools


@dataclass(frozen=True)
class PPO(cli.Options):
    """Train PPO over many seeds in one compiled program."""

    config: ppo.Config = field(default_factory=ppo.Config)
    hyper: ppo.Hyper = ppo.Hyper()


@dataclass(frozen=True)
class PPOCMA(cli.Options):
    """Train PPO-CMA over many seeds in one compiled program."""

    env: str = "Pendulum-v1"  # Environment id, or a Python file that defines reset, step and action_space.
    config: ppo_cma.Config = field(default_factory=ppo_cma.Config)
    hyper: ppo_cma.Hyper = ppo_cma.Hyper()


@dataclass(frozen=True)
class DQN(cli.Options):
    """Train DQN over many seeds in one compiled program."""

    config: dqn.Config = field(default_factory=dqn.Config)
    hyper: dqn.Hyper = dqn.Hyper()


@dataclass(frozen=True)
class EBU(cli.Options):
    """Train EBU over many seeds in one compiled program."""

    env: str = "DelayedChoice"  # Environment id, or a Python file that defines reset, step and action_space.
    config: ebu.Config = field(default_factory=ebu.Config)
    hyper: ebu.Hyper = ebu.Hyper()


@dataclass(frozen=True)
class PQN(cli.Options):
    """Train PQN over many seeds in one compiled program."""

    config: pqn.Config = field(default_factory=pqn.Config)
    hyper: pqn.Hyper = pqn.Hyper()


@dataclass(frozen=True)
class R2D2(cli.Options):
    """Train R2D2 over many seeds in one compiled program."""

    env: str = "MemoryChain-bsuite"  # Environment id, or a Python file that defines reset, step and action_space.
    config: r2d2.Config = field(default_factory=r2d2.Config)
    hyper: r2d2.Hyper = r2d2.Hyper()


@dataclass(frozen=True)
class SAC(cli.Options):
    """Train SAC over many seeds in one compiled program."""

    env: str = "Pendulum-v1"  # Environment id, or a Python file that defines reset, step and action_space.
    config: sac.Config = field(default_factory=sac.Config)
    hyper: sac.Hyper = sac.Hyper()


@dataclass(frozen=True)
class TD3(cli.Options):
    """Train TD3 over many seeds in one compiled program."""

    env: str = "Pendulum-v1"  # Environment id, or a Python file that defines reset, step and action_space.
    config: td3.Config = field(default_factory=td3.Config)
    hyper: td3.Hyper = td3.Hyper()


class Command(NamedTuple):
    """What an algorithm can be told, the function that picks its preset, and the one that makes it."""

    options: type[cli.Options]
    preset: Callable[[str, str], presets.Preset]
    make: Callable[..., Any]


COMMANDS = {
    "ppo": Command(PPO, presets.ppo_preset, ppo.make),
    "ppo_cma": Command(PPOCMA, presets.ppo_cma_preset, ppo_cma.make),
    "dqn": Command(DQN, presets.dqn_preset, dqn.make),
    "ebu": Command(EBU, presets.ebu_preset, ebu.make),
    "pqn": Command(PQN, presets.pqn_preset, pqn.make),
    "r2d2": Command(R2D2, presets.r2d2_preset, r2d2.make),
    "sac": Command(SAC, presets.sac_preset, sac.make),
    "td3": Command(TD3, presets.td3_preset, td3.make),
}


def train(name: str, argv: list[str], doc: str | None = None) -> Result:
    """Train an algorithm as the words of a command line say; ``doc`` is a docstring with examples, one a line."""
    options, preset, make = COMMANDS[name]
    return cli.experiment(argv, options, preset, make, doc or options.__doc__)


def run(argv: list[str]) -> Result | None:
    """Train the algorithm that the first word names, or look at runs. Raises ``ValueError`` for a first word that names neither."""
    if not argv or argv[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return None
    words = [*COMMANDS, *tools.TOOLS]
    if argv[0] not in words:
        raise ValueError(f"jrl: the first word must be one of {', '.join(words)}; got {argv[0]!r}")
    sys.argv[0] = f"jrl {argv[0]}"  # as --help shows it
    if argv[0] in tools.TOOLS:
        tools.use(argv[0], argv[1:])
        return None
    return train(argv[0], argv[1:])


def main() -> NoReturn:
    """The console script."""
    cli.main(run)


if __name__ == "__main__":
    main()
