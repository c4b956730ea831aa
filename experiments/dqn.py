"""DQN and the parts of Rainbow over many seeds in one compiled program.

python experiments/dqn.py                                     16 seeds of CartPole-v1
python experiments/dqn.py --config.n-step 3 --config.prioritized --config.network.dueling --config.distribution categorical
python experiments/dqn.py --sweep hyper.learning_rate=1e-4,3e-4,1e-3
python experiments/dqn.py --run-dir runs/mine                 and, after Ctrl-C, the same with --resume
"""

from dataclasses import dataclass, field

from jrl.algos import dqn
from jrl.algos.presets import dqn_preset
from jrl.run import Result, cli


@dataclass(frozen=True)
class Args(cli.Options):
    """Train DQN over many seeds and show its learning curve."""

    config: dqn.Config = field(default_factory=dqn.Config)
    hyper: dqn.Hyper = dqn.Hyper()


def main(argv: list[str]) -> Result:
    return cli.experiment(argv, Args, dqn_preset, dqn.make, __doc__)


if __name__ == "__main__":
    cli.main(main)
