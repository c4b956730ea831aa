"""Optimizers by hand and against optax; their numbers traced; what surrounds a step."""

from dataclasses import replace
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jrl.numerics import optim, parameters, rounding
from jrl.numerics.optim import Hyper, OptimizerConfig

PARAMS = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
GRADS = {"kernel": jnp.array([[0.3, 0.1]]), "bias": jnp.array([-0.2])}
NAMES = get_args(optim.Name)


def step(config, hyper=Hyper(), learning_rate=0.1, max_norm=1e9, steps=1):
    return follow(optim.make(config, hyper, learning_rate, max_norm), steps)[0]


def follow(tx, steps, params=PARAMS, grads=GRADS):
    state = tx.init(params)
    for i in range(steps):
        updates, state = tx.update(jax.tree.map(lambda g, i=i: g * (1 + i), grads), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(a, b, **kwargs):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **({"rtol": 2e-6} | kwargs)), a, b)


# Steps by hand


def test_adam_by_hand():
    # With a constant gradient the bias-corrected moments are g and g^2, so each step is lr * g / (|g| + eps).
    tx = optim.make(OptimizerConfig("adam"), Hyper(eps=1e-8), 0.1)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], [[1 - 0.3, -2 - 0.3]], rtol=1e-5)
    np.testing.assert_allclose(params["bias"], [3 + 0.3], rtol=1e-5)


def test_adamw_decays_weights_and_spares_biases():
    params = step(OptimizerConfig("adamw"), Hyper(weight_decay=0.5, eps=1e-8))
    np.testing.assert_allclose(params["kernel"], [[1 - 0.1 - 0.05, -2 - 0.1 + 0.1]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(params["bias"], [3 + 0.1], rtol=1e-5)


def test_adam_with_l2_is_not_adamw():
    """Adam divides the L2 term by the gradient's size, so that it decays by the step's sign alone (1711.05101, section 2).

    First step at w = 1 and -2, g = 0.3 and 0.1, rate 0.1, decay 0.5: AdamW moves by -0.1 * (sign(g) + 0.5 w), that is to 0.85
    and -2.0; with L2 the gradients are 0.3 + 0.5 and 0.1 - 1.0, whose signs alone matter: 0.9 and -1.9.
    """
    hyper = Hyper(weight_decay=0.5, eps=1e-8)
    decoupled = step(OptimizerConfig("adamw"), hyper)
    coupled = step(OptimizerConfig("adam", l2=True), hyper)
    np.testing.assert_allclose(decoupled["kernel"], [[0.85, -2.0]], rtol=1e-5)
    np.testing.assert_allclose(coupled["kernel"], [[0.9, -1.9]], rtol=1e-5)
    np.testing.assert_allclose(coupled["bias"], decoupled["bias"], rtol=1e-6)  # spared by both
    sgd = step(OptimizerConfig("sgd", l2=True), Hyper(weight_decay=0.5, momentum=0.0))
    np.testing.assert_allclose(sgd["kernel"], [[1 - 0.1 * 0.8, -2 - 0.1 * -0.9]], rtol=1e-5)


def test_sgd_with_momentum_by_hand():
    # Gradients g then 2g: steps lr * g and lr * (0.5 g + 2 g).
    params = step(OptimizerConfig("sgd"), Hyper(momentum=0.5), steps=2)
    np.testing.assert_allclose(params["bias"], [3 + 0.1 * 0.2 * (1 + 2.5)], rtol=1e-6)
    nesterov = step(OptimizerConfig("sgd", nesterov=True), Hyper(momentum=0.5))
    np.testing.assert_allclose(nesterov["bias"], [3 + 0.1 * 0.2 * 1.5], rtol=1e-6)


# Against optax's own aliases

H = Hyper(b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.3, momentum=0.7)
MASK = {"kernel": True, "bias": False}
ALIASES = {
    "sgd": optax.sgd(0.1, 0.7),
    "adam": optax.adam(0.1, 0.8, 0.95, 1e-6),
    "adamw": optax.adamw(0.1, 0.8, 0.95, 1e-6, weight_decay=0.3, mask=MASK),
    "rmsprop": optax.rmsprop(0.1, 0.95, 1e-6, eps_in_sqrt=False, bias_correction=True),
    "lion": optax.lion(0.1, 0.8, 0.95, weight_decay=0.3, mask=MASK),
    "muon": contrib.muon(
        0.1, beta=0.7, eps=1e-6, weight_decay=0.3, nesterov=False, adam_b1=0.8, adam_b2=0.95, consistent_rms=0.2
    ),
    "schedule_free_adamw": contrib.schedule_free(
        optax.chain(
            optax.scale_by_rms(0.95, 1e-6, eps_in_sqrt=False, bias_correction=True),
            optax.add_decayed_weights(0.3, MASK),
            optax.scale_by_learning_rate(0.1),
        ),
        0.1,
        0.8,
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_is_optax_s(name):
    assert_close(step(OptimizerConfig(name, clip="none"), H, steps=5), follow(ALIASES[name], 5)[0])


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_traced_and_swept(name):
    hypers = Hyper(*(jnp.array([x, 0.5 * x]) for x in H))
    rates = jnp.array([0.1, 0.01])
    both = jax.jit(jax.vmap(lambda h, lr: step(OptimizerConfig(name), h, lr, steps=2)))(hypers, rates)
    alone = jax.jit(lambda h, lr: step(OptimizerConfig(name), h, lr, steps=2))
    for i in range(2):
        h = jax.tree.map(lambda x, i=i: x[i], hypers)
        assert_close(jax.tree.map(lambda x, i=i: x[i], both), alone(h, rates[i]), rtol=1e-4, atol=1e-5)


SETTINGS = (
    {"clip": "adaptive"},
    {"clip": "value", "rounding": "stochastic"},
    {"accumulate": 2, "rounding": "kahan"},
    {"schedule": "cosine", "warmup": 0.1, "rounding": "master"},
    {"ema": True, "moments": "bfloat16"},
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("numbers", [float, np.float64, jnp.asarray])
def test_states_and_updates_stay_float32_where_numbers_of_64_bits_are_allowed(name, numbers):
    for fields in SETTINGS[:4] if name == "schedule_free_adamw" else SETTINGS:
        config = OptimizerConfig(name, **fields)
        dtype = "bfloat16" if config.rounding != "nearest" else "float32"
        params = jax.tree.map(lambda p, dtype=dtype: p.astype(dtype), PARAMS)
        with jax.enable_x64(True):
            hyper = Hyper(*map(numbers, H))
            factor = optim.schedule(config, hyper, numbers(0.05), numbers(0.1))
            tx = optim.make(config, hyper, numbers(0.1) * factor, numbers(1.0))
            state = jax.eval_shape(tx.init, params)
            updates, later = jax.eval_shape(tx.update, GRADS, state, params)
        assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"float32"}
        assert "float64" not in {x.dtype.name for x in jax.tree.leaves(state)}
        assert [x.dtype for x in jax.tree.leaves(state)] == [x.dtype for x in jax.tree.leaves(later)]


# Clipping


def test_clip_by_global_norm():
    norm = float(optax.global_norm(GRADS))
    clipped = step(OptimizerConfig("sgd"), Hyper(momentum=0.0), max_norm=norm / 2)
    np.testing.assert_allclose(clipped["kernel"], PARAMS["kernel"] - 0.1 * GRADS["kernel"] / 2, rtol=1e-6)
    free = step(OptimizerConfig("sgd"), Hyper(momentum=0.0), max_norm=norm * 2)
    np.testing.assert_allclose(free["kernel"], PARAMS["kernel"] - 0.1 * GRADS["kernel"], rtol=1e-6)


def test_clip_by_value_and_none():
    by_value = step(OptimizerConfig("sgd", clip="value"), Hyper(momentum=0.0), max_norm=0.15)
    np.testing.assert_allclose(by_value["kernel"], [[1 - 0.015, -2 - 0.01]], rtol=1e-6)
    np.testing.assert_allclose(by_value["bias"], [3 + 0.015], rtol=1e-6)
    free = step(OptimizerConfig("sgd", clip="none"), Hyper(momentum=0.0), max_norm=0.15)
    np.testing.assert_allclose(free["bias"], [3 + 0.02], rtol=1e-6)


def test_adaptive_clip_is_a_share_of_each_unit_s_weights():
    params = {"kernel": jnp.array([[1.0, -2.0], [0.0, 0.0]])}  # columns are units: norms 1 and 2 allow 0.1 and 0.2
    grads = {"kernel": jnp.array([[0.3, 0.1], [0.0, 0.0]])}
    out, _ = follow(
        optim.make(OptimizerConfig("sgd", clip="adaptive"), Hyper(momentum=0.0), 0.1, 0.1), 1, params, grads
    )
    np.testing.assert_allclose(out["kernel"][0], [1 - 0.1 * 0.1, -2 - 0.1 * 0.1], rtol=1e-5)


# Which parameters decay

TREE = {
    "embedding": {"embedding": jnp.ones((5, 2))},
    "LayerNorm_0": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
    "layers": {"norm": jnp.ones((3, 2)), "dense": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}},
    "log_std": jnp.ones(2),
}


@pytest.mark.parametrize(
    "no_decay, decayed",
    [
        (("biases", "norms", "embeddings"), {"kernel"}),
        (("biases", "norms"), {"kernel", "embedding"}),
        (("biases", "embeddings"), {"kernel", "LayerNorm_0", "norm"}),
        (("norms", "embeddings"), {"kernel", "bias", "log_std"}),
        (("weights", "biases", "norms", "embeddings"), set()),
    ],
)
def test_decay_spares_what_it_is_told_to(no_decay, decayed):
    tx = optim.make(OptimizerConfig("adamw", no_decay=no_decay, clip="none"), Hyper(weight_decay=0.5), 0.1)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, TREE), tx.init(TREE), TREE)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        keys = [part.key for part in path]
        is_norm = "LayerNorm_0" in keys or "norm" in keys
        wanted = bool(decayed & {"LayerNorm_0", "norm"}) if is_norm else keys[-1] in decayed
        np.testing.assert_allclose(update, -0.05 if wanted else 0.0, rtol=1e-6, err_msg=str(keys))


def test_names_in_flax_modules_are_known():
    module = nn.Sequential([nn.Embed(4, 8), nn.LayerNorm(), nn.Dense(2)])
    params = module.init(jax.random.key(0), jnp.zeros(1, jnp.int32))
    kinds = parameters.map_with_names(parameters.kind_of, params)["params"]
    assert kinds["layers_0"] == {"embedding": "embeddings"}
    assert kinds["layers_1"] == {"scale": "norms", "bias": "biases"}
    assert kinds["layers_2"] == {"kernel": "weights", "bias": "biases"}


# Around the step


def trained(config, grads):
    """Parameters after each of ``grads [T, ...]``, and those to evaluate in the end, for seeds side by side ``[N, ...]``."""
    tx = optim.make(config, H, 0.1, 1.0)

    def step(carry, grads):
        updates, state = tx.update(grads, carry[1], carry[0])
        params = optax.apply_updates(carry[0], updates)
        return (params, state), params

    def run(grads):
        (params, state), every = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), grads)
        return every, optim.eval_params(state, params)

    return jax.jit(jax.vmap(run))(grads)


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_gradients_are_one_step_on_their_mean(name):
    """Clipped as their mean, and counted as one by the moments and by the average, in a scan of seeds side by side."""

    def drawn(param):
        return jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, *param.shape)), jnp.float32)

    grads = jax.tree.map(drawn, PARAMS)
    means = jax.tree.map(lambda g: g.reshape(2, 2, 3, *g.shape[2:]).mean(2), grads)
    config = OptimizerConfig(name, ema=name != "schedule_free_adamw")
    (parts, evaluated), wholes = trained(replace(config, accumulate=3), grads), trained(config, means)
    assert_close((jax.tree.map(lambda x: x[:, 2::3], parts), evaluated), wholes, rtol=1e-5, atol=1e-6)
    still = (
        jax.tree.map(lambda x: x[:, :2], parts),
        jax.tree.map(lambda p: jnp.broadcast_to(p, (2, 2, *p.shape)), PARAMS),
    )
    assert_close(*still, rtol=0)


def test_a_gradient_that_overflowed_is_not_accumulated():
    """Scaled by 4: gradients 2, infinity and 4 make one step on 3; of a seed without an overflow the third waits for a fourth."""
    tx = optim.make(OptimizerConfig("sgd", clip="none", accumulate=2), Hyper(momentum=0.0), 0.1)
    tx = rounding.dynamic_loss_scaling(tx, initial=4.0)
    params = {"w": jnp.ones(2)}
    state = jax.vmap(tx.init)(params)
    seen = []
    for grads in ([2.0, 2.0], [jnp.inf, 4.0], [4.0, 8.0]):
        scaled = {"w": jnp.array(grads) * state.scale}
        updates, state = jax.vmap(tx.update)(scaled, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params["w"])
    np.testing.assert_allclose(seen, [[1, 1], [1, 0.7], [0.7, 0.7]], rtol=1e-6)


def test_parameter_average_by_hand():
    tx = optim.make(OptimizerConfig("sgd", ema=True), Hyper(momentum=0.0, ema_decay=0.75), 1.0)
    params, state = follow(tx, 2)
    np.testing.assert_allclose(params["bias"], [3.6], rtol=1e-6)  # 3, 3.2, 3.6
    average = 0.75 * (0.75 * 3 + 0.25 * 3.2) + 0.25 * 3.6
    np.testing.assert_allclose(optim.eval_params(state, params)["bias"], [average], rtol=1e-6)
    plain = optim.make(OptimizerConfig("sgd"))
    assert optim.eval_params(plain.init(PARAMS), PARAMS) is PARAMS


def test_an_average_counts_steps_not_accumulated_gradients():
    hyper = Hyper(momentum=0.0, ema_decay=0.5)
    _, state = follow(optim.make(OptimizerConfig("sgd", ema=True, accumulate=2), hyper, 1.0), 2)
    np.testing.assert_allclose(optim.eval_params(state, PARAMS)["bias"], [(3 + 3.3) / 2], rtol=1e-6)


def test_schedule_free_evaluates_its_own_average():
    tx = optim.make(OptimizerConfig("schedule_free_adamw", clip="none"), H, 0.1)
    params, state = follow(tx, 5)
    _, theirs = follow(ALIASES["schedule_free_adamw"], 5)
    assert_close(optim.eval_params(state, params), contrib.schedule_free_eval_params(theirs, params))
    assert not np.allclose(optim.eval_params(state, params)["bias"], params["bias"])


def test_minimize_takes_a_step_and_keeps_what_the_loss_says():
    tx = optim.make(OptimizerConfig("sgd", clip="none"), Hyper(momentum=0.0), 0.1)

    def loss(p):
        return (jnp.sum(p["kernel"] ** 2), {"seen": p["bias"]})

    done = optim.minimize(tx, loss, PARAMS, tx.init(PARAMS))
    np.testing.assert_allclose(done.params["kernel"], 0.8 * PARAMS["kernel"], rtol=1e-6)
    np.testing.assert_allclose(done.grad_norm, 2 * np.sqrt(5), rtol=1e-6)
    assert done.extra["seen"] == 3


# Schedules

PROGRESS = jnp.array([0.0, 0.25, 0.5, 1.0, 2.0])


@pytest.mark.parametrize(
    "config, hyper, wanted",
    [
        (OptimizerConfig(schedule="constant"), Hyper(), [1, 1, 1, 1, 1]),
        (OptimizerConfig(schedule="linear"), Hyper(), [1, 0.75, 0.5, 0, 0]),
        (OptimizerConfig(schedule="linear"), Hyper(final=0.2), [1, 0.8, 0.6, 0.2, 0.2]),
        (OptimizerConfig(schedule="cosine"), Hyper(), [1, 0.5 + 0.5 * 0.5**0.5, 0.5, 0, 0]),
        (OptimizerConfig(schedule="cosine"), Hyper(final=0.5), [1, 0.75 + 0.25 * 0.5**0.5, 0.75, 0.5, 0.5]),
        (OptimizerConfig(schedule="piecewise", drops=(0.25, 0.9)), Hyper(drop=0.5), [1, 0.5, 0.5, 0.25, 0.25]),
        (OptimizerConfig(schedule="constant", warmup=0.5), Hyper(), [0, 0.5, 1, 1, 1]),
        (OptimizerConfig(schedule="linear", warmup=0.25), Hyper(), [0, 1, 2 / 3, 0, 0]),
    ],
)
def test_schedules(config, hyper, wanted):
    np.testing.assert_allclose(jax.vmap(lambda p: optim.schedule(config, hyper, p))(PROGRESS), wanted, atol=1e-6)


# Refusals


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "adagrad"}, "optimizer.name must be one of sgd, adam, adamw, .*; got 'adagrad'"),
        ({"schedule": "step"}, "optimizer.schedule must be one of constant, linear, cosine, piecewise"),
        ({"clip": "global"}, "optimizer.clip must be one of norm, value, adaptive, none"),
        ({"rounding": "up"}, "optimizer.rounding must be one of nearest, stochastic, kahan, master"),
        ({"moments": "float16"}, "optimizer.moments must be one of float32, bfloat16"),
        ({"no_decay": ("bias",)}, "optimizer.no_decay must be one of weights, biases"),
        ({"warmup": 1.5}, "must be between 0 and 1; got 1.5"),
        ({"accumulate": 0}, "optimizer.accumulate must be an integer of at least 1; got 0"),
        ({"name": "adamw", "l2": True}, "adamw decays weights by itself"),
        ({"name": "adam", "nesterov": True}, "optimizer.nesterov is for sgd and muon; got adam"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)


@pytest.mark.parametrize(
    "number, message",
    [
        ({"b2": 1.0}, "hyper.optimizer.b2 must be at least 0 and below 1; got 1"),
        ({"eps": 0.0}, "hyper.optimizer.eps must be above 0; got 0"),
        ({"ema_decay": -0.1}, "hyper.optimizer.ema_decay must be at least 0 and below 1; got -0.1"),
        ({"weight_decay": -1.0}, "hyper.optimizer.weight_decay must be at least 0; got -1"),
        ({"b1": jnp.bfloat16(0.9)}, "hyper.optimizer.b1 must be float32; got bfloat16"),
    ],
)
def test_numbers_that_would_make_nans_are_refused(number, message):
    with pytest.raises(ValueError, match=message):
        optim.check_hyper("hyper.optimizer", Hyper(**number))


def test_numbers_are_checked_where_the_optimizer_is_made():
    for hyper, message in (
        (Hyper(b2=jnp.bfloat16(0.999)), "b2 must be float32"),
        (Hyper(b2=1.0), "b2 must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            optim.make(OptimizerConfig(), hyper)
    with pytest.raises(ValueError, match="clipped to more than 0; got 0"):
        optim.make(max_grad=0.0)
    for rate in (-1e-3, float("nan")):
        with pytest.raises(ValueError, match="learning_rate must be at least 0; got"):
            optim.make(learning_rate=rate)
    with pytest.raises(ValueError, match=r"b1 of schedule_free_adamw must be between 0.1 and 1; got 0"):
        optim.make(OptimizerConfig("schedule_free_adamw"), Hyper(b1=0.0))
    with pytest.raises(ValueError, match=r"at half width needs optimizer\.rounding"):
        optim.make(OptimizerConfig("schedule_free_adamw")).init({"w": jnp.ones(2, jnp.bfloat16)})
    with pytest.raises(ValueError, match=r"no optimizer.ema or moments"):
        OptimizerConfig("schedule_free_adamw", ema=True)


def test_names_that_only_look_like_norms():
    leaf = jnp.ones((2, 2))
    tree = {
        "normal_policy": {"kernel": leaf},
        "RMSNorm_1": {"w": leaf},
        "final_norm": leaf,
        "normalizer": leaf,
        "embed_mlp": {"kernel": leaf},
    }
    kinds = parameters.map_with_names(parameters.kind_of, tree)
    assert kinds["normal_policy"]["kernel"] == kinds["normalizer"] == kinds["embed_mlp"]["kernel"] == "weights"
    assert kinds["RMSNorm_1"]["w"] == kinds["final_norm"] == "norms"
