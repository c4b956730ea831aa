"""PPO over many seeds in one compiled program.

python experiments/ppo.py                                     16 seeds of CartPole-v1
python experiments/ppo.py --env Breakout-MinAtar --num-seeds 8
python experiments/ppo.py --sweep hyper.learning_rate=1e-4,3e-4,1e-3 hyper.clip_eps=0.1,0.2
python experiments/ppo.py --run-dir runs/mine                 and, after Ctrl-C, the same with --resume
"""

from dataclasses import dataclass, field, replace

import tyro

from jrl.algos import ppo
from jrl.algos.presets import ppo_preset
from jrl.run import Result, cli


@dataclass(frozen=True)
class Args(cli.Options):
    """Train PPO over many seeds and show its learning curve."""

    config: ppo.Config = field(default_factory=ppo.Config)
    hyper: ppo.Hyper = ppo.Hyper()


def main(argv: list[str]) -> Result:
    preset = ppo_preset(*cli.preset_of(argv))
    defaults = Args(env_steps=preset.env_steps, config=preset.config, hyper=preset.hyper)
    args = tyro.cli(Args, args=argv, default=defaults, description=cli.paragraphs(__doc__))
    config = args.config if args.precision is None else replace(args.config, precision=args.precision)
    return cli.run(args, ppo.make(cli.environment(args), config, args.hyper))


if __name__ == "__main__":
    cli.main(main)
