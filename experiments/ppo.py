"""PPO over many seeds in one compiled program.

python experiments/ppo.py                                     16 seeds of CartPole-v1
python experiments/ppo.py --env Breakout-MinAtar --num-seeds 8
python experiments/ppo.py --sweep hyper.learning_rate=1e-4,3e-4,1e-3 hyper.clip_eps=0.1,0.2
python experiments/ppo.py --run-dir runs/mine                 and, after Ctrl-C, the same with --resume
"""

from jrl.run import Result, cli, command
from jrl.run.command import PPO as Args  # noqa: F401  (what it can be told)


def main(argv: list[str]) -> Result:
    return command.train("ppo", argv, __doc__)


if __name__ == "__main__":
    cli.main(main)
