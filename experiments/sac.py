"""SAC, with a learned temperature, over many seeds in one compiled program.

python experiments/sac.py                                     16 seeds of Pendulum-v1
python experiments/sac.py --env MountainCarContinuous-v0 --num-seeds 8
python experiments/sac.py --env gymnasium/HalfCheetah-v5 --num-seeds 1
python experiments/sac.py --run-dir runs/mine                 and, after Ctrl-C, the same with --resume
"""

from jrl.run import Result, cli, command
from jrl.run.command import SAC as Args  # noqa: F401  (what it can be told)


def main(argv: list[str]) -> Result:
    return command.train("sac", argv, __doc__)


if __name__ == "__main__":
    cli.main(main)
