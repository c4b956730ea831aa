"""PPO-CMA, over many seeds in one compiled program.

python experiments/ppo_cma.py                                 16 seeds of Pendulum-v1
python experiments/ppo_cma.py --env MountainCarContinuous-v0 --num-seeds 8
python experiments/ppo_cma.py --run-dir runs/mine             and, after Ctrl-C, the same with --resume
"""

from jrl.run import Result, cli, command
from jrl.run.command import PPOCMA as Args  # noqa: F401  (what it can be told)


def main(argv: list[str]) -> Result:
    return command.train("ppo_cma", argv, __doc__)


if __name__ == "__main__":
    cli.main(main)
