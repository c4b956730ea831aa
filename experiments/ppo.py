"""PPO over many seeds in one compiled program.

python experiments/ppo.py                                     16 seeds of CartPole-v1
python experiments/ppo.py --env Breakout-MinAtar --num-seeds 8
python experiments/ppo.py --sweep hyper.learning_rate=1e-4,3e-4,1e-3 hyper.clip_eps=0.1,0.2
python experiments/ppo.py --run-dir runs/mine                 and, after Ctrl-C, the same with --resume
"""

from dataclasses import dataclass, field

from jrl.algos import ppo
from jrl.algos.presets import ppo_preset
from jrl.run import Result, cli


@dataclass(frozen=True)
class Args(cli.Options):
    """Train PPO over many seeds and show its learning curve."""

    config: ppo.Config = field(default_factory=ppo.Config)
    hyper: ppo.Hyper = ppo.Hyper()


def main(argv: list[str]) -> Result:
    return cli.experiment(argv, Args, ppo_preset, ppo.make, __doc__)


if __name__ == "__main__":
    cli.main(main)
