"""PQN, deep Q-learning without replay or target network, over many seeds in one compiled program.

python experiments/pqn.py                                     16 seeds of CartPole-v1
python experiments/pqn.py --env Breakout-MinAtar --num-seeds 8
python experiments/pqn.py --sweep hyper.q_lambda=0,0.65,0.95
python experiments/pqn.py --run-dir runs/mine                 and, after Ctrl-C, the same with --resume
"""

from jrl.run import Result, cli, command
from jrl.run.command import PQN as Args  # noqa: F401  (what it can be told)


def main(argv: list[str]) -> Result:
    return command.train("pqn", argv, __doc__)


if __name__ == "__main__":
    cli.main(main)
