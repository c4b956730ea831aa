"""Episodic backward update, over many seeds in one compiled program.

python experiments/ebu.py                                     16 seeds of DelayedChoice
python experiments/ebu.py --env CartPole-v1 --num-seeds 8
python experiments/ebu.py --run-dir runs/mine                 and, after Ctrl-C, the same with --resume
"""

from jrl.run import Result, cli, command
from jrl.run.command import EBU as Args  # noqa: F401  (what it can be told)


def main(argv: list[str]) -> Result:
    return command.train("ebu", argv, __doc__)


if __name__ == "__main__":
    cli.main(main)
