"""PQN, deep Q-learning without replay or target network, over many seeds in one compiled program.

python experiments/pqn.py                                     16 seeds of CartPole-v1
python experiments/pqn.py --env Breakout-MinAtar --num-seeds 8
python experiments/pqn.py --sweep hyper.q_lambda=0,0.65,0.95
python experiments/pqn.py --run-dir runs/mine                 and, after Ctrl-C, the same with --resume
"""

from dataclasses import dataclass, field

from jrl.algos import pqn
from jrl.algos.presets import pqn_preset
from jrl.run import Result, cli


@dataclass(frozen=True)
class Args(cli.Options):
    """Train PQN over many seeds and show its learning curve."""

    config: pqn.Config = field(default_factory=pqn.Config)
    hyper: pqn.Hyper = pqn.Hyper()


def main(argv: list[str]) -> Result:
    return cli.experiment(argv, Args, pqn_preset, pqn.make, __doc__)


if __name__ == "__main__":
    cli.main(main)
