"""Recall: a symbol is shown once, then noise for hundreds of steps, then it is asked for."""

import jax
import jax.numpy as jnp

from jrl.envs.types import Discrete, Environment
from jrl.numerics import checks

Array = jax.Array


def recall(delay: int = 512, queries: int = 16, symbols: int = 4) -> Environment:
    """One of ``symbols`` is shown at the first step; ``delay`` steps later it is asked for, ``queries`` times in a row.

    A memory that reaches less than ``delay`` steps back can only guess: return ``1 / symbols``, where the best is 1. Each answer
    is worth ``1 / queries``. Observations are float32 ``[2 symbols + 2]``: the symbol (at the first step alone), another drawn at
    random at every step, and two flags, whether it is shown and whether it is asked for.
    """
    for name, value in (("delay", delay), ("queries", queries), ("symbols", symbols)):
        checks.positive_int(name, value)

    def observe(key: Array, symbol: Array, t: Array) -> Array:
        noise = jax.nn.one_hot(jax.random.randint(key, (), 0, symbols), symbols, dtype=jnp.float32)
        shown = jnp.where(t == 0, jax.nn.one_hot(symbol, symbols, dtype=jnp.float32), 0.0)
        return jnp.concatenate([shown, noise, jnp.stack([t == 0, t >= delay]).astype(jnp.float32)])

    def reset(key: Array) -> tuple[Array, tuple[Array, Array]]:
        key_symbol, key_noise = jax.random.split(key)
        symbol = jax.random.randint(key_symbol, (), 0, symbols)
        return observe(key_noise, symbol, jnp.int32(0)), (symbol, jnp.int32(0))

    def step(
        key: Array, state: tuple[Array, Array], action: Array
    ) -> tuple[Array, tuple[Array, Array], Array, Array, Array]:
        symbol, t = state
        reward = jnp.where((t >= delay) & (action == symbol), 1 / queries, 0.0)
        t = t + 1
        return observe(key, symbol, t), (symbol, t), reward, t >= delay + queries, jnp.bool_(False)

    return Environment(f"Recall-{delay}", reset, step, Discrete(symbols), time_limit=delay + queries)
