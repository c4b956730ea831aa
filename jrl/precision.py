"""Precision policies: which dtype parameters are kept in, computed in, and given out in.

Mixed precision as in Micikevicius et al. 2018 (arXiv 1710.03740) with bfloat16 (Kalamkar et al. 2019, arXiv 1905.12322):
float32 parameters, bfloat16 matrix products, float32 outputs. What comes after a network (softmax, log-probabilities,
returns, losses, optimizer moments, normalizer statistics) stays float32 under every policy.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

DTYPES = ("float32", "bfloat16", "float16")
NAMED = {
    "float32": ("float32", "float32", "float32"),
    "bfloat16": ("float32", "bfloat16", "float32"),
}


@dataclass(frozen=True)
class Policy:
    """Dtype names of parameters, computation and outputs. ``parse`` makes one from a string."""

    params: str = "float32"
    compute: str = "float32"
    output: str = "float32"

    def __post_init__(self) -> None:
        for field in ("params", "compute", "output"):
            if getattr(self, field) not in DTYPES:
                raise ValueError(f"precision {field} must be one of {', '.join(DTYPES)}; got {getattr(self, field)!r}")


def parse(text: str) -> Policy:
    """A policy from ``"float32"``, ``"bfloat16"`` or ``"params=float32,compute=bfloat16,output=float32"``.

    Parts left out of the long form are float32. Raises ``ValueError`` naming what is allowed.
    """
    if text in NAMED:
        return Policy(*NAMED[text])
    fields = {name: dtype for name, _, dtype in (part.partition("=") for part in text.split(","))}
    if not set(fields) <= {"params", "compute", "output"} or len(fields) != len(text.split(",")):
        raise ValueError(
            f"precision must be one of {', '.join(NAMED)}, or like 'params=float32,compute=bfloat16,output=float32'; got {text!r}"
        )
    return Policy(**fields)


def cast(tree: Any, dtype: str) -> Any:
    """The tree with its floating-point leaves in ``dtype``; integers, booleans and keys as they were."""

    def leaf(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)


def apply(policy: Policy, network: Any) -> Any:
    """A network (``jrl.nets.Network``) that keeps, computes and answers in the policy's dtypes.

    Recurrent memory stays in the output dtype between steps.
    """
    if policy == Policy():
        return network

    def wrap(function):
        def run(params, *inputs):
            outputs = function(cast(params, policy.compute), *cast(inputs, policy.compute))
            return cast(outputs, policy.output)

        return run

    return network._replace(
        init=lambda key: cast(network.init(key), policy.params),
        step=wrap(network.step),
        unroll=wrap(network.unroll),
        memory=cast(network.memory, policy.output),
    )
