"""Precision policies: on networks, on functions, on whole algorithms, and where they must not reach."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from jrl import envs, nets, run
from jrl.algorithm import over_devices, over_hypers, over_seeds
from jrl.algos import ppo
from jrl.envs.types import Discrete
from jrl.lm import tasks
from jrl.lm.policy import language_model
from jrl.nets import moe, transformer
from jrl.nets.mixers import MIXERS, Recurrent
from jrl.numerics import optim, precision, rounding
from jrl.numerics.optim import OptimizerConfig

RANK_PROMOTION = "allow"  # gymnax promotes ranks

TINY = ppo.Config(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=2, network=nets.Config(hidden=(8,)))
OBS = jax.random.normal(jax.random.key(7), (3, 2, 4))  # [T, B, features]
FIRST = jnp.zeros((3, 2), bool)
POLICIES = ("float32", "bfloat16", "float16", "pure_bfloat16", "params=bfloat16,compute=float16,output=bfloat16")


def network(policy=None):
    net = nets.actor_critic(nets.Config(hidden=(8,)), jax.ShapeDtypeStruct((4,), jnp.float32), Discrete(3))
    return net if policy is None else precision.apply(policy, net)


def dtypes(tree):
    return {str(x.dtype) for x in jax.tree.leaves(tree)}


def make(env="Probe-policy", policy="float32", **fields):
    return ppo.make(envs.make(env), dataclasses.replace(TINY, precision=policy, **fields))


# Strings


@pytest.mark.parametrize(
    "text, params, compute, output",
    [
        ("float32", "float32", "float32", "float32"),
        ("bfloat16", "float32", "bfloat16", "float32"),
        ("float16", "float32", "float16", "float32"),
        ("pure_bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        ("params=bfloat16,compute=bfloat16", "bfloat16", "bfloat16", "float32"),
        ("output=float16, compute=bfloat16", "float32", "bfloat16", "float16"),
    ],
)
def test_strings_and_back(text, params, compute, output):
    policy = precision.parse(text)
    assert policy == precision.Policy(params, compute, output)
    assert precision.parse(str(policy)) == policy


@pytest.mark.parametrize("text", ["float8", "params=", "compute=int8", "params=float32,params=float32", "", "compute"])
def test_wrong_strings_say_what_is_allowed(text):
    with pytest.raises(ValueError, match=r"must be one of float32, bfloat16, (float16|float16, pure_bfloat16)"):
        precision.parse(text)
    with pytest.raises(ValueError, match="must be one of"):
        precision.apply(text, network())
    with pytest.raises(TypeError, match="a network, a function of parameters, or an algorithm"):
        precision.apply("float32", 3)


# Networks and functions


@pytest.mark.parametrize("policy", POLICIES)
def test_a_network_keeps_computes_and_answers_as_told(policy, key):
    p = precision.parse(policy)
    net = network(policy)
    params = net.init(key)
    assert dtypes(params) == {p.params}
    _, outputs = net.unroll(params, (), OBS, FIRST)
    assert dtypes(outputs) == {p.output}
    products = [
        e for e, _ in jaxprs.equations(jaxprs.of(net.unroll, params, (), OBS, FIRST)) if "dot" in str(e.primitive)
    ]
    assert len(products) == 4 and {str(v.aval.dtype) for e in products for v in e.invars} == {p.compute}
    plain = network().unroll(precision.cast(params, "float32"), (), OBS, FIRST)[1]
    np.testing.assert_allclose(outputs.value.astype("float32"), plain.value, atol=0.05)


def test_float32_changes_no_bit(key):
    params = network().init(key)
    plain, same = (net.unroll(params, (), OBS, FIRST) for net in (network(), network("float32")))
    jax.tree.map(np.testing.assert_array_equal, plain, same)


def test_it_nests():
    net = precision.apply("params=bfloat16,compute=float32,output=float16", network("bfloat16"))
    params = net.init(jax.random.key(0))
    assert dtypes(params) == {"bfloat16"}
    assert dtypes(net.unroll(params, (), OBS, FIRST)[1]) == {"float16"}
    eqns = [e for e, _ in jaxprs.equations(jaxprs.of(net.unroll, params, (), OBS, FIRST)) if "dot" in str(e.primitive)]
    assert {str(v.aval.dtype) for e in eqns for v in e.invars} == {"bfloat16"}  # the inner policy computes


@pytest.mark.parametrize("policy", ["bfloat16", "pure_bfloat16"])
def test_it_composes(policy, key):
    """vmap, grad, remat, scan and shards give what a plain call gives."""
    net = network(policy)
    params = net.init(key)

    def loss(params, obs):
        return jnp.sum(net.unroll(params, (), obs, FIRST)[1].value.astype(jnp.float32) ** 2)

    wanted = jax.jit(jax.grad(loss))(params, OBS)
    assert dtypes(wanted) == {precision.parse(policy).params}

    def close(a, b):
        return jax.tree.map(
            lambda x, y: np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=0.03, atol=0.03), a, b
        )

    close(jax.jit(jax.grad(jax.checkpoint(loss)))(params, OBS), wanted)
    many = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    over = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None)))
    close(jax.tree.map(lambda x: x[1], over(many, OBS)), wanted)
    _, scanned = jax.jit(lambda m: jax.lax.scan(lambda c, p: (c, jax.grad(loss)(p, OBS)), 0, m))(many)
    close(jax.tree.map(lambda x: x[1], scanned), wanted)
    mesh = Mesh(np.array(jax.devices()[:2]), ("seeds",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("seeds")
    sharded = jax.shard_map(lambda m: over(m, OBS), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    close(jax.tree.map(lambda x: x[1], jax.jit(sharded)(many)), wanted)


def test_a_function_of_parameters():
    double = precision.apply("params=float32,compute=bfloat16,output=float16", lambda p, x: p["w"] * x)
    out = double({"w": jnp.float32(1 + 2**-10)}, jnp.float32(3.0))
    assert out.dtype == jnp.float16 and out == 3  # the weight was rounded to 1


def test_float16_saturates_instead_of_overflowing():
    big = precision.cast({"x": jnp.array([1e9, -1e9, jnp.nan]), "i": jnp.array([70_000])}, "float16")
    assert big["x"][:2].tolist() == [65504, -65504] and jnp.isnan(big["x"][2]) and big["i"].dtype == jnp.int32


# Parameters that stay float32

ROUTED = moe.Config(4, expert_dim=4, scores="sigmoid")
DECODERS = {  # and what of them published checkpoints keep in float32
    "experts": (
        transformer.Config(dim=8, num_layers=1, num_heads=2, num_kv_heads=1, experts=ROUTED),
        {"router", "bias"},
    ),
    "rwkv": (
        transformer.Config(dim=8, num_layers=1, num_heads=2, num_kv_heads=2, attention="rwkv"),
        {"decay", "bonus"},
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", DECODERS)
def test_no_policy_rounds_what_checkpoints_keep_in_float32(kind, policy, key):
    shape, kept = DECODERS[kind]
    task, p = tasks.make("modular_addition"), precision.parse(policy)
    exact = jax.tree.map(lambda x: x + 5.001, language_model(task, shape, "float32").init(key))
    computed_with = {}
    precision.apply(policy, computed_with.update)(exact)
    layers = computed_with["layers"]
    assert {name for name in layers if layers[name].dtype == jnp.float32} == (
        set(layers) if p.compute == "float32" else kept
    )
    start, given = (language_model(task, shape, x).init(key)["layers"] for x in ("float32", policy))
    for name in kept:
        np.testing.assert_array_equal(layers[name], exact["layers"][name])
        np.testing.assert_array_equal(given[name], start[name])
        assert given[name].dtype == jnp.float32
    assert given["o"].dtype == p.params


def test_layers_of_other_networks_are_rounded_whatever_their_names():
    net = {"bias": jnp.ones(3), "decay": jnp.ones(3), "bonus": {"kernel": jnp.ones(3)}}
    assert dtypes(precision.cast_params(net, "bfloat16")) == {"bfloat16"}


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_sends_a_token_to_other_experts(policy, key):
    config = moe.Config(64, 8, scores="sigmoid")
    keys = jax.random.split(key, 3)
    params = {"router": jax.random.normal(keys[0], (16, 64)), "bias": 5 + 0.01 * jax.random.normal(keys[1], (64,))}
    x = jax.random.randint(keys[2], (256, 16), -4, 5) / 4  # the same in every width
    chosen = precision.apply(policy, lambda params, x: moe.route(params, x, config)[0])
    np.testing.assert_array_equal(chosen(params, x), moe.route(params, x, config)[0])


@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
def test_a_language_model_of_half_width_chooses_and_counts_in_float32(policy, key):
    model = language_model(tasks.make("modular_addition"), DECODERS["experts"][0], policy)
    params = model.init(key)
    bias = jnp.array([[5.0, 5.001, 5.002, 5.003]])  # 5 and 5 in bfloat16
    params["layers"] |= {"router": 0 * params["layers"]["router"], "bias": bias}
    tokens, valid = jnp.ones((1, 300), int), jnp.ones((1, 300), bool)
    _, load = jax.jit(model.hidden_and_load)(params, tokens, valid, valid)
    np.testing.assert_array_equal(load.chosen, [[0, 0, 300, 300]])  # bfloat16 counts to 256
    np.testing.assert_array_equal(load.probability, [[75] * 4])
    np.testing.assert_array_equal(
        model.balance(params, load)["layers"]["bias"], bias + jnp.array([[1e-3, 1e-3, -1e-3, -1e-3]])
    )


@pytest.mark.parametrize("policy", [*POLICIES, "params=bfloat16"])
def test_the_stream_of_a_language_model_has_the_dtype_that_it_computes_in(policy, key):
    model = language_model(tasks.make("modular_addition"), DECODERS["experts"][0], policy)
    tokens, valid = jnp.ones((1, 3), int), jnp.ones((1, 3), bool)
    stream, load = jax.eval_shape(lambda: model.hidden_and_load(model.init(key), tokens, valid, valid))
    assert stream.dtype == precision.parse(policy).compute
    assert (load.chosen.dtype, load.probability.dtype) == (jnp.int32, jnp.float32)


def test_half_width_rounds_no_decay_of_rwkv(key):
    shape = DECODERS["rwkv"][0]
    layer = jax.tree.map(lambda x: x[0], transformer.init(key, shape)["layers"])
    layer["decay"] = jnp.array([[3.0, 3.01, 3.02, 3.03], [4.0, 4.01, 4.02, 4.03]])
    before = Recurrent(jnp.ones((1, 2, 4, 4)), jnp.zeros((1, 8), jnp.bfloat16))
    nothing = jnp.zeros((1, 8), jnp.bfloat16)  # has no key, so that the state only decays
    _, after = MIXERS["rwkv"].step(layer, nothing, before, jnp.int32(1), 0, shape)
    np.testing.assert_allclose(after.state[0, :, :, 0], np.exp(-np.exp(layer["decay"] - 2)), rtol=1e-6)


@pytest.mark.parametrize("how", ["nearest", "stochastic", "kahan", "master"])
def test_no_rounding_undoes_how_a_bias_moves_between_steps(how):
    tx = optim.make(OptimizerConfig("adamw", rounding=how))
    params = {"router": jnp.ones((2, 2)), "bias": jnp.full(2, 5.0), "up": jnp.ones((2, 2), jnp.bfloat16)}
    state = tx.init(params)
    for _ in range(3):
        step = optim.minimize(tx, lambda p: (jnp.sum(p["router"] * p["up"]), None), params, state)
        params, state = step.params, step.opt_state
        params["bias"] = moe.balance(params["bias"], jnp.array([1, 3]))
    np.testing.assert_allclose(params["bias"], [5.003, 4.997], rtol=1e-6)
    assert params["router"].dtype == jnp.float32 and (params["router"] < 1).all()


# Algorithms


def test_an_algorithm_under_a_policy(key):
    algo = precision.apply("pure_bfloat16", make())
    assert algo.config.precision == "pure_bfloat16"
    assert dtypes(algo.init(key).params) == {"bfloat16"}
    assert dtypes(precision.apply("float32", algo).init(key).params) == {"float32"}


@pytest.mark.slow
def test_policies_commute_with_the_transforms_of_an_algorithm(key):
    keys = jax.random.split(key, 2)
    first = precision.apply("bfloat16", over_seeds(make()))
    second = over_seeds(precision.apply("bfloat16", make()))
    states = [jax.jit(lambda k, a=a: a.update(a.init(k))[0].params)(keys) for a in (first, second)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    mesh = Mesh(np.array(jax.devices()[:2]), ("members",), axis_types=(AxisType.Auto,))
    sharded = precision.apply("pure_bfloat16", over_devices(over_seeds(make()), mesh))
    assert dtypes(jax.jit(sharded.update)(jax.jit(sharded.init)(keys))[0].params) == {"bfloat16"}
    grid = precision.apply("pure_bfloat16", over_hypers(make()))
    hypers = jax.tree.map(lambda x: jnp.array([x, x]), ppo.Hyper())
    assert jax.tree.leaves(jax.eval_shape(grid.init, key, hypers).params)[0].dtype == jnp.bfloat16


# Islands

VARIANTS = {
    "clip": {},
    "penalty": {"loss": "penalty", "kl_stop": True},
    "normalized": {"normalize_observations": True, "normalize_rewards": True, "dual_clip": True},
    "gru": {"network": nets.Config(hidden=(8,), gru=4), "standardize_advantages": "batch"},
    "stochastic": {"optimizer": OptimizerConfig("adamw", rounding="stochastic", ema=True, moments="bfloat16")},
    "kahan": {"optimizer": OptimizerConfig("muon", rounding="kahan", accumulate=2)},
    "master": {"optimizer": OptimizerConfig("schedule_free_adamw", rounding="master")},
}


CASES = [
    *(("Probe-mask", policy, variant) for policy in ("bfloat16", "float16", "pure_bfloat16") for variant in VARIANTS),
    *(("Pendulum-v1", "pure_bfloat16", variant) for variant in ("penalty", "normalized", "gru")),
    ("Probe-mask", POLICIES[-1], "clip"),
]


@pytest.mark.thorough(10)
@pytest.mark.parametrize("env, policy, variant", CASES, ids=["-".join(case) for case in CASES])
def test_only_the_network_computes_in_half_width(env, policy, variant, key):
    """Softmax, log-probabilities, ratios, returns, advantages, statistics, losses and optimizer: float32, by the jaxpr."""
    algo = make(env, policy, **VARIANTS[variant])
    state = jax.eval_shape(algo.init, key)
    program = list(jaxprs.equations(jaxprs.of(algo.update, state)))
    half = [(e, scope) for e, scope in program if any(map(jaxprs.is_half, [*e.invars, *e.outvars]))]
    outside = [
        f"{e.primitive} in {scope}"
        for e, scope in half
        if "network" not in scope and str(e.primitive) not in jaxprs.MOVES
    ]
    assert not outside
    inside = {str(e.primitive) for e, scope in half if "network" in scope}
    assert "dot_general" in inside
    assert not inside & {"exp", "log", "log1p", "cumsum", "reduce_prod", "argmax", "erf_inv"}
    kept = [
        state.obs_stats,
        state.reward_stats,
        state.kl_weight,
        state.hyper,
        state.actors.memory if policy == "bfloat16" else (),
    ]
    assert dtypes(kept) <= {"float32"}
    if variant in ("clip", "penalty", "normalized", "gru"):  # no bfloat16 moments were asked for
        assert dtypes(state.opt_state) <= {"float32", "int32"}


# Training


@pytest.mark.slow
def test_float16_scales_its_loss_and_learns(key):
    config = dataclasses.replace(TINY, num_envs=8, num_steps=16, num_epochs=4, precision="float16")
    algo = ppo.make(envs.make("Probe-policy"), config, ppo.Hyper(learning_rate=1e-2))
    train = jax.jit(jax.vmap(run.train_fn(algo, 60 * algo.env_steps_per_update)))
    states, metrics = train(jax.random.split(key, 4))
    assert metrics["episode_return"][:, -10:].mean() > 0.9
    assert states.opt_state.scale.shape == (4,) and (states.opt_state.scale >= 2.0**15).all()


def test_an_overflow_is_skipped_alone_and_is_no_nan(key):
    """A seed whose scale is too large skips its steps and halves it; the one beside it trains."""
    algo = over_seeds(make(policy="float16"))
    state = algo.init(jax.random.split(key, 2))
    scale = jnp.array([2.0**24, 2.0**10])
    state = state._replace(opt_state=state.opt_state._replace(scale=scale))
    grown = state.hyper._replace(value_weight=jnp.array([1e6, 1.0]))
    after, metrics = jax.jit(algo.update)(state._replace(hyper=grown))
    assert (after.opt_state.scale[0] < 2.0**24) and after.opt_state.scale[1] == 2.0**10
    for new, old in zip(jax.tree.leaves(after.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(new[0], old[0])
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a[1] - b[1]).max()), after.params, state.params)
    assert max(jax.tree.leaves(moved)) > 0
    assert all(jnp.isfinite(m).all() for name, m in metrics.items() if not name.startswith("episode"))


def test_numbers_of_half_width_are_refused():
    algo = make()
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), ppo.Hyper())
    with pytest.raises(ValueError, match=r"hyper.optimizer.b1 must be float32; got bfloat16"):
        jax.eval_shape(lambda h: algo.init(jax.random.key(0), h), half)


def test_any_float16_is_scaled(key):
    for policy in ("params=float16", "output=float16", "compute=float16"):
        assert rounding.loss_scale(make(policy=policy).init(key).opt_state) == 2.0**15
    assert rounding.loss_scale(make(policy="bfloat16").init(key).opt_state) == 1


def test_large_integers_do_not_overflow_float16(key):
    net = nets.actor_critic(nets.Config(hidden=(8,)), jax.ShapeDtypeStruct((2,), jnp.int32), Discrete(3))
    net = precision.apply("float16", net)
    obs = jnp.array([[100_000, 1]])
    assert jnp.isfinite(net.step(net.init(key), (), obs, jnp.zeros(1, bool))[1].value).all()


def test_options_scalars_and_modules():
    f = precision.apply("bfloat16", lambda p, x, train=False: p * x if train else x)
    assert f(jnp.ones(2), 2.0, train=True).dtype == jnp.float32
    with pytest.raises(TypeError, match="give its apply"):
        precision.apply("bfloat16", nn.Dense(3))
    with pytest.raises(ValueError, match="precision must be a string"):
        precision.parse(None)
