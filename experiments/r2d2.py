"""R2D2, DQN with a recurrent memory, over many seeds in one compiled program.

python experiments/r2d2.py                                    16 seeds of MemoryChain-bsuite
python experiments/r2d2.py --env CartPole-v1 --num-seeds 8
python experiments/r2d2.py --config.burn-in 0                 without burn-in
python experiments/r2d2.py --run-dir runs/mine                and, after Ctrl-C, the same with --resume
"""

from jrl.run import Result, cli, command
from jrl.run.command import R2D2 as Args  # noqa: F401  (what it can be told)


def main(argv: list[str]) -> Result:
    return command.train("r2d2", argv, __doc__)


if __name__ == "__main__":
    cli.main(main)
