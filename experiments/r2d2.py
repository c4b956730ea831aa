"""R2D2, DQN with a recurrent memory, over many seeds in one compiled program.

python experiments/r2d2.py                                    16 seeds of MemoryChain-bsuite
python experiments/r2d2.py --env CartPole-v1 --num-seeds 8
python experiments/r2d2.py --config.burn-in 0                 without burn-in
python experiments/r2d2.py --run-dir runs/mine                and, after Ctrl-C, the same with --resume
"""

from dataclasses import dataclass, field

from jrl.algos import r2d2
from jrl.algos.presets import r2d2_preset
from jrl.run import Result, cli


@dataclass(frozen=True)
class Args(cli.Options):
    """Train R2D2 over many seeds and show its learning curve."""

    env: str = "MemoryChain-bsuite"
    config: r2d2.Config = field(default_factory=r2d2.Config)
    hyper: r2d2.Hyper = r2d2.Hyper()


def main(argv: list[str]) -> Result:
    return cli.experiment(argv, Args, r2d2_preset, r2d2.make, __doc__)


if __name__ == "__main__":
    cli.main(main)
