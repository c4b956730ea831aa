"""Optimizers by hand, and their numbers traced."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrl import optim

PARAMS = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
GRADS = {"kernel": jnp.array([[0.3, 0.1]]), "bias": jnp.array([-0.2])}


def step(config, hyper=optim.Hyper(), learning_rate=0.1, max_norm=1e9, steps=1):
    tx = optim.make(config, hyper, learning_rate, max_norm)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_adam_by_hand():
    # With a constant gradient the bias-corrected moments are g and g^2, so each step is lr * g / (|g| + eps).
    params = step(optim.Config("adam"), optim.Hyper(eps=1e-8), steps=3)
    np.testing.assert_allclose(params["kernel"], [[1 - 0.3, -2 - 0.3]], rtol=1e-5)
    np.testing.assert_allclose(params["bias"], [3 + 0.3], rtol=1e-5)


def test_adamw_decays_weights_and_spares_biases():
    hyper = optim.Hyper(weight_decay=0.5, eps=1e-8)
    params = step(optim.Config("adamw"), hyper)
    np.testing.assert_allclose(params["kernel"], [[1 - 0.1 - 0.05, -2 - 0.1 + 0.1]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(params["bias"], [3 + 0.1], rtol=1e-5)


def test_sgd_with_momentum_by_hand():
    params = step(optim.Config("sgd"), optim.Hyper(momentum=0.5), steps=2)
    np.testing.assert_allclose(params["bias"], [3 + 0.1 * 0.2 * (1 + 1.5)], rtol=1e-6)
    nesterov = step(optim.Config("sgd", nesterov=True), optim.Hyper(momentum=0.5))
    np.testing.assert_allclose(nesterov["bias"], [3 + 0.1 * 0.2 * 1.5], rtol=1e-6)


def test_clip_is_by_global_norm():
    norm = float(optax.global_norm(GRADS))
    clipped = step(optim.Config("sgd"), optim.Hyper(momentum=0.0), max_norm=norm / 2)
    np.testing.assert_allclose(clipped["kernel"], PARAMS["kernel"] - 0.1 * GRADS["kernel"] / 2, rtol=1e-6)
    free = step(optim.Config("sgd"), optim.Hyper(momentum=0.0), max_norm=norm * 2)
    np.testing.assert_allclose(free["kernel"], PARAMS["kernel"] - 0.1 * GRADS["kernel"], rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_numbers_are_traced_and_swept(name):
    hypers = optim.Hyper(*(jnp.array([x, 0.5 * x]) for x in optim.Hyper()))
    rates = jnp.array([0.1, 0.01])
    both = jax.jit(jax.vmap(lambda h, lr: step(optim.Config(name), h, lr, steps=2)))(hypers, rates)
    for i in range(2):
        alone = step(optim.Config(name), jax.tree.map(lambda x, i=i: x[i], hypers), rates[i], steps=2)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-6), both, alone)


def test_schedules():
    progress = jnp.array([0.0, 0.5, 1.0, 2.0])
    np.testing.assert_allclose(optim.schedule("constant", progress), [1, 1, 1, 1])
    np.testing.assert_allclose(optim.schedule("linear", progress), [1, 0.5, 0, 0])
    np.testing.assert_allclose(optim.schedule("cosine", progress), [1, 0.5, 0, 0], atol=1e-7)


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match=r"optimizer.name must be one of adam, adamw, sgd; got 'adagrad'"):
        optim.Config("adagrad")
    with pytest.raises(ValueError, match=r"optimizer.schedule must be one of"):
        optim.Config(schedule="step")
