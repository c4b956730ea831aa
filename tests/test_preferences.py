"""Losses of preferences against numbers of other software (see test_token_losses.py), and their gradients by hand."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.equations import preferences as pr
from jrl.equations import token_losses as tl

ORACLE = json.loads((Path(__file__).parent / "data/lm_losses.json").read_text())


def found():
    pairs = [jnp.array(x, float) for x in ([-10.0, -4], [-12.0, -3], [-11, -4.5], [-11.5, -3.5])]
    chosen, rejected = jnp.array([1, -0.5, 2], float), jnp.array([0.5, 0.5, -1], float)
    logits = jnp.array([[[0, 1], [5, 5], [2, -1]], [[0.5, 0.5], [0, 0], [-1, 3]]], float)
    labels = jnp.array([[1, -100, 0], [0, -100, 1]])
    weight = tl.weights(labels != pr.UNLABELLED, "token_mean")
    return {
        "dpo_beta.1": pr.dpo(*pairs, 0.1).mean(),
        "dpo_beta.1_smooth.1": pr.dpo(*pairs, 0.1, 0.1).mean(),
        "ipo_tau.1": pr.ipo(*pairs, 0.1).mean(),
        "bradley_terry": pr.bradley_terry(chosen, rejected).mean(),
        "bradley_terry_margin.5": pr.bradley_terry(chosen, rejected, 0.5).mean(),
        "prm": tl.weighted_sum(weight, pr.process_reward(logits, labels)),
    }


@pytest.mark.parametrize("wide, tolerance", [(False, 1e-6), (True, 1e-9)])
def test_every_oracle(wide, tolerance):
    with jax.enable_x64(wide):
        for name, x in jax.jit(found)().items():
            assert x.dtype == (jnp.float64 if wide else jnp.float32)
            np.testing.assert_allclose(x, ORACLE[name], rtol=tolerance, err_msg=name)


def test_dpo_weighs_pairs_by_how_wrong_the_implicit_reward_is():
    """Its gradient is ``-beta sigmoid(-beta h)`` (2305.18290, section 4), and smoothing makes it vanish where sigmoid is 1 - e."""

    def grad(h, e):
        return jax.grad(lambda c: pr.dpo(c, *jnp.zeros(3), 0.5, e))(jnp.float32(h))

    for h in (-2.0, 0.0, 3.0):
        np.testing.assert_allclose(grad(h, 0.0), -0.5 * jax.nn.sigmoid(-0.5 * h), rtol=1e-6)
    np.testing.assert_allclose(grad(2 * np.log(9.0), 0.1), 0, atol=1e-7)
    assert jnp.isfinite(grad(-1e4, 0.1))


def test_ipo_is_least_at_its_margin():
    grad = jax.grad(lambda c: pr.ipo(c, *jnp.zeros(3), 0.25))
    assert grad(2.0) == 0 and grad(1.0) < 0 < grad(3.0)


def test_only_the_ends_of_steps_have_a_gradient():
    labels = jnp.array([[1, -100, 0]])
    logits = jnp.zeros((1, 3, 2)).at[0, 1].set(jnp.array([jnp.nan, jnp.inf]))
    grad = jax.grad(lambda x: pr.process_reward(x, labels).sum())(logits)
    np.testing.assert_allclose(grad, [[[0.5, -0.5], [0, 0], [-0.5, 0.5]]])


@pytest.mark.parametrize("label", [-1, 2, 0.5])
def test_a_step_is_right_or_wrong(label):
    """PRM800K's -1 among them, whose 0 is neutral."""
    labels, logits = jnp.array([[1, label, -100]]), jnp.ones((1, 3, 2))
    with pytest.raises(ValueError, match=rf"labels must be 1 .right., 0 .wrong. or -100 .*; got {label}"):
        pr.process_reward(logits, labels)
    np.testing.assert_allclose(jax.jit(pr.process_reward)(logits, labels), [[np.log(2), 0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: pr.dpo(x, x, x[:1], x, 0.1), r"dpo: .*chosen \(2,\).*ref_chosen \(1,\)"),
        (lambda x: pr.ipo(x, x[:1], x, x, 0.1), r"ipo: .*rejected \(1,\)"),
        (lambda x: pr.bradley_terry(x, x[:1]), r"bradley_terry: .*chosen \(2,\), rejected \(1,\)"),
        (lambda x: pr.process_reward(x, x), r"logits must be \(2, 2\) for labels \(2,\), got \(2,\)"),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros(2))
