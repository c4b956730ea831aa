"""Networks: shapes, initialization, recurrence and precision."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

from jrl import nets
from jrl.envs import Box, Discrete, MaskedObs, MultiDiscrete
from jrl.equations.distributions import MASKED, NormalParams
from jrl.nets import moe, transformer
from jrl.nets.initializers import orthogonal
from jrl.nets.memory import AttentionConfig
from jrl.numerics import precision

VECTOR = jax.ShapeDtypeStruct((5,), jnp.float32)
IMAGE = jax.ShapeDtypeStruct((10, 10, 4), jnp.bool_)


def random_obs(key, spec, *batch):
    return jax.random.uniform(key, (*batch, *spec.shape)).astype(spec.dtype)


@pytest.mark.thorough(5)
@pytest.mark.parametrize("spec", [VECTOR, IMAGE, jax.ShapeDtypeStruct((3, 4), jnp.int32)])
@pytest.mark.parametrize(
    "config",
    [nets.Config(), nets.Config(shared=True), nets.Config(gru=8), nets.Config(gru=8, shared=True), nets.Config(lstm=8)],
)
def test_unroll_is_the_steps(spec, config, key):
    net = nets.actor_critic(config, spec, Discrete(3))
    params = net.init(key)
    obs, first = random_obs(key, spec, 6, 2), jnp.zeros((6, 2), bool).at[0].set(True).at[3, 1].set(True)
    start = jax.tree.map(lambda x: jnp.stack([x, x]), net.memory)
    memories, outputs = net.unroll(params, start, obs, first)
    assert outputs.policy.shape == (6, 2, 3) and outputs.value.shape == (6, 2)
    memory = start
    for t in range(6):
        memory, now = net.step(params, memory, obs[t], first[t])
        np.testing.assert_allclose(now.policy, outputs.policy[t], atol=1e-6)
        np.testing.assert_allclose(now.value, outputs.value[t], atol=1e-6)
        jax.tree.map(lambda a, b, t=t: np.testing.assert_allclose(a, b[t], atol=1e-6), memory, memories)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_reset_forgets_and_nothing_else_does(kind, key):
    net = nets.actor_critic(nets.Config(**{kind: 8}), VECTOR, Discrete(2))
    params, obs = net.init(key), random_obs(key, VECTOR, 4, 1)
    start = jax.tree.map(lambda m: m[None] + 1.0, net.memory)

    def value(obs, first):
        return net.unroll(params, start, obs, first)[1].value[-1, 0]

    grads = jax.grad(value)(obs, jnp.zeros((4, 1), bool).at[2].set(True))
    assert (grads[:2] == 0).all() and (grads[2:] != 0).any()
    grads = jax.grad(value)(obs, jnp.zeros((4, 1), bool))
    assert (jnp.abs(grads).sum((1, 2)) > 0).all()


def test_heads(key):
    def policy(space):
        return nets.actor_critic(nets.Config(), VECTOR, space)

    obs, first = jnp.zeros((2, 5)), jnp.ones(2, bool)
    net = policy(MultiDiscrete((2, 3)))
    assert net.step(net.init(key), (), obs, first)[1].policy.shape == (2, 5)
    net = policy(Box((-1.0,), (1.0,)))
    out = net.step(net.init(key), (), obs, first)[1].policy
    assert isinstance(out, NormalParams) and out.mean.shape == out.log_std.shape == (2, 1)
    masked = nets.actor_critic(nets.Config(), MaskedObs(VECTOR, jax.ShapeDtypeStruct((3,), jnp.bool_)), Discrete(3))
    mask = jnp.array([[True, False, True]] * 2)
    logits = masked.step(masked.init(key), (), MaskedObs(obs, mask), first)[1].policy
    assert (logits[:, 1] == MASKED).all() and (jnp.abs(logits[:, 0]) < 1).all()


def test_a_conv_torso_needs_an_image():
    with pytest.raises(ValueError, match=r"torso=conv needs observations \[height, width, channels\], got \(5,\)"):
        nets.actor_critic(nets.Config(torso="conv"), VECTOR, Discrete(2))


@pytest.mark.parametrize("shape", [(4, 8), (8, 4), (3, 3, 2, 16)])
def test_orthogonal(shape, key):
    kernel = orthogonal(2.0)(key, shape).reshape(-1, shape[-1])
    gram = kernel.T @ kernel if kernel.shape[0] >= kernel.shape[1] else kernel @ kernel.T
    np.testing.assert_allclose(gram, 4 * np.eye(len(gram)), atol=1e-5)
    batch = jax.vmap(lambda k: orthogonal(2.0)(k, shape))(jax.random.split(key, 3))
    np.testing.assert_allclose(batch[1], orthogonal(2.0)(jax.random.split(key, 3)[1], shape), atol=1e-6)


@pytest.mark.two_devices
def test_initialization_does_not_hang_over_two_devices(key):
    net = nets.actor_critic(nets.Config(), VECTOR, Discrete(2))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    init = jax.jit(jax.shard_map(jax.vmap(net.init), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    assert jax.block_until_ready(jax.tree.leaves(init(jax.random.split(key, 16))))[0].shape[0] == 16


@pytest.mark.parametrize("spec", [VECTOR, IMAGE])
@pytest.mark.parametrize("config", [nets.Config(), nets.Config(gru=8)])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32(spec, config, key):
    plain = nets.actor_critic(config, spec, Discrete(3))
    net = precision.apply(precision.parse("bfloat16"), plain)
    params = net.init(key)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    start, obs, first = (
        jax.tree.map(lambda x: x[None], net.memory),
        random_obs(key, spec, 2, 1),
        jnp.zeros((2, 1), bool),
    )
    memory, out = net.unroll(params, start, obs, first)
    assert {x.dtype for x in jax.tree.leaves((memory, out))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(out.value, plain.unroll(params, start, obs, first)[1].value, atol=0.05)
    program = jaxprs.equations(jaxprs.of(net.unroll, params, start, obs, first))
    products = [e for e, _ in program if e.primitive.name in ("dot_general", "conv_general_dilated")]
    assert products and all(v.aval.dtype == jnp.bfloat16 for e in products for v in e.invars)


NETWORKS = {
    "actor-critic": lambda spec, **kw: nets.actor_critic(nets.Config(**kw), spec, Discrete(3)),
    "values": lambda spec, **kw: nets.action_values(nets.ValueConfig(**kw), spec, Discrete(3)),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("torso", ["conv", "mlp"])
def test_images_of_bytes_are_shares_of_255(make, torso, key):
    shape = (8, 8, 3)
    of_bytes, of_floats = (make(jax.ShapeDtypeStruct(shape, dtype), torso=torso) for dtype in (jnp.uint8, jnp.float32))
    params, first = of_floats.init(key), jnp.zeros(2, bool)
    image = jax.random.randint(key, (2, *shape), 0, 256).astype(jnp.uint8)
    given, wanted = (
        net.step(params, net.memory, x, first)[1] for net, x in ((of_bytes, image), (of_floats, image / 255))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), given, wanted)
    half = precision.apply("pure_bfloat16", of_bytes)
    assert jax.tree.leaves(half.step(half.init(key), half.memory, image, first)[1])[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_observations_that_would_be_misread_are_refused(make):
    with pytest.raises(ValueError, match=r"\(3, 64, 64\) look like \[channels, height, width\]"):
        make(jax.ShapeDtypeStruct((3, 64, 64), jnp.float32))
    with pytest.raises(ValueError, match=r"single integers, .*: make them one-hot"):
        make(jax.ShapeDtypeStruct((), jnp.int32))
    with pytest.raises(ValueError, match="observations beside a mask must be one array"):
        make(MaskedObs({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, jax.ShapeDtypeStruct((3,), bool)))
    make(jax.ShapeDtypeStruct((3, 64, 64), jnp.float32), torso="mlp", hidden=(4,))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"gru": 4},
        {"torso": "vit", "vit_dim": 16, "vit_heads": 2},
        {"attention": AttentionConfig("dense")},
        {"attention": AttentionConfig("nsa")},
    ],
    ids=["conv", "gru", "vit", "attention", "sparse attention"],
)
def test_parameters_are_float32_with_64_bits_enabled(config):
    spec = jax.ShapeDtypeStruct((8, 8, 2), jnp.float32)
    with jax.enable_x64(True):
        for net in (
            nets.actor_critic(nets.Config(hidden=(16,), **config), spec, Box((-1.0,), (1.0,))),
            nets.action_values(
                nets.ValueConfig(hidden=(16, 16), dueling=True, noisy=True, **config), spec, Discrete(3)
            ),
        ):
            found = jax.tree.leaves_with_path((jax.eval_shape(net.init, jax.random.key(0)), net.memory))
            assert not [jax.tree_util.keystr(path) for path, x in found if x.dtype == jnp.float64]


@pytest.mark.parametrize("mixer", ["dense", "nsa", "mla", "rwkv"])
def test_a_decoder_is_float32_with_64_bits_enabled(mixer):
    experts = moe.Config(4, 2, 8, scores="sigmoid") if mixer == "dense" else moe.Config()
    config = transformer.Config(11, 16, 2, 2, 2, ffn_dim=16, attention=mixer, experts=experts)
    with jax.enable_x64(True):
        params = jax.eval_shape(lambda key: transformer.init(key, config), jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


PICTURE = jax.ShapeDtypeStruct((36, 40, 2), jnp.uint8)


def test_the_networks_for_pictures_have_the_papers_layers(key):
    network = nets.action_values(
        nets.ValueConfig(torso="nature", hidden=(512,), norm="none"),
        jax.ShapeDtypeStruct((84, 84, 4), jnp.uint8),
        Discrete(6),
    )
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(network.init, key)["params"])
    assert [shapes["torso"][f"Convolution_{i}"]["kernel"] for i in range(3)] == [
        (8, 8, 4, 32),
        (4, 4, 32, 64),
        (3, 3, 64, 64),
    ]
    assert shapes["torso"]["Dense_0"]["kernel"] == (7 * 7 * 64, 512)  # Mnih et al. 2015, extended data table 1
    network = nets.actor_critic(
        nets.Config(torso="impala", hidden=(256,), shared=True),
        jax.ShapeDtypeStruct((72, 96, 3), jnp.uint8),
        Discrete(9),
    )
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(network.init, key)["params"])
    kernels = [layer["kernel"] for layer in shapes["shared"]["ResidualNetwork_0"].values()]
    assert len(kernels) == 15 and shapes["shared"]["Dense_0"]["kernel"] == (
        9 * 12 * 32,
        256,
    )  # Espeholt et al. 2018, figure 3
    with pytest.raises(ValueError, match=r"torso=nature leave nothing of observations \(35, 40, 2\)"):
        nets.actor_critic(nets.Config(torso="nature"), jax.ShapeDtypeStruct((35, 40, 2), jnp.uint8), Discrete(2))


def test_the_convolutions_of_nature_are_xlas(key):
    from jrl.nets.torso import Convolution

    x, module = random_obs(key, jax.ShapeDtypeStruct((11, 13, 2), jnp.float32), 3), Convolution(5, 4, 2)
    params = module.init(key, x)["params"]
    wanted = jax.lax.conv_general_dilated(
        x, params["kernel"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    np.testing.assert_allclose(module.apply({"params": params}, x), wanted, atol=1e-5)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_dictionary_of_a_picture_and_a_vector_is_read(make, key):
    spec = {
        "picture": PICTURE,
        "speed": jax.ShapeDtypeStruct((3,), jnp.float32),
        "time": jax.ShapeDtypeStruct((), jnp.float32),
    }
    network = make(spec, torso="nature", hidden=(8,))
    params = network.init(key)
    obs = {name: random_obs(key, part, 2) * (200 if name == "picture" else 1) for name, part in spec.items()}

    def of(obs):
        return jax.tree.leaves(network.step(params, network.memory, obs, jnp.zeros(2, bool))[1])[0]

    for name, part in obs.items():
        changed = obs | {name: part + jnp.ones_like(part)}
        assert (of(changed) != of(obs)).any(), name
    with pytest.raises(
        ValueError, match=r"network.torso=conv needs observations \[height, width, channels\], got \(\(2,\), \(3,\)\)"
    ):
        make((jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.float32)), torso="conv")


def test_a_standard_deviation_follows_the_state_within_its_bounds(key):
    space = Box((-1, -1), (1, 1))
    obs = 100 * random_obs(key, VECTOR, 50)
    config = nets.Config(state_std=True, log_std=-1, log_std_min=-1.05, log_std_max=-0.95)
    network = nets.actor_critic(config, VECTOR, space)
    params = network.init(key)
    params = {"params": params["params"] | {"policy": jax.tree.map(lambda x: 100 * x, params["params"]["policy"])}}
    log_std = network.step(params, (), obs, jnp.zeros(50, bool))[1].policy.log_std
    assert log_std.shape == (50, 2) and log_std.min() == np.float32(-1.05) and log_std.max() == np.float32(-0.95)
    fixed = nets.actor_critic(nets.Config(log_std=-1, log_std_max=-1), VECTOR, space)
    params = fixed.init(key)
    params["params"]["policy"]["log_std"] += 3
    assert (fixed.step(params, (), obs, jnp.zeros(50, bool))[1].policy.log_std == -1).all()
    with pytest.raises(
        ValueError, match=r"network.log_std must be between log_std_min and log_std_max, -80 and -2; got 0"
    ):
        nets.Config(log_std_max=-2)
    with pytest.raises(ValueError, match="a network has one memory; got 2 and 3"):
        nets.Config(gru=2, lstm=3)
