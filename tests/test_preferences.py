"""Losses of preferences against numbers of other software (see test_token_losses.py), and their gradients by hand."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.equations import preferences as pr
from jrl.equations import token_losses as tl

PAIRS = json.loads((Path(__file__).parent / "data/preferences.json").read_text())  # made by TRL 0.24.0
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


def of_pairs(case, chosen, rejected, ref_chosen, ref_rejected):
    """Losses of the pairs of a case, by log-probabilities of their answers; of KTO and its kin first the chosen, then the rejected ones."""
    p, inputs = case["params"], PAIRS["inputs"]
    beta, smoothing, kind = p["beta"], p.get("label_smoothing", 0.0), p.get("loss_type", "orpo")
    if p.get("reference_free") or case["name"].startswith("cpo"):
        ref_chosen = ref_rejected = jnp.zeros_like(chosen)
    all_four = chosen, rejected, ref_chosen, ref_rejected
    match kind:
        case "sigmoid":
            return pr.dpo(*all_four, beta, smoothing)
        case "robust" | "exo_pair":
            return {"robust": pr.robust_dpo, "exo_pair": pr.exo}[kind](*all_four, beta, smoothing)
        case "ipo" | "hinge" | "apo_zero" | "sppo_hard" | "nca_pair":
            found = {"ipo": pr.ipo, "hinge": pr.hinge, "apo_zero": pr.apo, "sppo_hard": pr.sppo, "nca_pair": pr.nca}
            return found[kind](*all_four, beta)
        case "kto":
            apart = [jnp.array(inputs[p[f"{name}_KL_logps"]], chosen.dtype) for name in ("policy", "ref")]
            liked, disliked = pr.kto(*all_four, beta, (apart[0] - apart[1]).mean())
            return jnp.concatenate([p["desirable_weight"] * liked, p["undesirable_weight"] * disliked])
        case "orpo":
            return beta * pr.orpo(chosen, rejected)
        case "simpo":
            return pr.simpo(chosen, rejected, beta, p["simpo_gamma"], smoothing)
    raise NotImplementedError(kind)


COVERED = [case for case in PAIRS["pairs"] if case["params"].get("loss_type") not in ("apo_down", "apo_zero_unpaired")]


@pytest.mark.parametrize("wide", [False, True])
def test_losses_of_pairs_and_their_gradients_are_those_of_other_software(wide):
    with jax.enable_x64(wide):
        for case in COVERED:

            def log_prob(model, answer, case=case):
                mask = jnp.array(PAIRS["inputs"][f"{answer}_mask"], bool)
                total = jnp.where(mask, jnp.array(PAIRS["inputs"][f"{model}_{answer}_token_logps"], float), 0).sum(-1)
                return total / mask.sum(-1) if case["seq_logps"] == "mean" else total

            mine, theirs = ([log_prob(model, x) for x in ("chosen", "rejected")] for model in ("policy", "ref"))
            each = of_pairs(case, *mine, *theirs)
            wanted = -np.array(case["losses"]) if "orpo" in case["name"] else np.array(case["losses"])
            close = {"rtol": 1e-9 if wide else 1e-5, "atol": 0 if wide else 1e-6, "err_msg": case["name"]}
            assert each.dtype == (jnp.float64 if wide else jnp.float32)
            np.testing.assert_allclose(each, wanted, **close)
            slopes = jax.grad(lambda c, r, case=case, ref=theirs: of_pairs(case, c, r, *ref).mean(), argnums=(0, 1))(
                *mine
            )
            for name, slope in zip(("chosen", "rejected"), slopes, strict=True):
                np.testing.assert_allclose(
                    slope, case[f"grad_{name}_logps"], **(close | {"rtol": 1e-8 if wide else 1e-4})
                )


@pytest.mark.parametrize("wide", [False, True])
def test_losses_of_reward_models_are_those_of_other_software(wide):
    with jax.enable_x64(wide):
        inputs = PAIRS["inputs"]
        chosen, rejected, margin = (
            jnp.array(inputs[f"rm_{x}"], float) for x in ("chosen_rewards", "rejected_rewards", "margin")
        )
        for case in PAIRS["reward_model"]:

            def loss(chosen, rejected, p=case["params"], margin=margin):
                each = pr.bradley_terry(chosen, rejected, margin if p["margin"] else 0.0)
                centred = (p["center_rewards_coefficient"] or 0.0) * jnp.square(chosen + rejected)
                return (each + centred).mean()

            value, slopes = jax.value_and_grad(loss, argnums=(0, 1))(chosen, rejected)
            rtol = 1e-9 if wide else 1e-5
            np.testing.assert_allclose(value, case["loss"], rtol=rtol)
            for name, slope in zip(("chosen", "rejected"), slopes, strict=True):
                np.testing.assert_allclose(slope, case[f"grad_{name}_rewards"], rtol=rtol * 10, atol=1e-9)


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
