"""Mixtures of experts: routing by hand, and every token through its experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.nets import moe

SMALL = moe.Config(experts=6, chosen=2, expert_dim=5)
KINDS = {
    "mixtral": SMALL,
    "deepseek": dataclasses.replace(SMALL, scores="sigmoid", shared=2, groups=3, chosen_groups=2, scale=2.5),
}


def start(config, dim=4):
    shapes = {name: shape for name, (shape, _) in moe.shapes(config, dim).items()}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {name: jax.random.normal(k, s) for k, (name, s) in zip(keys, shapes.items(), strict=True)}


def swiglu(x, gate, up, down):
    inner = x @ gate
    return (inner / (1 + np.exp(-inner)) * (x @ up)) @ down


def by_hand(params, x, config):
    p, out = jax.tree.map(np.asarray, params), []
    for token in np.asarray(x):
        logits = token @ p["router"]
        if config.scores == "softmax":
            best = np.argsort(-logits)[: config.chosen]
            weight = np.exp(logits[best]) / np.exp(logits[best]).sum()
        else:
            scores = 1 / (1 + np.exp(-logits))
            biased = (scores + p["bias"]).reshape(config.groups, -1)
            groups = np.argsort(-np.sort(biased, axis=1)[:, -2:].sum(1))[: config.chosen_groups]
            allowed = np.isin(np.arange(config.groups), groups)
            best = np.argsort(-np.where(allowed[:, None], biased, -np.inf).ravel())[: config.chosen]
            weight = config.scale * scores[best] / scores[best].sum()
        y = sum(w * swiglu(token, p["gate"][e], p["up"][e], p["down"][e]) for w, e in zip(weight, best, strict=True))
        if config.shared:
            y = y + swiglu(token, p["shared_gate"], p["shared_up"], p["shared_down"])
        out.append(y)
    return np.stack(out)


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_goes_through_its_experts(kind):
    config = KINDS[kind]
    params, x = start(config), jax.random.normal(jax.random.key(1), (17, 4))
    y, load = jax.jit(lambda p, x: moe.apply(p, x, config))(params, x)
    np.testing.assert_allclose(y, by_hand(params, x, config), rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(load.sum(), 1, rtol=1e-6)
    shaped, _ = moe.apply(params, x[:16].reshape(2, 8, 4), config)
    np.testing.assert_allclose(shaped.reshape(16, 4), y[:16], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_router_and_experts_but_not_the_bias(kind):
    config = KINDS[kind]
    params, x = start(config), jax.random.normal(jax.random.key(1), (9, 4))
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(moe.apply(p, x, config)[0])))(params)
    step = 1e-2
    for name in ("router", "down"):
        direction = jax.random.normal(jax.random.key(3), params[name].shape)
        moved = [
            jnp.sum(jnp.sin(moe.apply(params | {name: params[name] + s * direction}, x, config)[0]))
            for s in (step, -step)
        ]
        np.testing.assert_allclose(
            (moved[0] - moved[1]) / (2 * step), jnp.sum(grads[name] * direction), rtol=0.05, atol=0.05
        )
    if "bias" in grads:
        assert (grads["bias"] == 0).all()


def test_a_vmap_over_tokens_alone_gives_what_leading_axes_give():
    params, x = start(SMALL), jax.random.normal(jax.random.key(1), (3, 2, 7, 4))
    loss = lambda params, x: jnp.sum(jnp.sin(moe.apply(params, x, SMALL)[0]))  # noqa: E731
    mapped = lambda params: jax.vmap(jax.vmap(lambda x: loss(params, x)))(x).sum()  # noqa: E731
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, jax.jit(jax.value_and_grad(mapped))(params), jax.jit(jax.value_and_grad(loss))(params, x))


def test_it_works_under_vmap_over_seeds():
    """Each seed has its own parameters."""
    x = jax.random.normal(jax.random.key(1), (3, 7, 4))
    seeds = jax.tree.map(lambda w: jnp.stack([w, 2 * w, -w]), start(SMALL))
    loss = lambda params, x: jnp.sum(jnp.sin(moe.apply(params, x, SMALL)[0]))  # noqa: E731
    both = jax.jit(jax.value_and_grad(loss))
    one = [both(jax.tree.map(lambda w, i=i: w[i], seeds), x[i]) for i in range(3)]
    together = jax.jit(jax.vmap(both))(seeds, x)
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, jnp.stack(b), rtol=1e-4, atol=1e-5), together, *one)


def test_the_bias_evens_the_load():
    config = dataclasses.replace(SMALL, scores="sigmoid")
    params, x = start(config), jax.random.normal(jax.random.key(1), (512, 4)) + 1.0
    apply = jax.jit(lambda p, x: moe.apply(p, x, config))
    loads = []
    for _ in range(200):
        _, load = apply(params, x)
        params["bias"] = moe.balance(params["bias"], load, 0.02)
        loads.append(float(load.max()))
    assert loads[-1] < 0.25 < loads[0]  # an even share is 1/6


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: moe.Config(experts=2, chosen=3), "moe.chosen must be at most moe.experts = 2; got 3"),
        (lambda: moe.Config(experts=6, groups=4), "moe.groups must divide moe.experts = 6"),
        (lambda: moe.Config(scores="linear"), "moe.scores must be one of softmax, sigmoid"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
