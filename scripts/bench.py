"""Environment steps a second, learning included, side by side with the peers that install from the package index.

    bash scripts/bench                                    PPO on CartPole-v1 against rejax: at 1, 8, 32 and 128 seeds on a CPU,
                                                          at 1, 32, 256 and 2048 on a GPU
    bash scripts/bench --algo dqn --seeds 1 8 32          DQN: 10 envs, a gradient step on 128 transitions every 10 steps
    bash scripts/bench --algo dqn --seeds 1 4 --num-envs 1 --batch-size 256 --capacity 131072 --budget 8000
                                                          DQN at rejax's own setting
    bash scripts/bench --algo pqn --seeds 1 8             PQN: 32 envs x 64 steps, 4 epochs x 16 minibatches
    bash scripts/bench --env Breakout-MinAtar --seeds 1 4 --num-envs 64
    bash scripts/bench --algo grpo                        tokens a second of a language model: see bench_grpo.py
    bash scripts/bench --algo grpo --model-shape smollm2-135m        of a published shape: see bench_language.py

Both run the same setting: float32, Adam with a constant learning rate, gradients clipped by value as rejax does. PPO: 128 steps, 4
epochs of 4 minibatches, two towers of 64 tanh units. DQN: double, one step in each environment, then one gradient step; 64 x 64
relu units. PQN: 64 x 64 relu units with layer normalization. Every program is a process of its own: it compiles, waits, and is
timed when it is told to, alone on the machine; the figure is the best of --repeats. "run.train" is the run loop with a folder, metrics, checkpoints and
evaluation, over a run of --loop-steps for each seed; its last column is what it takes besides compiling and training.
Peers live in an environment of their own, .venv-peers, made by the first run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several programs wait on one GPU

import bench_grpo
import bench_language
import jax
import tyro

from jrl.numerics.host import num_cores
from jrl.run import stats

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers"
NUM_ENVS = {"ppo": 4, "dqn": 10, "pqn": 32}
DETAILS = {
    "ppo": "{num_envs} envs x 128 steps, 4 epochs x 4 minibatches, two 64x64 tanh towers",
    "dqn": "{num_envs} envs x one step, a gradient step on {batch_size} of {capacity:,} transitions, 64x64 relu",
    "pqn": "{num_envs} envs x 64 steps, 4 epochs x 16 minibatches, 64x64 relu with layer normalization",
}


@dataclass(frozen=True)
class Args:
    """Measure speed against the peers."""

    # ppo, dqn, pqn, or grpo, which has no peer that trains seeds in parallel.
    algo: Literal["ppo", "dqn", "pqn", "grpo"] = "ppo"
    # With grpo: the shape of a published language model, smollm2-135m or qwen3-0.6b, with random weights.
    model_shape: bench_language.Shape | None = None
    env: str = "CartPole-v1"  # Environment; peers must have it under the same id.
    # Numbers of seeds; default: 1, 8, 32 and 128, on a GPU 1, 32, 256 and 2048, for GRPO 1 and 8.
    seeds: tuple[int, ...] | None = None
    num_envs: int | None = None  # Environments of each seed; default: 4 for PPO, 10 for DQN and 32 for PQN.
    batch_size: int = 128  # Transitions in a minibatch of DQN.
    capacity: int = 10_000  # Transitions in the replay of DQN.
    target_every: int = 50  # Updates between copies to the target network of DQN.
    # Environment steps of one measurement, over all seeds; default: 1 million on a CPU, on a GPU what takes about a second.
    budget: int | None = None
    # Environment steps of each seed in a run of the run loop, which is then measured too; 0 for none.
    loop_steps: int = 0
    repeats: int = 3  # Measurements, of which the best counts.
    peers: tuple[str, ...] = ("rejax",)  # Peers to measure: rejax.
    # Folder with the wheels of the peers and of what they need beside JAX, where there is no package index.
    peer_wheels: Path | None = None
    # Programs that compile in parallel; default: 1 on a CPU, on a GPU half as many as there are cores.
    jobs: int | None = None

    def setting(self) -> dict[str, Any]:
        """What every program is given, but the number of seeds."""
        num_envs = NUM_ENVS[self.algo] if self.num_envs is None else self.num_envs
        return asdict(self) | {"num_envs": num_envs, "peer_wheels": None}


class Program:
    """A program to be measured, in a process that compiles at once and is timed when told to."""

    def __init__(self, name: str, python: str, setting: dict[str, Any], path: str | None = None) -> None:
        self.name, self.num_seeds = name, setting["num_seeds"]
        script = HERE / ("bench_rejax.py" if name == "rejax" else "bench_jrl.py")
        environment = os.environ | ({} if path is None else {"PYTHONPATH": path})
        command = [python, str(script), json.dumps(setting | {"program": name})]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)

    def wait_until_compiled(self) -> None:
        self._read()

    def time(self) -> dict[str, Any]:
        """What it measured. Raises ``SystemExit`` if it failed."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return json.loads(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            text = self.process.stderr.read().strip().splitlines()
            raise SystemExit(
                f"error: {self.name} at {stats.seeds(self.num_seeds)} failed: {text[-1] if text else 'no output'}"
            )
        return line


def measurements(args: Args, seeds: tuple[int, ...]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Each program's ``(seeds, name, figures)``; the order alternates, since a shared machine drifts."""
    path, python = None, ""
    if args.peers:
        python, path = peer_python(args.peer_wheels)
    waiting = []
    for i, num_seeds in enumerate(seeds):
        of_jrl = ["jrl", *(["run.train"] if args.loop_steps else [])]
        programs = [*((name, sys.executable, None) for name in of_jrl), *((name, python, path) for name in args.peers)]
        for name, interpreter, where in programs if i % 2 == 0 else reversed(programs):
            waiting.append((name, interpreter, args.setting() | {"num_seeds": num_seeds}, where))
    jobs = args.jobs or (1 if jax.default_backend() == "cpu" else max(1, num_cores() // 2))
    for start in range(0, len(waiting), jobs):
        together = [Program(*each) for each in waiting[start : start + jobs]]
        for program in together:
            program.wait_until_compiled()
        for program in together:
            print(f"{stats.seeds(program.num_seeds)}, {program.name}", file=sys.stderr, flush=True)
            yield program.num_seeds, program.name, program.time()


def peer_python(wheels: Path | None) -> tuple[str, str | None]:
    """The interpreter of the peers' environment, made if it is missing, and the path of modules that it needs besides."""
    if wheels is not None:
        site = PEERS / "site"
        files = [str(path) for path in sorted(wheels.glob("*.whl"))]
        if not files:
            raise SystemExit(f"error: there are no wheels in {wheels}")
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target"]
        subprocess.run([*install, str(site), *files], check=True)
        return sys.executable, str(site)
    python = PEERS / "bin/python"
    if not (PEERS / ".ready").exists():
        print(f"Setting up {PEERS} (a minute or two, once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", PEERS], check=True)
        accelerator = [] if jax.default_backend() == "cpu" else [f"jax[cuda13]=={jax.__version__}"]
        subprocess.run([python, "-m", "pip", "install", "-q", "rejax==0.1.3", "gymnax<1", *accelerator], check=True)
        (PEERS / ".ready").touch()
    return str(python), None


def main(args: Args) -> None:
    if args.algo == "grpo":
        if args.model_shape is not None:
            return bench_language.main(bench_language.Args(args.model_shape, repeats=args.repeats))
        return bench_grpo.main(bench_grpo.Args(seeds=args.seeds or (1, 8), repeats=args.repeats))
    if not set(args.peers) <= {"rejax"}:
        raise SystemExit(f"error: peers must be of rejax; got {', '.join(args.peers)}")
    on_cpu = jax.default_backend() == "cpu"
    seeds = args.seeds or ((1, 8, 32, 128) if on_cpu else (1, 32, 256, 2048))
    setting = DETAILS[args.algo].format(**args.setting())
    print(f"{args.algo.upper()} on {args.env}, {setting}; {jax.devices()[0].device_kind}, JAX {jax.__version__}\n")
    header = ("seeds", "program", "env steps/s", "jrl over it", "compile s", "GiB", "kernels an update", "besides s")
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header), flush=True)
    jrl: dict[int, float] = {}
    held: dict[int, list[tuple[str, dict[str, Any]]]] = {}
    for num_seeds, name, figures in measurements(args, seeds):
        held.setdefault(num_seeds, []).append((name, figures))
        if name == "jrl":
            jrl[num_seeds] = figures["speed"]
        if num_seeds in jrl:  # what was measured before jrl waits for it
            for other, those in held.pop(num_seeds):
                print(row(num_seeds, other, those, jrl[num_seeds]), flush=True)


def row(num_seeds: int, name: str, figures: dict[str, Any], of_jrl: float) -> str:
    """One line of the table."""
    ratio = f"{of_jrl / figures['speed']:.2f}"
    rest = [f"{figures['compile']:.1f}"]
    for key, form in (("gib", ".2f"), ("kernels", ",.0f"), ("besides", ".1f")):
        rest.append(format(figures[key], form) if figures.get(key) is not None else "-")
    return f"| {num_seeds} | {name} | {figures['speed']:,.0f} | {ratio} | " + " | ".join(rest) + " |"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
