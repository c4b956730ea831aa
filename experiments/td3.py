"""TD3, over many seeds in one compiled program.

python experiments/td3.py                                     16 seeds of Pendulum-v1
python experiments/td3.py --env MountainCarContinuous-v0 --num-seeds 8
python experiments/td3.py --env gymnasium/HalfCheetah-v5 --num-seeds 1
python experiments/td3.py --run-dir runs/mine                 and, after Ctrl-C, the same with --resume
"""

from jrl.run import Result, cli, command
from jrl.run.command import TD3 as Args  # noqa: F401  (what it can be told)


def main(argv: list[str]) -> Result:
    return command.train("td3", argv, __doc__)


if __name__ == "__main__":
    cli.main(main)
