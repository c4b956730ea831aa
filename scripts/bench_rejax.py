"""One measurement of rejax for scripts/bench, run by the peers' interpreter: it compiles, waits for a line on its input, and prints what
it measured."""

import json
import sys
import time
from typing import Any

import jax
from rejax import DQN, PPO, PQN

SECOND = {
    "ppo": 100_000,
    "dqn": 30_000,
    "pqn": 200_000,
}  # environment steps that one seed takes in a second or so on a GPU


def algorithm(s: dict[str, Any]) -> tuple[Any, int]:
    """The algorithm, and the environment steps of its whole run."""
    per_update = s["num_envs"] * {"ppo": 128, "dqn": 1, "pqn": 64}[s["algo"]]
    on_gpu = jax.default_backend() == "gpu"
    budget = s["budget"] or (min(SECOND[s["algo"]] * s["num_seeds"], 120_000_000) if on_gpu else 1_000_000)
    steps = max(1, budget // per_update // s["num_seeds"]) * per_update
    common = dict(env=s["env"], num_envs=s["num_envs"], total_timesteps=steps, eval_freq=steps)
    common |= dict(skip_initial_evaluation=True, learning_rate=2.5e-4)
    if s["algo"] == "ppo":
        agent = {"activation": "tanh", "hidden_layer_sizes": (64, 64)}
        algo = PPO.create(
            num_steps=128, num_epochs=4, num_minibatches=4, max_grad_norm=0.5, agent_kwargs=agent, **common
        )
    elif s["algo"] == "pqn":  # its network is always two layers of 64 relu units with layer normalization
        algo = PQN.create(num_steps=64, num_epochs=4, num_minibatches=16, max_grad_norm=10.0, td_lambda=0.95, **common)
    else:
        target_update = s["target_every"] * s["num_envs"]
        sizes = dict(batch_size=s["batch_size"], buffer_size=s["capacity"], fill_buffer=0, num_epochs=1)
        sizes |= dict(target_update_freq=target_update, polyak=0.0, exploration_fraction=0.2)
        algo = DQN.create(ddqn=True, max_grad_norm=10.0, agent_kwargs={"activation": "relu"}, **sizes, **common)
    return algo.replace(eval_callback=lambda *args: ()), steps  # training alone is timed


def main(s: dict[str, Any]) -> None:
    algo, steps = algorithm(s)
    keys = jax.random.split(jax.random.key(0), s["num_seeds"])
    begin = time.perf_counter()
    train = jax.jit(jax.vmap(algo.train)).lower(keys).compile()
    compiling = time.perf_counter() - begin
    used: Any = train.memory_analysis()
    print("compiled", flush=True)
    sys.stdin.readline()
    for _ in range(2):
        jax.block_until_ready(train(keys))
    seconds = []
    for _ in range(s["repeats"]):
        begin = time.perf_counter()
        jax.block_until_ready(train(keys))
        seconds.append(time.perf_counter() - begin)
    speed, gib = steps * s["num_seeds"] / min(seconds), used.temp_size_in_bytes / 2**30
    print(json.dumps({"speed": speed, "compile": compiling, "gib": gib}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
