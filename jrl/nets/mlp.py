"""A small network as one operation that ``jax.grad`` and ``jax.vmap`` know, by the kernels of ``mlp_kernel``.

It is written for one agent; any nesting of vmaps around it becomes the leading axis of a single kernel launch.
"""

import functools

import jax
import jax.numpy as jnp

from jrl.nets.mlp_kernel import backward, backward_from_product, forward, forward_from_product

MOST_INPUTS = 32  # for wider x, XLA makes the first product


def batch_all(size, batched, args):
    """Give every argument the leading axis that some have."""
    return [
        a if is_batched else jnp.broadcast_to(a, (size, *a.shape)) for a, is_batched in zip(args, batched, strict=True)
    ]


@functools.cache
def forward_over_agents(function, activation, row_axis):
    """A forward function under vmap: one launch. Rows of one network become more rows of it; networks more networks.

    The first argument has rows along ``row_axis``, the output along axis 1.
    """

    @jax.custom_batching.custom_vmap
    def merged(first, *weights):
        return function(first, *weights, activation=activation)

    @merged.def_vmap
    def _(size, batched, first, *weights):
        [first] = batch_all(size, batched[:1], [first])
        if not any(batched[1:]):
            first = jnp.moveaxis(first, 0, row_axis)
            out = merged(first.reshape(*first.shape[:row_axis], -1, *first.shape[row_axis + 2 :]), *weights)
            return jnp.moveaxis(out.reshape(out.shape[0], size, -1, out.shape[2]), 1, 0), True
        weights = batch_all(size, batched[1:], weights)
        out = merged(*(a.reshape(-1, *a.shape[2:]) for a in (first, *weights)))
        return out.reshape(size, -1, *out.shape[1:]), True

    return merged


@functools.cache
def backward_over_agents(function, activation):
    """A backward function under vmap: one launch."""

    @jax.custom_batching.custom_vmap
    def merged(*args):
        return function(*args, activation=activation)

    @merged.def_vmap
    def _(size, batched, *args):
        result = merged(*(a.reshape(-1, *a.shape[2:]) for a in batch_all(size, batched, args)))
        result = jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), result)
        return result, jax.tree.map(lambda _: True, result)

    return merged


def one_agent(function, *args):
    """Call ``function`` for a single agent."""
    return jax.tree.map(lambda a: a[0], function(*(a[None] for a in args)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def whole(params, x, activation):
    """Compute what ``mlp`` does, all of it by kernels: for narrow x."""
    return one_agent(forward_over_agents(forward, activation, 1), x, *params)


def whole_forward(params, x, activation):
    """Compute the output, and keep what the gradients need: the arguments."""
    return whole(params, x, activation), (params, x)


def whole_backward(activation, saved, dout):
    """Gradients of the weights come from the kernel; that of x from XLA, which drops it where nobody uses it."""
    params, x = saved
    dx = jax.vjp(lambda x: plain_mlp(params, x, activation), x)[1](dout)[0]
    return one_agent(backward_over_agents(backward, activation), x, *params, dout), dx


whole.defvjp(whole_forward, whole_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def tail(params, product, activation):
    """Compute the output [N, A] of one agent's network from x @ W1, transposed to [64, N]; params = (b1, ..., b3)."""
    return one_agent(forward_over_agents(forward_from_product, activation, 2), product, *params)


def tail_forward(params, product, activation):
    """Compute the output, and keep what the gradients need: the arguments."""
    return tail(params, product, activation), (params, product)


def tail_backward(activation, saved, dout):
    """Take all gradients from the kernel."""
    params, product = saved
    backward = backward_over_agents(backward_from_product, activation)
    dproduct, *gradients = one_agent(backward, product, *params, dout)
    return tuple(gradients), dproduct


tail.defvjp(tail_forward, tail_backward)


def mlp(params, x, activation="tanh"):
    """Compute the output [N, A] of one agent's network; params = (W1, b1, W2, b2, W3, b3), x [N, D].

    activation is "tanh" or "relu". Only reverse mode differentiates it, and once.
    """
    return towers([params], x, activation)[0]


def towers(params, x, activation):
    """Compute the outputs of several networks for the same x [N, D], as a list; each network's params are those of ``mlp``.

    Of wide x, XLA computes and differentiates the product with all W1 at once, in its own precision
    (``jax_default_matmul_precision``), and one kernel does the rest for all networks.
    """
    if x.shape[1] <= MOST_INPUTS:
        return [whole(tuple(one), x, activation) for one in params]
    outputs = [one[5].shape[0] for one in params]
    W1, b1, W2, b2, W3, b3 = (
        jnp.stack([pad_columns(one[i], max(outputs)) if i > 3 else one[i] for one in params]) for i in range(6)
    )
    product = jnp.einsum("nd,tdu->tun", x, W1)
    out = jax.vmap(lambda others, product: tail(others, product, activation))((b1, W2, b2, W3, b3), product)
    return [out[t, :, :width] for t, width in enumerate(outputs)]


def pad_columns(array, width):
    """Append zeros to the last axis."""
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])])


def plain_mlp(params, x, activation="tanh"):
    """Compute what ``mlp`` does by ordinary JAX."""
    W1, b1, W2, b2, W3, b3 = params
    function = jnp.tanh if activation == "tanh" else jax.nn.relu
    return function(function(x @ W1 + b1) @ W2 + b2) @ W3 + b3
