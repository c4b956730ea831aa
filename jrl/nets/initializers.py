"""Orthogonal initialization that is safe in every program."""

import math

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from jrl.numerics import host

Array = jax.Array


def _qr(x: Array) -> tuple[Array, Array]:
    q, r = jnp.linalg.qr(x)
    return q, r


# One at a time under vmap on a CPU: a batched QR in a program over several host devices starves XLA's thread pool and hangs.
_one_qr_at_a_time = sequential_vmap(_qr)


def orthogonal(scale: float = 1.0):
    """Orthogonal kernels (Saxe et al. 2014, arXiv 1312.6120): the last axis against all others, times ``scale``."""

    def init(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        *rows, columns = shape
        num_rows = math.prod(rows)
        tall = jax.random.normal(key, (max(num_rows, columns), min(num_rows, columns)), jnp.float32)
        q, r = (_one_qr_at_a_time if host.platform() == "cpu" else _qr)(tall)
        q = q * jnp.sign(jnp.diagonal(r))[None]  # makes the distribution uniform over orthogonal matrices
        q = q if num_rows >= columns else q.T
        return (scale * q).reshape(shape).astype(dtype)

    return init
