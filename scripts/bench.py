"""Environment steps a second, learning included, side by side with the peers that install from the package index.

    bash scripts/bench                                    PPO on CartPole-v1 at 1, 8, 32 and 128 seeds, against rejax
    bash scripts/bench --algo dqn --seeds 1 8 32          DQN: 10 envs, a gradient step on 128 transitions every 10 steps
    bash scripts/bench --algo dqn --seeds 1 4 --num-envs 1 --batch-size 256 --capacity 131072 --budget 8000
                                                          DQN at rejax's own setting
    bash scripts/bench --env Breakout-MinAtar --seeds 1 4 --num-envs 64
    bash scripts/bench --algo grpo                        tokens a second of a language model: see bench_grpo.py

Both run the same setting. PPO: 128 steps, 4 epochs of 4 minibatches, two towers of 64 tanh units. DQN: double, one step in each
environment, then one gradient step; 64 x 64 relu units. All in float32 with Adam. Each is compiled once, then timed; the figure
is the best of --repeats, and the order alternates, since a shared machine drifts. Peers live in an environment of their
own, .venv-peers, made by the first run.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import bench_grpo
import tyro

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers"

# What a program measures: it is given its settings, and prints steps a second and seconds of compiling.
JRL = """
import sys, json, time, jax, jax.numpy as jnp
s = json.loads(sys.argv[1])
import jrl
from jrl import envs, nets
from jrl.algos import dqn, ppo
from jrl.run import layout, program
env = envs.make(s["env"])
if s["algo"] == "ppo":
    algo = ppo.make(env, ppo.Config(num_envs=s["num_envs"], network=nets.Config(torso="mlp")))
else:
    algo = dqn.make(env, dqn.Config(num_envs=s["num_envs"], batch_size=s["batch_size"], capacity=s["capacity"],
                                    learning_starts=0, target_every=s["target_every"],
                                    network=nets.ValueConfig(torso="mlp", hidden=(64, 64), norm="none")))
updates = max(1, s["budget"] // algo.env_steps_per_update // s["num_seeds"])
begin = time.perf_counter()
lay = layout.choose(s["num_seeds"], jax.devices(), None)
keys = layout.put(lay, layout.pad(lay, jax.random.split(jax.random.key(0), s["num_seeds"])))
state = jax.jit(layout.over_members(lay, jax.vmap(lambda k: algo.init(k, None, 10**6))))(keys)
chunk = jax.jit(layout.over_members(lay, program.chunk(algo, max(1, updates // 1000), 1024)), donate_argnums=0)
n = jnp.int32(updates)
chunk = chunk.lower(state, n).compile()
compile_seconds = time.perf_counter() - begin
state, rows = jax.block_until_ready(chunk(state, n))
seconds = []
for _ in range(s["repeats"]):
    begin = time.perf_counter()
    state, rows = jax.block_until_ready(chunk(state, n))
    seconds.append(time.perf_counter() - begin)
print(json.dumps([updates * algo.env_steps_per_update * s["num_seeds"] / min(seconds), compile_seconds]))
"""

REJAX = """
import sys, json, time, jax
s = json.loads(sys.argv[1])
from rejax import DQN, PPO
per_update = s["num_envs"] * (128 if s["algo"] == "ppo" else 1)
steps = max(1, s["budget"] // per_update // s["num_seeds"]) * per_update
common = dict(env=s["env"], num_envs=s["num_envs"], total_timesteps=steps, eval_freq=steps, skip_initial_evaluation=True,
              learning_rate=2.5e-4)
if s["algo"] == "ppo":
    algo = PPO.create(num_steps=128, num_epochs=4, num_minibatches=4, max_grad_norm=0.5,
                      agent_kwargs={"activation": "tanh", "hidden_layer_sizes": (64, 64)}, **common)
else:
    algo = DQN.create(batch_size=s["batch_size"], buffer_size=s["capacity"], fill_buffer=0, num_epochs=1, ddqn=True,
                      target_update_freq=s["target_every"] * s["num_envs"], max_grad_norm=10.0,
                      agent_kwargs={"activation": "relu"}, **common)
algo = algo.replace(eval_callback=lambda *args: ())  # training alone is timed
keys = jax.random.split(jax.random.key(0), s["num_seeds"])
begin = time.perf_counter()
train = jax.jit(jax.vmap(algo.train)).lower(keys).compile()
compile_seconds = time.perf_counter() - begin
jax.block_until_ready(train(keys))
seconds = []
for _ in range(s["repeats"]):
    begin = time.perf_counter()
    jax.block_until_ready(train(keys))
    seconds.append(time.perf_counter() - begin)
print(json.dumps([steps * s["num_seeds"] / min(seconds), compile_seconds]))
"""


@dataclass(frozen=True)
class Args:
    """Measure speed against the peers.

    Attributes:
        algo: ppo, dqn, or grpo, which has no peer that trains seeds side by side.
        env: environment; peers must have it under the same id.
        seeds: numbers of seeds; 1, 8, 32 and 128, for GRPO 1 and 8, if not given.
        num_envs: environments of each seed; 4 for PPO and 10 for DQN if not given.
        batch_size: transitions in a minibatch of DQN.
        capacity: of DQN's replay.
        target_every: updates between copies into DQN's target network.
        budget: environment steps of one measurement, over all seeds.
        repeats: measurements, of which the best counts.
        peers: which peers: rejax.
    """

    algo: Literal["ppo", "dqn", "grpo"] = "ppo"
    env: str = "CartPole-v1"
    seeds: tuple[int, ...] | None = None
    num_envs: int | None = None
    batch_size: int = 128
    capacity: int = 10_000
    target_every: int = 50
    budget: int = 1_000_000
    repeats: int = 3
    peers: tuple[str, ...] = ("rejax",)

    def setting(self) -> dict:
        """What every program is given, but the number of seeds."""
        default = {"ppo": 4, "dqn": 10}[self.algo]
        return asdict(self) | {"num_envs": default if self.num_envs is None else self.num_envs}


def measure(python: str, code: str, args: Args, num_seeds: int) -> tuple[float, float]:
    """Steps a second and compile seconds of one program, in a process of its own. Raises ``SystemExit`` if it fails."""
    setting = json.dumps(args.setting() | {"num_seeds": num_seeds})
    done = subprocess.run([python, "-c", code, setting], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"error: a measurement failed: {done.stderr.strip().splitlines()[-1]}")
    speed, compiling = json.loads(done.stdout.strip().splitlines()[-1])
    return speed, compiling


def peer_python() -> str:
    """The interpreter of the peers' environment, made if it is missing."""
    python = PEERS / "bin/python"
    if not (PEERS / ".ready").exists():
        print(f"Setting up {PEERS} (a minute or two, once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", PEERS], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "rejax==0.1.3", "gymnax<1"], check=True)
        (PEERS / ".ready").touch()
    return str(python)


def main(args: Args) -> None:
    if args.algo == "grpo":
        return bench_grpo.main(bench_grpo.Args(seeds=args.seeds or (1, 8), repeats=args.repeats))
    if not set(args.peers) <= {"rejax"}:
        raise SystemExit(f"error: peers must be of rejax; got {', '.join(args.peers)}")
    programs = [("jrl", sys.executable, JRL)] + [(p, peer_python(), REJAX) for p in args.peers]
    what = args.setting()
    details = {
        "ppo": "128 steps, 4 epochs x 4 minibatches, two 64x64 tanh towers",
        "dqn": "one step, a gradient step on {batch_size} of {capacity:,} transitions, 64x64 relu".format(**what),
    }
    print(f"{args.algo.upper()} on {args.env}, {what['num_envs']} envs x {details[args.algo]}")
    print("| seeds | program | env steps/s | jrl over it | compile s |\n| --- | --- | --- | --- | --- |")
    for i, num_seeds in enumerate(args.seeds or (1, 8, 32, 128)):
        found = {}
        for name, python, code in programs if i % 2 == 0 else reversed(programs):
            begin = time.monotonic()
            found[name] = measure(python, code, args, num_seeds)
            print(f"{num_seeds} seeds, {name}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
        for name, (speed, compiling) in sorted(found.items()):
            print(
                f"| {num_seeds} | {name} | {speed:,.0f} | {found['jrl'][0] / speed:.2f} | {compiling:.1f} |", flush=True
            )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
