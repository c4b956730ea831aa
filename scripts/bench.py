"""Environment steps a second, learning included, side by side with the peers that install from the package index.

    bash scripts/bench                                    CartPole-v1 at 1, 8, 32 and 128 seeds, against rejax
    bash scripts/bench --env Breakout-MinAtar --seeds 1 4 --num-envs 64

All run the same setting: 128 steps, 4 epochs of 4 minibatches, two towers of 64 tanh units, float32, Adam. Each is
compiled once, then timed; the figure is the best of --repeats, and the order alternates, since a shared machine drifts.
Peers live in an environment of their own, .venv-peers, made by the first run.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers"

JRL = """
import sys, json, time, jax, jax.numpy as jnp
env_name, num_seeds, num_envs, budget, repeats = json.loads(sys.argv[1])
import jrl
from jrl import envs, nets
from jrl.algorithm import over_members
from jrl.algos import ppo
from jrl.run import layout, program
algo = ppo.make(envs.make(env_name), ppo.Config(num_envs=num_envs, network=nets.Config(torso="mlp")))
updates = max(1, budget // algo.env_steps_per_update // num_seeds)
begin = time.perf_counter()
lay = layout.choose(num_seeds, jax.devices(), None)
keys = layout.put(lay, layout.pad(lay, jax.random.split(jax.random.key(0), num_seeds)))
state = jax.jit(layout.over_members(lay, jax.vmap(lambda k: algo.init(k, None, 10**6))))(keys)
chunk = jax.jit(layout.over_members(lay, program.chunk(algo, 1, 1024)), donate_argnums=0)
n = jnp.int32(min(updates, 1000))
chunk = chunk.lower(state, n).compile()
compile_seconds = time.perf_counter() - begin
state, rows = jax.block_until_ready(chunk(state, n))
seconds = []
for _ in range(repeats):
    begin = time.perf_counter()
    state, rows = jax.block_until_ready(chunk(state, n))
    seconds.append(time.perf_counter() - begin)
print(json.dumps([int(n) * algo.env_steps_per_update * num_seeds / min(seconds), compile_seconds]))
"""

REJAX = """
import sys, json, time, jax
env_name, num_seeds, num_envs, budget, repeats = json.loads(sys.argv[1])
from rejax import PPO
per_update = num_envs * 128
steps = max(1, budget // per_update // num_seeds) * per_update
algo = PPO.create(env=env_name, num_envs=num_envs, num_steps=128, num_epochs=4, num_minibatches=4, total_timesteps=steps,
                  eval_freq=steps, learning_rate=2.5e-4, max_grad_norm=0.5, skip_initial_evaluation=True,
                  agent_kwargs={"activation": "tanh", "hidden_layer_sizes": (64, 64)})
algo = algo.replace(eval_callback=lambda *args: ())  # training alone is timed
keys = jax.random.split(jax.random.key(0), num_seeds)
begin = time.perf_counter()
train = jax.jit(jax.vmap(algo.train)).lower(keys).compile()
compile_seconds = time.perf_counter() - begin
jax.block_until_ready(train(keys))
seconds = []
for _ in range(repeats):
    begin = time.perf_counter()
    jax.block_until_ready(train(keys))
    seconds.append(time.perf_counter() - begin)
print(json.dumps([steps * num_seeds / min(seconds), compile_seconds]))
"""


@dataclass(frozen=True)
class Args:
    """Measure speed against the peers.

    Attributes:
        env: environment; peers must have it under the same id.
        seeds: numbers of seeds.
        num_envs: environments of each seed.
        budget: environment steps of one measurement, over all seeds.
        repeats: measurements, of which the best counts.
        peers: which peers: rejax.
    """

    env: str = "CartPole-v1"
    seeds: tuple[int, ...] = (1, 8, 32, 128)
    num_envs: int = 4
    budget: int = 1_000_000
    repeats: int = 3
    peers: tuple[str, ...] = ("rejax",)


def measure(python: str, code: str, args: Args, num_seeds: int) -> tuple[float, float]:
    """Steps a second and compile seconds of one program, in a process of its own. Raises ``SystemExit`` if it fails."""
    setting = json.dumps([args.env, num_seeds, args.num_envs, args.budget, args.repeats])
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
    if not set(args.peers) <= {"rejax"}:
        raise SystemExit(f"error: peers must be of rejax; got {', '.join(args.peers)}")
    programs = [("jrl", sys.executable, JRL)] + [(p, peer_python(), REJAX) for p in args.peers]
    print(f"PPO on {args.env}, {args.num_envs} envs x 128 steps, 4 epochs x 4 minibatches, two 64x64 tanh towers")
    print("| seeds | program | env steps/s | jrl over it | compile s |\n| --- | --- | --- | --- | --- |")
    for i, num_seeds in enumerate(args.seeds):
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
