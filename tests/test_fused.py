"""The fused kernels of small networks, in the interpreter of Pallas's GPU kernels, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import interpreted

from jrl import envs, nets
from jrl.nets import mlp, mlp_kernel
from jrl.numerics import host

RANK_PROMOTION = "allow"  # the interpreter promotes ranks
pytestmark = pytest.mark.skipif(jax.__version_info__ < host.KERNELS_NEED_JAX, reason="the kernels need a newer JAX")


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    monkeypatch.setattr(mlp_kernel, "MULTIPROCESSORS", 2)  # so that warpgroups go through several items
    with interpreted():
        yield


def drawn(agents, rows, inputs, outputs):
    rng = np.random.default_rng(0)
    shapes = [(inputs, 64), (64,), (64, 64), (64,), (64, outputs), (outputs,)]
    params = tuple(rng.normal(size=(agents, *s)).astype(np.float32) / 8 for s in shapes)
    x, d_out = (rng.normal(size=(agents, rows, n)).astype(np.float32) for n in (inputs, outputs))
    return params, x, d_out


def exact(params, x, d_out, activation):
    """Outputs and gradients of the weights, by hand in float64."""
    w1, b1, w2, b2, w3, b3, x, d_out = (np.asarray(a, np.float64) for a in (*params, x, d_out))
    act = np.tanh if activation == "tanh" else lambda z: np.maximum(z, 0)
    slope = (lambda h: 1 - h * h) if activation == "tanh" else lambda h: (h > 0).astype(float)
    h1 = act(x @ w1 + b1[:, None])
    h2 = act(h1 @ w2 + b2[:, None])
    dz2 = d_out @ w3.swapaxes(1, 2) * slope(h2)
    dz1 = dz2 @ w2.swapaxes(1, 2) * slope(h1)
    grads = [a.swapaxes(1, 2) @ b for a, b in ((x, dz1), (h1, dz2), (h2, d_out))]
    sums = [d.sum(1) for d in (dz1, dz2, d_out)]
    return h2 @ w3 + b3[:, None], tuple(g for pair in zip(grads, sums, strict=True) for g in pair)


def close(given, wanted):
    def leaf(x, y):
        assert np.abs(np.asarray(x) - y).max() <= 3e-5 * np.abs(y).max()

    jax.tree.map(leaf, given, wanted)


@pytest.mark.parametrize(
    "agents, rows, inputs, outputs, activation",
    [(3, 70, 4, 2, "tanh"), (1, 4, 3, 1, "relu"), (2, 70, 40, 3, "relu"), (2, 5, 40, 1, "tanh")],
)
def test_outputs_and_gradients_are_those_of_float64(agents, rows, inputs, outputs, activation):
    params, x, d_out = drawn(agents, rows, inputs, outputs)

    def one(params, x, d_out):
        out, backward = jax.vjp(lambda p: mlp.mlp(p, x, activation), params)
        return out, backward(d_out)[0]

    close(jax.vmap(one)(params, x, d_out), exact(params, x, d_out, activation))


def test_rows_of_one_network_under_vmap_are_more_rows_of_it():
    params, x, _ = drawn(1, 12, 4, 2)
    one = jax.tree.map(lambda p: p[0], params)
    out = jax.vmap(lambda x: mlp.mlp(one, x, "tanh"))(x.reshape(3, 4, 4))
    close(out.reshape(1, 12, 2), exact(params, x, np.zeros((1, 12, 2)), "tanh")[0])


BOX = envs.Box((-1.0, -1.0), (1.0, 1.0))


@pytest.mark.parametrize(
    "shared, space, shape", [(False, BOX, (4,)), (True, envs.Discrete(3), (4,)), (False, envs.Discrete(3), (5, 4, 2))]
)
def test_a_policy_and_its_value_are_the_module_s(shared, space, shape, monkeypatch):
    config = nets.Config(torso="mlp", hidden=(64, 64), shared=shared)
    network = nets.actor_critic(config, jax.ShapeDtypeStruct(shape, jnp.float32), space)
    params = jax.tree.map(lambda p: p + 0.1, network.init(jax.random.key(0)))
    obs, first = jax.random.normal(jax.random.key(1), (1, 5, *shape)), jnp.zeros((1, 5), bool)

    def loss(params):
        out = network.unroll(params, (), obs, first)[1]
        return sum(jnp.sum(jnp.sin(3 * x)) for x in jax.tree.leaves(out)), out

    fused = jax.grad(loss, has_aux=True)(params)
    monkeypatch.setenv("JRL_KERNELS", "xla")
    plain = jax.grad(loss, has_aux=True)(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-4), fused, plain)


def test_action_values_are_the_module_s(monkeypatch):
    config = nets.ValueConfig(hidden=(64, 64), norm="none")
    network = nets.action_values(config, jax.ShapeDtypeStruct((4,), jnp.float32), envs.Discrete(3))
    params, obs = network.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (5, 4))
    fused = network.step(params, (), obs, jnp.zeros(5, bool))[1]
    monkeypatch.setenv("JRL_KERNELS", "xla")
    np.testing.assert_allclose(fused, network.step(params, (), obs, jnp.zeros(5, bool))[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [{"norm": "layer"}, {"hidden": (64,)}, {"gru": 8}, {"activation": "gelu"}])
def test_other_networks_are_left_to_xla(config):
    config = nets.Config(**{"hidden": (64, 64)} | config)
    network = nets.actor_critic(config, jax.ShapeDtypeStruct((4,), jnp.float32), envs.Discrete(2))
    params = network.init(jax.random.key(0))
    memory = jax.tree.map(lambda x: x[None], network.memory)
    program = jax.make_jaxpr(network.step)(params, memory, jnp.zeros((1, 4)), jnp.zeros(1, bool))
    assert "mlp_" not in str(program) and "dot_general" in str(program)


def test_the_kernels_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("JRL_KERNELS", "xla")
    assert not host.has_kernels()
    monkeypatch.setenv("JRL_KERNELS", "triton")
    with pytest.raises(ValueError, match="JRL_KERNELS must be one of auto, xla; got 'triton'"):
        host.has_kernels()


def test_half_width_is_left_to_xla():
    network = nets.actor_critic(nets.Config(), jax.ShapeDtypeStruct((4,), jnp.float32), envs.Discrete(2))
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), network.init(jax.random.key(0)))
    program = jax.make_jaxpr(network.step)(params, (), jnp.zeros((1, 4), jnp.bfloat16), jnp.zeros(1, bool))
    assert "dot_general" in str(program) and "custom_vmap" not in str(program)
