"""Precision policies: which dtype parameters are kept in, computed in, and given out in.

Mixed precision as in Micikevicius et al. 2018 (arXiv 1710.03740) with bfloat16 (Kalamkar et al. 2019, arXiv 1905.12322):
float32 parameters, half-width matrix products, float32 outputs. What comes after a network (softmax, log-probabilities,
returns, losses, optimizer moments, normalizer statistics) is computed in float32 under every policy, and the few parameters in
``FLOAT32`` are kept in it.

How parameters of half width are stepped (rounding, master copies, loss scaling) is in ``jrl.numerics.rounding``.
"""

import functools
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jrl.numerics import parameters
from jrl.numerics.types import Params

DTYPES = ("float32", "bfloat16", "float16")
FIELDS = ("params", "compute", "output")
NAMED = {
    "float32": ("float32", "float32", "float32"),
    "bfloat16": ("float32", "bfloat16", "float32"),
    "float16": ("float32", "float16", "float32"),
    "pure_bfloat16": ("bfloat16", "bfloat16", "bfloat16"),
}
# Parameters that are float32 under every policy, by one that stands beside them. Routers, since half a width sends tokens to other
# experts (DeepSeek-V3, 2412.19437, section 3.3.1; ``transformers`` keeps its e_score_correction_bias and multiplies in float32), and
# RWKV's decay and bonus (time_decay and time_first, which ``transformers`` keeps), since a decay is an exponential of an exponential.
FLOAT32 = {"router": ("router", "bias"), "decay_down": ("decay", "bonus")}


@dataclass(frozen=True)
class Policy:
    """Dtype names of parameters, computation and outputs. ``parse`` makes one from a string, ``str`` gives it back."""

    params: str = "float32"
    compute: str = "float32"
    output: str = "float32"

    def __post_init__(self) -> None:
        for field in FIELDS:
            if getattr(self, field) not in DTYPES:
                raise ValueError(f"precision {field} must be one of {', '.join(DTYPES)}; got {getattr(self, field)!r}")

    def __str__(self) -> str:
        dtypes = tuple(getattr(self, field) for field in FIELDS)
        named = [name for name, those in NAMED.items() if those == dtypes]
        return named[0] if named else ",".join(f"{f}={d}" for f, d in zip(FIELDS, dtypes, strict=True))


def parse(text: str) -> Policy:
    """A policy from ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"pure_bfloat16"`` or the long form.

    The long form is ``"params=float32,compute=bfloat16,output=float32"``; parts left out are float32. Raises ``ValueError``
    naming what is allowed.
    """
    if not isinstance(text, str):
        raise ValueError(f"precision must be a string, one of {', '.join(NAMED)} or the long form; got {text!r}")
    if text in NAMED:
        return Policy(*NAMED[text])
    parts = [part.partition("=") for part in text.split(",")]
    fields = {name.strip(): dtype.strip() for name, _, dtype in parts}
    if not set(fields) <= set(FIELDS) or len(fields) != len(parts):
        raise ValueError(
            f"precision must be one of {', '.join(NAMED)}, or like 'params=float32,compute=bfloat16,output=float32'; got {text!r}"
        )
    return Policy(**fields)


def cast(tree: Any, dtype: str) -> Any:
    """The tree with its floating-point leaves in ``dtype``; integers, booleans and keys as they were.

    Finite numbers beyond the range of float16 become its largest.
    """

    def leaf(x: Any) -> Any:
        given = getattr(x, "dtype", None)
        if given is None or given == dtype or not jnp.issubdtype(given, jnp.floating):
            return x
        if dtype == "float16":
            most = float(jnp.finfo(dtype).max)
            wide = x.astype(jnp.float32)
            x = jnp.where(jnp.isfinite(wide), jnp.clip(wide, -most, most), wide)
        return x.astype(dtype)

    return jax.tree.map(leaf, tree)


def stays_float32(path: tuple[str, ...], paths: Container[tuple[str, ...]]) -> bool:
    """Whether the parameter at ``path`` is one of ``FLOAT32``, among parameters at ``paths``."""
    return bool(path) and any(path[-1] in names and (*path[:-1], by) in paths for by, names in FLOAT32.items())


def cast_params(params: Params, dtype: str) -> Any:
    """``cast`` of parameters, except for those that stay float32 under every policy."""
    paths = {parameters.names(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}

    def leaf(path: parameters.Names, x: Any) -> Any:
        return cast(x, "float32" if stays_float32(tuple(path), paths) else dtype)

    return parameters.map_with_names(leaf, params)


def apply(policy: Policy | str, target: Any) -> Any:
    """The target under a policy: a network, a function ``(params, *inputs) -> outputs``, or a whole algorithm.

    A network (``jrl.nets.Network``) then keeps its parameters, computes and returns in the policy's dtypes, except that the
    parameters of ``FLOAT32`` stay float32; recurrent memory stays in the output dtype between steps. Applied twice, the inner policy
    says how to compute and the outer one what goes in and comes out. An algorithm (``jrl.algorithm.Algorithm``, vmapped or not) is made anew with
    ``config.precision`` replaced. Raises ``ValueError`` for a wrong string, ``TypeError`` for anything else.
    """
    policy = policy if isinstance(policy, Policy) else parse(policy)
    if hasattr(target, "remake"):
        return target.remake(replace(target.config, precision=str(policy)))
    if hasattr(target, "unroll"):
        return target._replace(
            init=lambda key: cast_params(target.init(key), policy.params),
            step=_over_function(policy, target.step),
            unroll=_over_function(policy, target.unroll),
            memory=cast(target.memory, policy.output),
        )
    if callable(target) and not hasattr(target, "apply"):
        return _over_function(policy, target)
    hint = "; give its apply" if hasattr(target, "apply") else ""
    raise TypeError(f"precision applies to a network, a function of parameters, or an algorithm; got {target!r}{hint}")


def _over_function(policy: Policy, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(params: Params, *inputs: Any, **options: Any) -> Any:
        outputs = function(cast_params(params, policy.compute), *cast(inputs, policy.compute), **options)
        return cast(outputs, policy.output)

    return run


def exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its products of float32 matrices computed in float32, on every platform.

    By default a GPU rounds their operands to TF32, which has 10 bits of fraction, and a TPU to bfloat16, which has 7: good enough for
    a network, too coarse for an exact answer.
    """

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args, **options)

    return run


def apply_to_network(policy: Policy | str, network: Any) -> Any:
    """The network as algorithms see it: under a policy, its outputs (not its memory) in float32, so that all that follows is too.

    Its equations stand in the scope ``network`` of a jaxpr; outside of it no arithmetic is of half width.
    """
    network = apply(policy, network)

    def over(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with jax.named_scope("network"):
                memory, outputs = function(*args)
            return memory, cast(outputs, "float32")

        return run

    return network._replace(step=over(network.step), unroll=over(network.unroll))
