"""Mixtures of experts: routing by hand, every token through its experts, and a load that learning evens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.algos import grpo, ppo_lm, sft
from jrl.lm import tasks
from jrl.lm.model import decoder
from jrl.lm.sampling import Rollout
from jrl.lm.scoring import score
from jrl.nets import moe, transformer
from jrl.numerics import optim

SMALL = moe.Config(experts=6, chosen=2, expert_dim=5)
KINDS = {
    "mixtral": SMALL,
    "deepseek": dataclasses.replace(SMALL, scores="sigmoid", shared=2, groups=3, chosen_groups=2, scale=2.5),
}


apply = jax.jit(moe.apply, static_argnums=2)  # one program where operations one by one would be dozens


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def start(config, dim=4):
    shapes = {name: shape for name, (shape, _) in moe.shapes(config, dim).items()}
    return {name: normal(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}


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
    params, x = start(config), normal(11, 17, 4)
    y, load = apply(params, x, config)
    np.testing.assert_allclose(y, by_hand(params, x, config), rtol=2e-4, atol=2e-5)
    assert load.chosen.dtype == jnp.int32 and load.chosen.sum() == 17 * config.chosen
    shaped, _ = apply(params, x[:16].reshape(2, 8, 4), config)
    np.testing.assert_allclose(shaped.reshape(16, 4), y[:16], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_router_and_experts_but_not_the_bias(kind):
    config = KINDS[kind]
    params, x = start(config), normal(11, 9, 4)

    @jax.jit
    def total(p):
        return jnp.sum(jnp.sin(moe.apply(p, x, config)[0]))

    grads, step = jax.device_get(jax.jit(jax.grad(total))(params)), 1e-2
    for name in ("router", "down"):
        direction = normal(3, *params[name].shape)
        moved = [total(params | {name: params[name] + np.float32(s) * direction}) for s in (step, -step)]
        np.testing.assert_allclose(
            (moved[0] - moved[1]) / (2 * step), np.sum(grads[name] * direction), rtol=0.05, atol=0.05
        )
    if "bias" in grads:
        assert (grads["bias"] == 0).all()


def test_a_vmap_over_tokens_alone_gives_what_leading_axes_give():
    params, x = start(SMALL), normal(11, 3, 2, 7, 4)

    def loss(params, x):
        return jnp.sum(jnp.sin(moe.apply(params, x, SMALL)[0]))

    def mapped(params):
        return jax.vmap(jax.vmap(lambda x: loss(params, x)))(x).sum()

    def close(a, b):
        return np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    jax.tree.map(close, jax.jit(jax.value_and_grad(mapped))(params), jax.jit(jax.value_and_grad(loss))(params, x))


def test_it_works_under_vmap_over_seeds():
    """Each seed has its own parameters."""
    x = normal(11, 3, 7, 4)
    seeds = jax.tree.map(lambda w: jnp.stack([w, 2 * w, -w]), start(SMALL))

    def loss(params, x):
        return jnp.sum(jnp.sin(moe.apply(params, x, SMALL)[0]))

    both = jax.jit(jax.value_and_grad(loss))
    one = [both(jax.tree.map(lambda w, i=i: w[i], seeds), x[i]) for i in range(3)]
    together = jax.jit(jax.vmap(both))(seeds, x)
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, jnp.stack(b), rtol=1e-4, atol=1e-5), together, *one)


def test_the_bias_evens_the_load():
    config = dataclasses.replace(SMALL, scores="sigmoid")
    params, x = start(config), normal(11, 512, 4) + 1.0
    balance, loads = jax.jit(moe.balance), []
    for _ in range(200):
        _, load = apply(params, x, config)
        params["bias"] = balance(params["bias"], load.chosen, 0.02)
        loads.append(np.max(load.chosen) / np.sum(load.chosen))
    assert loads[-1] < 0.25 < loads[0]  # an even share is 1/6


def test_the_bias_moves_by_the_rate_towards_an_even_load_and_rests_there():
    bias = jnp.array([[5.0, 5.0, 5.0], [0.1, 0.2, 0.3]])
    moved = moe.balance(bias, jnp.array([[1, 2, 3], [7, 7, 7]]), 0.5)
    np.testing.assert_array_equal(moved, [[5.5, 5.0, 4.5], bias[1]])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_do_not_count_are_no_load(kind):
    config = KINDS[kind]
    params, x = start(config), normal(11, 2, 9, 4)
    counted = np.arange(9) >= np.array([[0], [6]])  # a row is padded on its left
    y, load = apply(params, x, config, counted)
    whole, real = apply(params, x, config)[0], apply(params, x[counted], config)[1]
    np.testing.assert_array_equal(y, whole)
    np.testing.assert_array_equal(load.chosen, real.chosen)
    np.testing.assert_allclose(load.probability, real.probability, rtol=1e-5)


def test_the_balance_loss_by_hand():
    two = dataclasses.replace(SMALL, experts=2, chosen=1)
    skew = moe.Load(jnp.array([3, 1]), jnp.array([2.4, 1.6]))  # f = 3/4, 1/4 and P = 0.6, 0.4
    even = moe.Load(jnp.array([2, 2]), jnp.array([2.0, 2.0]))
    assert moe.balance_loss(skew, two) == pytest.approx(2 * (0.75 * 0.6 + 0.25 * 0.4))
    assert moe.balance_loss(even, two) == pytest.approx(1)
    layers = jax.tree.map(lambda *x: jnp.stack(x), skew, even)
    assert moe.balance_loss(layers, two) == pytest.approx((1.1 + 1) / 2)
    assert moe.balance_loss(moe.Load(jnp.full(6, 4), jnp.full(6, 2.0)), SMALL) == pytest.approx(2)  # k
    assert moe.balance_loss(moe.Load(jnp.zeros(6, int), jnp.zeros(6)), SMALL) == 0


def load_balancing_loss_func(logits, k, mask):
    """That of Mixtral in ``transformers``, for one layer."""
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.eye(logits.shape[-1])[np.argsort(-weights, axis=-1)[:, :k]]  # [N, k, E]
    tokens_per_expert = (chosen * mask[:, None, None]).sum(0) / mask.sum()
    router_prob_per_expert = (weights * mask[:, None]).sum(0) / mask.sum()
    return (tokens_per_expert * router_prob_per_expert[None]).sum() * logits.shape[-1]


def test_the_balance_loss_is_that_of_transformers_in_any_number_of_parts():
    params, x = start(SMALL), normal(11, 12, 4)
    mask = np.arange(12) % 5 != 0
    parts = [apply(params, x[i : i + 4], SMALL, mask[i : i + 4])[1] for i in (0, 4, 8)]
    load = jax.tree.map(lambda *part: sum(part), *parts)
    wanted = load_balancing_loss_func(np.asarray(x @ params["router"]), 2, mask)
    np.testing.assert_allclose(moe.balance_loss(load, SMALL), wanted, rtol=1e-5)


def test_the_balance_loss_evens_the_load():
    params, x = start(SMALL), normal(11, 256, 4) + 1.0

    @jax.jit
    def step(router):
        def loss(router):
            load = moe.apply(params | {"router": router}, x, SMALL)[1]
            return moe.balance_loss(load, SMALL), load.chosen

        grad, chosen = jax.grad(loss, has_aux=True)(router)
        return router - 0.3 * grad, chosen

    router, first = step(params["router"])
    for _ in range(60):
        router, chosen = step(router)
    assert chosen.max() < 0.6 * first.max()


# In language models

TASK = tasks.make("modular_addition", modulus=3)
SHAPES = {
    scores: transformer.Config(
        dim=8, num_layers=1, num_heads=2, num_kv_heads=1, experts=dataclasses.replace(SMALL, scores=scores)
    )
    for scores in ("softmax", "sigmoid")
}
SGD = optim.OptimizerConfig("sgd", clip="none")
ALGORITHMS = {
    "sft": lambda task, shape: sft.make(task, sft.Config(shape, batch_size=4, optimizer=SGD)),
    "grpo": lambda task, shape: grpo.make(task, grpo.Config(shape, num_prompts=2, group_size=2, optimizer=SGD)),
    "ppo_lm": lambda task, shape: ppo_lm.make(task, ppo_lm.Config(shape, 4, 1, 1, optimizer=SGD)),
}
MIXTURES = {"sft": 1, "grpo": 1, "ppo_lm": 2}  # the critic has experts of its own


def named(params, name):
    """Parameters of that name, of all networks."""
    return [np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == name]


def padded(task, more, token):
    """The task with prompts that are padded on the left by so many of a token."""

    def draw(key):
        problem = task.draw(key)
        prompt = jnp.concatenate([jnp.full(more, token), problem.prompt])
        return problem._replace(prompt=prompt, valid=jnp.pad(problem.valid, (more, 0)))

    return task._replace(prompt_length=task.prompt_length + more, draw=draw)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_biases_of_all_networks_move_and_not_by_padding(name):
    @jax.jit
    def biases(token):
        algo = ALGORITHMS[name](padded(TASK, 40, token), SHAPES["sigmoid"])
        return algo.update(algo.init(jax.random.key(0)))[0].params

    first, other = (named(biases(token), "bias") for token in (0, 3))
    assert len(first) == MIXTURES[name]
    # An epoch of one minibatch: each bias moved once, by DeepSeek-V3's rate.
    assert all(x.any() and np.isin(np.abs(x), np.float32([0, 1e-3])).all() for x in first)
    jax.tree.map(np.testing.assert_array_equal, first, other)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_balance_loss_teaches_the_routers_of_all_networks(name):
    algo = ALGORITHMS[name](TASK, SHAPES["softmax"])
    assert algo.hyper.balance_weight == 1e-3
    learned = jax.jit(lambda hyper: algo.update(algo.init(jax.random.key(0), hyper))[0].params)
    without, with_it = (named(learned(algo.hyper._replace(balance_weight=x)), "router") for x in (0.0, 1e3))
    assert len(without) == MIXTURES[name]
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(without, with_it, strict=True))


def test_padding_before_prompts_and_behind_answers_is_no_load():
    model = decoder(dataclasses.replace(SHAPES["sigmoid"], vocab_size=7))
    params = model.init(jax.random.key(0))
    prompt, tokens = jax.random.randint(jax.random.key(1), (2, 11), 0, 7)[:, :6], jnp.arange(10).reshape(2, 5) % 7
    valid = np.arange(6) >= np.array([[0], [4]])
    mask = np.arange(5) < np.array([[2], [5]])
    load = jax.jit(
        lambda prompt, tokens: score(model, params, prompt, Rollout(tokens, mask, 0, None), valid=valid).load
    )
    first = load(prompt, tokens)
    # Read are 6 + 2 tokens of the first row and 2 + 4 of the second, whose last token is followed by none. Each chooses 2 experts.
    np.testing.assert_array_equal(first.chosen.sum(-1), 2 * (8 + 6))
    other = load(jnp.where(valid, prompt, 3), jnp.where(mask, tokens, 3))
    np.testing.assert_array_equal(first.chosen, other.chosen)


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
