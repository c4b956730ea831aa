"""Equations on language models' tokens: against numbers of other software, by hand, by enumeration, and identities.

data/lm_losses.json was computed in NumPy, float64, from the papers' formulas, and checked against other trainers' functions.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.equations import losses
from jrl.equations import token_losses as tl

ORACLE = json.loads((Path(__file__).parent / "data/lm_losses.json").read_text())
G = ORACLE["in_G"]


def inputs():
    x = {k: jnp.array(ORACLE[f"in_{k}"], float) for k in ("mask", "old", "new", "ref", "values", "rewards")}
    return SimpleNamespace(**x)


def reduced(x, mask, how, length=None):
    return tl.weighted_sum(tl.weights(mask, how, length), x)


def losses_of(i):
    """Every oracle's loss by name."""
    m, ratio = i.mask, tl.masked(i.new - i.old, i.mask)
    a, centred = tl.zscore(i.rewards, G, 1, 1e-4), tl.centred(i.rewards, G)
    clipped = tl.clip(ratio, a, 0.2, 0.2)
    both = clipped + 0.04 * tl.kl_k3(i.new, i.ref)
    target = i.values + tl.gae(i.values, tl.token_rewards(i.rewards, i.old, i.ref, m, 0.1), m, 1.0, 0.95)
    value = losses.clipped_value_loss(i.values + 0.3, i.values, target, 0.2)
    kls = {f"kl_{k.__name__[3:]}": k(i.new, i.ref) for k in (tl.kl_k1, tl.kl_k2, tl.kl_k3)}
    return {
        "grpo": reduced(clipped, m, "sequence_mean"),
        "grpo_token_mean": reduced(clipped, m, "token_mean"),
        "dapo_clip_.2_.28": reduced(tl.clip(ratio, a, 0.2, 0.28), m, "token_mean"),
        "dr_grpo_L4": reduced(tl.clip(ratio, centred, 0.2, 0.2), m, "constant", 4),
        "dual_clip_c1.1_token_mean": reduced(tl.dual_clip(ratio, a, 0.2, 0.2, 1.1), m, "token_mean"),
        "gspo_eps.05": reduced(tl.gspo(ratio, a, m, 0.05, 0.05), m, "sequence_mean"),
        "cispo_token_mean_lo1_hi.28": reduced(tl.cispo(i.new, ratio, a, 1.0, 0.28), m, "token_mean"),
        "grpo_plus_.04_k3": reduced(both, m, "sequence_mean"),
        "value_clip_.2": reduced(value, m, "token_mean"),
        **{f"{name}_token_mean": reduced(kl, m, "token_mean") for name, kl in kls.items()},
        **{f"{name}_seq_mean": reduced(kl, m, "sequence_mean") for name, kl in kls.items()},
    }


def arrays_of(i):
    reward = tl.token_rewards(i.rewards, i.old, i.ref, i.mask, 0.1)
    gae = tl.gae(i.values, reward, i.mask, 1.0, 0.95)
    return {
        "adv_zscore_ddof1_eps1e-4": tl.zscore(i.rewards, G, 1, 1e-4),
        "adv_zscore_ddof0_eps1e-8": tl.zscore(i.rewards, G, 0, 1e-8),
        "adv_centred": tl.centred(i.rewards, G),
        "adv_rloo": tl.rloo(i.rewards, G),
        "tis_C2_first_row": tl.truncated_importance(i.old, i.old - 0.4 * jnp.arange(4)[None], 2.0)[0],
        "ppo_token_rewards_beta.1_row0": reward[0],
        "gae_row0": gae[0],
        "gae_returns_row0": (gae + i.values)[0],
        "gae_row4": gae[4],
        "gae_whitened_row0": tl.whiten(gae, i.mask)[0],
        "reinforcepp_row0": tl.reinforce_plus_plus(i.rewards, i.old, i.ref, i.mask, 0.1)[0],
        "overlong_Lmax20_Lcache4": tl.overlong_penalty(jnp.array([10, 16, 18, 20, 21]), 20, 4),
        "pass@k_n8_c2_k1_4_8": jnp.stack([tl.pass_at_k(8, jnp.array(2), k) for k in (1, 4, 8)]),
    }


@pytest.mark.parametrize("wide, tolerance", [(False, 1e-6), (True, 1e-9)])
def test_every_oracle(wide, tolerance):
    with jax.enable_x64(wide):
        got = jax.jit(lambda i: losses_of(SimpleNamespace(**i)) | arrays_of(SimpleNamespace(**i)))(vars(inputs()))
        elsewhere = {"dpo_beta.1", "dpo_beta.1_smooth.1", "ipo_tau.1", "bradley_terry", "bradley_terry_margin.5", "prm"}
        assert set(got) == {name for name in ORACLE if not name.startswith("in_")} - elsewhere
        for name, x in got.items():
            assert x.dtype == (jnp.float64 if wide else jnp.float32)
            np.testing.assert_allclose(x, ORACLE[name], rtol=tolerance, atol=tolerance, err_msg=name)


def test_the_clipped_loss_has_its_gradient_in_closed_form():
    with jax.enable_x64(True):
        i = inputs()
        a, m = tl.zscore(i.rewards, G, 1, 1e-4), i.mask

        def loss(new):
            return reduced(tl.clip(tl.masked(new - i.old, m), a, 0.2, 0.28), m, "sequence_mean")

        r, a_ = np.exp(i.new - i.old), np.asarray(a)[:, None]
        live = ~((r > 1.28) & (a_ > 0) | (r < 0.8) & (a_ < 0))
        wanted = -a_ * r * live * m / (m.sum(1, keepdims=True) * len(m))
        np.testing.assert_allclose(jax.grad(loss)(i.new), wanted, atol=1e-14)
        assert 0 < live.sum() < live.size


def test_gspo_has_the_gradient_of_the_sequence_ratio():
    with jax.enable_x64(True):
        i = inputs()
        a, m = tl.centred(i.rewards, G), i.mask

        def plain(new):
            return jnp.exp(jnp.sum(m * (new - i.old), 1) / m.sum(1))

        def paper(new):
            return -jnp.mean(jnp.minimum(plain(new) * a, jnp.clip(plain(new), 0.95, 1.05) * a))

        def ours(new):
            return reduced(tl.gspo(new - i.old, a, m, 0.05, 0.05), m, "sequence_mean")

        for f in (lambda f: f(i.new), lambda f: jax.grad(f)(i.new)):
            np.testing.assert_allclose(f(ours), f(paper), atol=1e-14)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    a, ratio = jnp.array([[2.0, 2.0]]), jnp.log(jnp.array([[1.1, 3.0]]))
    grad = jax.grad(lambda new: tl.cispo(new, ratio, a, 1.0, 0.28).sum())(jnp.zeros((1, 2)))
    np.testing.assert_allclose(grad, [[-2.2, -2.56]], rtol=1e-6)
    np.testing.assert_allclose(tl.policy_gradient(ratio, a[:, 0]), -2 * ratio, rtol=1e-6)


@pytest.mark.parametrize("how", ["sequence_mean", "token_mean", "constant"])
def test_micro_batches_add_up_to_the_whole(how):
    i = inputs()
    a = tl.zscore(i.rewards, G, 1, 1e-4)
    weight = tl.weights(i.mask, how, 4 if how == "constant" else None)

    @jax.jit
    @jax.value_and_grad
    def loss(new, old, mask, a, weight):
        return tl.weighted_sum(weight, tl.clip(tl.masked(new - old, mask), a, 0.2, 0.2))

    rows = i.new, i.old, i.mask, a, weight
    whole = loss(*rows)
    for size in (1, 3):
        pieces = [loss(*(x[k : k + size] for x in rows)) for k in range(0, 6, size)]
        np.testing.assert_allclose(sum(p[0] for p in pieces), whole[0], rtol=1e-5)
        np.testing.assert_allclose(np.concatenate([p[1] for p in pieces]), whole[1], rtol=1e-5, atol=1e-8)


def test_weights_by_hand():
    mask = jnp.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(tl.weights(mask, "sequence_mean"), mask / jnp.array([[6], [3], [1]]))
    np.testing.assert_allclose(tl.weights(mask > 0, "token_mean"), mask / 3)
    np.testing.assert_allclose(tl.weights(mask, "constant", 5), mask / 15)


def test_a_sequence_ratio_counts_tokens_without_advantage():
    ratio, mask = jnp.array([[0.1, 0.3]]), jnp.ones((1, 2), bool)
    loss = tl.gspo(ratio, jnp.array([[0.0, 1.0]]), mask, 0.9, 0.9)
    np.testing.assert_allclose(loss, [[0.0, -np.exp(0.2)]], rtol=1e-6)


def test_padding_changes_nothing_and_masked_positions_may_hold_anything():
    names = "old", "new", "ref", "values"

    @jax.jit
    def all_of(i, mask, rewards):
        clean = SimpleNamespace(mask=mask, rewards=rewards, **{k: tl.masked(i[k], mask) for k in names})
        return losses_of(clean) | {"gae": tl.gae(i["values"], i["old"], mask, 0.9, 0.8)[0, -4:]}

    @jax.jit
    @jax.grad
    def grad(new, old, ref, mask, rewards):
        ratio, a, new = tl.masked(new - old, mask), tl.rloo(rewards, G), tl.masked(new, mask)
        policy = tl.clip(ratio, a, 0.2, 0.2) + tl.gspo(ratio, a, mask, 0.1, 0.1) + tl.cispo(new, ratio, a, 1, 0.2)
        return reduced(policy + tl.kl_k3(new, tl.masked(ref, mask)), mask, "token_mean")

    with jax.enable_x64(True):
        i = inputs()

        def pad(x, junk):
            return jnp.concatenate([jnp.full((6, 3), junk), jnp.where(i.mask > 0, x, junk)], 1)

        mask = pad(i.mask, 0.0)
        wanted = all_of({k: getattr(i, k) for k in names}, i.mask, i.rewards)
        for junk in (jnp.nan, jnp.inf, -jnp.inf):
            dirty = {k: pad(getattr(i, k), junk) for k in names}
            for name, x in all_of(dirty, mask, i.rewards).items():
                np.testing.assert_allclose(x, wanted[name], atol=1e-13, err_msg=name)
            g = grad(dirty["new"], dirty["old"], dirty["ref"], mask, i.rewards)
            assert jnp.isfinite(g).all() and (g[mask == 0] == 0).all() and (g[mask > 0] != 0).any()


def test_rows_without_tokens_give_0():
    i = inputs()

    @jax.jit
    def all_of(mask):
        def f(new):
            found = losses_of(SimpleNamespace(**(vars(i) | {"mask": mask, "new": tl.masked(new, mask)})))
            whitened = tl.reinforce_plus_plus(i.rewards, i.old, i.ref, mask, 0.1)
            return jnp.stack([found[k] for k in sorted(found)]), whitened

        return *f(i.new), jax.jacrev(f)(i.new)[0]

    with jax.debug_nans(True):
        for mask in (i.mask.at[2].set(0), jnp.zeros_like(i.mask)):
            values, advantage, grads = all_of(mask)
            assert (grads[:, 2] == 0).all() and (mask.any() or (values == 0).all())
            assert (advantage[2] == 0).all() and jnp.isfinite(advantage).all()
    twice = jnp.concatenate([i.new, i.new])  # rows without tokens divide as others do
    half, whole = (reduced(twice, jnp.concatenate([i.mask, m]), "sequence_mean") for m in (0 * i.mask, i.mask))
    np.testing.assert_allclose(2 * half, whole, rtol=1e-6)


@pytest.mark.parametrize("reward", [0.1, 1e6 / 3])
def test_a_group_without_variance_gives_exactly_nothing(reward):
    rewards = jnp.full(7, reward).at[0].set(2 * reward + 1)[jnp.array([1, 2, 3, 0, 4, 5])]
    new, mask = 100 * jax.random.normal(jax.random.key(0), (6, 4)), jnp.ones((6, 4))  # ratios beyond float32
    for advantage in (
        tl.zscore(rewards, 3, 1, 0.0),
        tl.zscore(rewards, 3, 0, 1e-8),
        tl.centred(rewards, 3),
        tl.rloo(rewards, 3),
    ):
        assert (advantage[:3] == 0).all() and (advantage[3:] != 0).all()

        def loss(new, a=advantage):
            gspo, cispo = tl.gspo(new, a, mask, 0.2, 0.2), tl.cispo(new, new, a, 1.0, 0.2)
            return reduced(
                tl.clip(new, a, 0.2, 0.2) + tl.dual_clip(new, a, 0.2, 0.2, 3.0) + gspo + cispo, mask, "token_mean"
            )

        assert (jax.jit(jax.grad(loss))(new)[:3] == 0).all()
    assert (tl.whiten(jnp.full((2, 3), reward), jnp.ones((2, 3)), 0.0) == 0).all()


@pytest.mark.parametrize("advantage", [lambda *x: tl.zscore(*x[:2], 1, 1e-4, *x[2:]), tl.centred, tl.rloo])
def test_what_does_not_count_leaves_the_group_of_the_others(advantage):
    reward = jnp.array([1.0, 99, 4, 2, 5, 99, 99, 99, 99, 99, 99, 99])  # three count, then one, then none
    counts = reward < 99
    found = advantage(reward, 4, counts)
    np.testing.assert_allclose(found[jnp.array([0, 2, 3])], advantage(reward[jnp.array([0, 2, 3])], 3), rtol=1e-6)
    assert (found[jnp.array([1, *range(4, 12)])] == 0).all()
    np.testing.assert_array_equal(advantage(reward, 4, counts | True), advantage(reward, 4))
    assert tl.varied(reward, 4, counts).tolist() == [True, False, False]


def test_what_a_clip_cuts_off_has_no_gradient_however_large_the_ratio():
    grad = jax.grad(lambda x, a: tl.dual_clip(x, a, 0.2, 0.2, 3.0).sum())
    for a in (1.0, -1.0):
        assert (grad(jnp.full((1, 2), 500.0), jnp.array([a])) == 0).all()


def test_gae_skips_masked_tokens():
    value, reward = jnp.array([[1.0, 9, 2, 3]]), jnp.array([[0.5, 9, 0.25, 1]])
    gap = jnp.array([[1, 0, 1, 1]])
    short = tl.gae(*(x[:, jnp.array([0, 2, 3])] for x in (value, reward, gap)), 0.9, 0.8)
    np.testing.assert_allclose(tl.gae(value, reward, gap, 0.9, 0.8)[0, jnp.array([0, 2, 3])], short[0], rtol=1e-6)
    np.testing.assert_allclose(short[0, 1:], [0.25 + 0.9 * 3 - 2 + 0.72 * (1 - 3), 1 - 3], rtol=1e-6)


def test_losses_are_mapped_over_traced_settings():
    i = inputs()
    a, ratio = tl.centred(i.rewards, G), i.new - i.old
    got = jax.jit(jax.vmap(lambda low, high: tl.clip(ratio, a, low, high)))(
        jnp.array([0.1, 0.2]), jnp.array([0.3, 0.2])
    )
    np.testing.assert_allclose(got[0], tl.clip(ratio, a, 0.1, 0.3), rtol=1e-6)

    def gae(lambda_):
        return tl.gae(i.values, i.old, i.mask, 1.0, lambda_)

    np.testing.assert_allclose(jax.vmap(gae)(jnp.array([0.5, 0.9]))[1], gae(0.9), rtol=1e-6)


# KL, by enumeration


def test_gradients_of_kl_estimates():
    with jax.enable_x64(True):
        logits, ref = jax.random.normal(jax.random.key(0), (2, 5), float)
        log_q = jax.nn.log_softmax(ref)
        p = jax.lax.stop_gradient(jax.nn.softmax(logits))  # the sampler: in a loss its probabilities are constants

        def expected(f):
            return jax.grad(lambda x: jnp.sum(p * f(jax.nn.log_softmax(x))))(logits)

        forward = jax.grad(lambda x: tl.kl_exact(x, ref))(logits)
        backward = jax.grad(lambda x: tl.kl_exact(ref, x))(logits)

        def close(got, wanted):
            return np.testing.assert_allclose(got, wanted, atol=1e-12)

        close(expected(lambda x: tl.kl_k1(x, log_q)), 0)
        close(expected(lambda x: tl.kl_k2(x, log_q)), forward)
        close(expected(lambda x: tl.kl_k3(x, log_q)), backward)
        close(expected(lambda x: jnp.exp(x - jax.lax.stop_gradient(x)) * tl.kl_k3(x, log_q)), forward)

        def in_reward(x):
            return tl.policy_gradient(x, -tl.kl_k1(x, log_q))

        close(expected(in_reward), forward)
        assert jnp.abs(forward - backward).max() > 0.01
        log_p = jax.nn.log_softmax(logits)
        for unbiased in (tl.kl_k1, tl.kl_k3):
            close(jnp.sum(p * unbiased(log_p, log_q)), tl.kl_exact(logits, ref))
        assert jnp.abs(jnp.sum(p * tl.kl_k2(log_p, log_q)) - tl.kl_exact(logits, ref)) > 0.01


def test_exact_kl_where_a_token_is_forbidden():
    logits, ref = jnp.array([1.0, 0.0, -jnp.inf]), jnp.array([0.0, 0.0, -jnp.inf])
    value, grad = jax.value_and_grad(tl.kl_exact)(logits, ref)
    short = jax.value_and_grad(tl.kl_exact)(logits[:2], ref[:2])
    np.testing.assert_allclose(value, short[0], rtol=1e-6)
    np.testing.assert_allclose(grad, [*short[1], 0], rtol=1e-5)
    assert tl.kl_exact(logits.astype(jnp.bfloat16), ref.astype(jnp.bfloat16)).dtype == jnp.float32


# Scores


def test_pass_at_k_is_exact():
    for n, c, k in [(8, 2, 4), (200, 1, 1), (2000, 3, 1000), (10, 10, 3), (5, 0, 5), (5, 1, 5)]:
        exact = 1 - math.comb(n - c, k) / math.comb(n, k)
        np.testing.assert_allclose(tl.pass_at_k(n, jnp.array([c]), k), [exact], rtol=1e-5)
    np.testing.assert_allclose(tl.pass_at_k(10**6, jnp.array(1), 1), 1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda i: tl.zscore(i.rewards, 4, 1, 0.0), r"zscore: reward must be \[prompts \* 4\], got \(6,\)"),
        (lambda i: tl.zscore(i.rewards, 1, 1, 0.0), "zscore: group_size must be an integer of at least 2; got 1"),
        (lambda i: tl.rloo(i.rewards, 1), "rloo: group_size must be an integer of at least 2"),
        (lambda i: tl.centred(i.mask, 3), r"centred: reward must be \[prompts \* 3\], got \(6, 4\)"),
        (lambda i: tl.clip(i.new, i.rewards[:4], 0.2, 0.2), r"clip: advantage must be \(6, 4\) or.*\(6,\); got \(4,\)"),
        (
            lambda i: tl.gspo(i.new, i.rewards, i.mask[:, :2], 0.2, 0.2),
            r"sequence_log_ratio: .*log_ratio \(6, 4\), mask \(6, 2\)",
        ),
        (lambda i: tl.weights(i.mask, "mean"), "how must be one of sequence_mean, token_mean, constant; got 'mean'"),
        (lambda i: tl.weights(i.mask, "constant"), "how='constant' takes a length"),
        (lambda i: tl.weights(i.mask, "token_mean", 4), "got how='token_mean', length=4"),
        (lambda i: tl.weights(i.rewards, "token_mean"), r"mask must be \[N, T\], got \(6,\)"),
        (lambda i: tl.weighted_sum(i.mask, i.rewards), r"weighted_sum: .*weight \(6, 4\), x \(6,\)"),
        (lambda i: tl.masked(i.rewards, i.mask), r"masked: x \(6,\) must begin with the shape of the mask, \(6, 4\)"),
        (lambda i: tl.token_rewards(i.mask, i.old, i.ref, i.mask, 0.1), r"token_rewards: .*score \(6, 4\)"),
        (lambda i: tl.kl_k3(i.new, i.rewards), r"kl_k1: .*log_prob \(6, 4\), ref_log_prob \(6,\)"),
        (lambda i: tl.overlong_penalty(i.rewards, 3, 4), "longest must be an integer of at least 4; got 3"),
        (lambda i: tl.pass_at_k(3, i.rewards, 4), "n must be at least 4; got 3"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(inputs())
