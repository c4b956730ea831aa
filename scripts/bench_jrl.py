"""One measurement of jrl for scripts/bench: it compiles, waits for a line on its input, and prints what it measured."""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jrl import envs, nets, run
from jrl.algorithm import Algorithm, check
from jrl.algos import dqn, ppo, pqn
from jrl.numerics import host, optim
from jrl.run import layout, program
from jrl.run.kernels import launches

SECOND = {
    "ppo": 150_000,
    "dqn": 60_000,
    "pqn": 400_000,
}  # environment steps that one seed takes in a second or less on a GPU


def algorithm(setting: dict[str, Any]) -> Algorithm:
    """The algorithm at rejax's setting: a constant learning rate, gradients clipped by value, optax's eps."""
    env = envs.make(setting["env"])
    optimizer = optim.OptimizerConfig(schedule="constant", clip="value")
    numbers = optim.Hyper(eps=1e-8)
    if setting["algo"] == "ppo":
        network = nets.Config(torso="mlp")
        config = ppo.Config(num_envs=setting["num_envs"], network=network, optimizer=optimizer)
        return ppo.make(env, config, ppo.Hyper(optimizer=numbers))
    if setting["algo"] == "dqn":
        static = {name: setting[name] for name in ("num_envs", "batch_size", "capacity", "target_every")}
        network = nets.ValueConfig(torso="mlp", hidden=(64, 64), norm="none")
        config = dqn.Config(learning_starts=0, network=network, optimizer=optimizer, **static)
        return dqn.make(env, config, dqn.Hyper(learning_rate=2.5e-4, optimizer=numbers))
    network = nets.ValueConfig(torso="mlp", hidden=(64, 64), norm="layer")
    config = pqn.Config(
        num_envs=setting["num_envs"], num_steps=64, num_minibatches=16, network=network, optimizer=optimizer
    )
    return pqn.make(env, config, pqn.Hyper(optimizer=numbers))


def wait() -> None:
    """Say that everything is compiled, and wait to be told to go on."""
    print("compiled", flush=True)
    sys.stdin.readline()


def pure(setting: dict[str, Any], algo: Algorithm) -> dict[str, Any]:
    """The compiled chunk of the run loop by itself."""
    num_seeds, per_update = setting["num_seeds"], algo.env_steps_per_update
    on_gpu = jax.default_backend() == "gpu"
    budget = setting["budget"] or (SECOND[setting["algo"]] * num_seeds if on_gpu else 1_000_000)
    updates = max(1, budget // per_update // num_seeds)
    if on_gpu:
        updates = min(updates, max(1, 120_000_000 // per_update // num_seeds))
    begin = time.perf_counter()
    chosen = layout.choose(num_seeds, jax.devices(), None)
    keys = layout.put(chosen, layout.pad(chosen, jax.random.split(jax.random.key(0), num_seeds)))
    state = jax.jit(layout.over_members(chosen, jax.vmap(lambda k: algo.init(k, None, 10**6))))(keys)
    names = list(check(algo)[1])
    members = program.LoopState(state, layout.put(chosen, jnp.zeros((chosen.num_slots, len(names)))))
    every = max(1, updates // 1000)
    chunk = program.chunk(algo, names, every, program.max_rows(num_seeds))
    lowered = jax.jit(layout.over_members(chosen, chunk), donate_argnums=0).lower(members, jnp.int32(1), jnp.int32(0))
    compiled = lowered.compile(compiler_options=host.chunk_compiler_options())
    compiling = time.perf_counter() - begin
    used: Any = compiled.memory_analysis()
    wait()
    n, before = jnp.int32(every * (updates // every)), jnp.int32(0)  # whole rows
    for _ in range(2):  # the first call warms up, the second records what a GPU repeats
        members, _ = jax.block_until_ready(compiled(members, n, before))
    seconds = []
    for _ in range(setting["repeats"]):
        begin = time.perf_counter()
        members, _ = jax.block_until_ready(compiled(members, n, before))
        seconds.append(time.perf_counter() - begin)
    return {
        "speed": int(n) * per_update * num_seeds / min(seconds),
        "compile": compiling,
        "gib": (used.temp_size_in_bytes + used.argument_size_in_bytes) / 2**30,
        "kernels": launches(compiled).total if on_gpu else None,
    }


def loop(setting: dict[str, Any], algo: Algorithm) -> dict[str, Any]:
    """A whole run with a folder; ``besides`` is all that it takes besides compiling and training."""
    wait()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        key, steps = jax.random.key(0), setting["loop_steps"]
        result = run.train(
            algo, key, steps, num_seeds=setting["num_seeds"], run_dir=Path(folder) / "run", progress=False
        )
        total = time.perf_counter() - begin
    s = result.summary
    besides = total - s["compile_seconds"] - s["run_seconds"]
    return {"speed": s["env_steps_per_second"], "compile": s["compile_seconds"], "besides": besides}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps((loop if given["program"] == "run.train" else pure)(given, algorithm(given))), flush=True)
