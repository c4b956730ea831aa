"""The comparison of estimators: its exact numbers against enumeration of whole groups, sampling, and what theory says."""

import csv
import importlib.util
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.equations import token_losses as tl


def load():
    spec = importlib.util.spec_from_file_location("estimators", Path(__file__).parents[1] / "experiments/estimators.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["estimators"] = module
    spec.loader.exec_module(module)
    return module


es = load()
ARGS = es.Args(vocabulary=3, length=3, step=0.5)


def measured(name, policy, group_size):
    """The truth and the exact estimate."""
    task, policies = es.setting(ARGS)
    both = jax.jit(lambda *p: (es.true_gradient(p[0], task), es.exact(es.METHODS[name], *p, task, group_size)))
    return both(*policies[policy])


def test_answers_are_enumerated_once():
    task = es.make_task(3, 3)
    assert len(task.tokens) == 1 + 2 + 4 * 3  # by length; the last token may be anything
    assert len({tuple(x) for x in task.tokens.tolist()}) == len(task.tokens)
    assert task.mask.sum(1)[:2].tolist() == [1, 2] and task.kinds == 5
    with jax.enable_x64(True):
        task, policies = es.setting(ARGS)
        np.testing.assert_allclose(es.probability(policies["off"][0], task).sum(), 1, rtol=1e-12)


@pytest.mark.parametrize("name, factor", [("reinforce", 1), ("rloo", 1), ("dr_grpo", 3 / 4)])
def test_what_is_unbiased(name, factor):
    with jax.enable_x64(True):
        truth, estimate = measured(name, "on", 4)
        np.testing.assert_allclose(estimate.mean, factor * truth, atol=1e-12)


@pytest.mark.parametrize("name", ["grpo", "dapo", "reinforce++"])
def test_what_is_biased(name):
    with jax.enable_x64(True):
        truth, estimate = measured(name, "on", 2)
        assert es.compare(truth, estimate)["cosine"] < 0.999


@pytest.mark.parametrize("name", ["grpo", "gspo", "reinforce++"])
def test_mean_and_variance_are_those_of_all_pairs(name):
    """Every pair of answers, its loss differentiated as a whole."""
    with jax.enable_x64(True):
        task, policies = es.setting(ARGS)
        params, sampler = policies["off"]
        method, chance = es.METHODS[name], es.probability(sampler, task)
        pairs = jnp.array(list(itertools.product(range(len(chance)), repeat=2)))

        def loss(params, rows):
            group = task._replace(tokens=task.tokens[rows], mask=task.mask[rows])
            new = es.log_prob(params, group)
            advantage = method.advantage(task.reward[rows], group.mask)
            x = method.loss(new, new - es.log_prob(sampler, group), advantage, group.mask)
            return -tl.weighted_sum(method.weights(group.mask), x)

        gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, pairs).reshape(len(pairs), -1)
        weight = chance[pairs].prod(1)
        mean = weight @ gradients
        variance = weight @ jnp.sum(gradients**2, 1) - jnp.sum(mean**2)
        _, estimate = measured(name, "off", 2)
        np.testing.assert_allclose(estimate.mean.ravel(), mean, atol=1e-12)
        np.testing.assert_allclose(estimate.variance, variance, rtol=1e-9)


@pytest.mark.parametrize("name, policy", [("grpo", "on"), ("cispo", "off"), ("dr_grpo", "off")])
def test_sampling_agrees(name, policy):
    with jax.enable_x64(True):
        task, policies = es.setting(ARGS)
        _, estimate = measured(name, policy, 4)
        draw = jax.jit(lambda key, *p: es.sample(key, es.METHODS[name], *p, task, 4, 4000))
        mean, error = draw(jax.random.key(3), *policies[policy])
        assert (jnp.abs(mean - estimate.mean) <= 4.5 * error + 1e-15).all()
        np.testing.assert_allclose(4000 * jnp.sum(error**2), estimate.variance, rtol=0.1)


def test_graded_rewards_are_exact_too():
    """One more than two values: a kind's advantage may have either sign, by its group."""
    with jax.enable_x64(True):
        _, policies = es.setting(ARGS)
        task = es.make_task(3, 3, lambda tokens: (tokens == 1).sum(1) / 2.0)
        truth = es.true_gradient(policies["on"][0], task)
        found = jax.jit(lambda *p: es.exact(es.METHODS["rloo"], *p, task, 3))(*policies["on"])
        np.testing.assert_allclose(found.mean, truth, atol=1e-12)


@pytest.mark.slow
def test_it_leaves_a_table_and_a_picture(tmp_path, capsys):
    words = "--vocabulary 3 --length 2 --group-sizes 2 3 --samples 64 --methods rloo grpo --run-dir"
    es.main([*words.split(), str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "estimators.csv").open()))
    assert [(r["policy"], r["group"], r["method"]) for r in rows] == [
        (policy, group, name) for policy in ("on", "off") for group in ("2", "3") for name in ("rloo", "grpo")
    ]
    assert float(rows[0]["bias"]) < 1e-6 and float(rows[0]["cosine"]) == 1
    assert (tmp_path / "estimators.png").stat().st_size > 10_000 and "| rloo |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        ("--methods ppo", "methods must be one of reinforce, rloo"),
        ("--methods", "methods must name at least one"),
        ("--vocabulary 11 --length 6", "vocabulary \\*\\* length must be at most 1,000,000; got 1,771,561"),
        ("--group-sizes 1", "group_sizes must be an integer of at least 2; got 1"),
        ("--group-sizes 64", "group_sizes: 64 answers of 7 kinds make"),
    ],
)
def test_wrong_words_say_what_is_allowed(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        es.main([*words.split(), "--run-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())
