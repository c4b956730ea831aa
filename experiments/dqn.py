"""DQN and the parts of Rainbow over many seeds in one compiled program.

python experiments/dqn.py                                     16 seeds of CartPole-v1
python experiments/dqn.py --config.n-step 3 --config.prioritized --config.network.dueling --config.distribution categorical
python experiments/dqn.py --sweep hyper.learning_rate=1e-4,3e-4,1e-3
python experiments/dqn.py --run-dir runs/mine                 and, after Ctrl-C, the same with --resume
"""

from jrl.run import Result, cli, command
from jrl.run.command import DQN as Args  # noqa: F401  (what it can be told)


def main(argv: list[str]) -> Result:
    return command.train("dqn", argv, __doc__)


if __name__ == "__main__":
    cli.main(main)
