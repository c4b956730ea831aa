"""Reading a program's equations."""

import jax
import jax.numpy as jnp

# They move, choose or convert numbers; they do not compute with them.
MOVES = {
    *("convert_element_type", "reshape", "broadcast_in_dim", "transpose", "squeeze", "expand_dims", "slice", "split"),
    *("dynamic_slice", "dynamic_update_slice", "gather", "scatter", "concatenate", "pad", "rev", "select_n", "copy"),
    *("copy_p", "device_put", "reduce_precision", "stop_gradient", "optimization_barrier", "iota"),
}


def equations(jaxpr, scope=""):
    """Every ``(equation, scope)`` that computes, through all inner programs; an inner scope begins with the outer."""
    for eqn in jaxpr.eqns:
        here = f"{scope}/{eqn.source_info.name_stack}"
        inner = [
            part
            for value in eqn.params.values()
            for part in (value if isinstance(value, (tuple, list)) else [value])
            if hasattr(getattr(part, "jaxpr", part), "eqns")
        ]
        for part in inner:
            yield from equations(getattr(part, "jaxpr", part), here)
        if not inner:
            yield eqn, here


def is_half(value):
    return getattr(value.aval, "dtype", None) in (jnp.bfloat16, jnp.float16)


def of(function, *args):
    return jax.make_jaxpr(function)(*args).jaxpr
