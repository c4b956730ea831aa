"""PPO on a language model: it learns from verified rewards, and from any other reward that is given."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import run
from jrl.algos import ppo_lm
from jrl.equations import losses, token_losses
from jrl.lm import tasks
from jrl.lm.sampling import Rollout
from jrl.nets import adapters, transformer
from jrl.numerics import optim

TASK = tasks.make("modular_addition", modulus=3)
SHAPE = transformer.Config(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=16)
CONFIG = ppo_lm.Config(model=SHAPE, num_answers=64, optimizer=optim.OptimizerConfig("adam"))


@pytest.mark.slow
def test_it_learns_what_is_rewarded():
    hyper = ppo_lm.Hyper(learning_rate=0.01, close_weight=1.0, kl_weight=0.0)
    short = ppo_lm.make(TASK, CONFIG, hyper, reward=lambda a: (a.rollout.tokens[:, 0] == 2).astype(float))
    with jax.debug_key_reuse(True):
        result = run.train(
            short, jax.random.key(0), 30 * short.env_steps_per_update, num_seeds=2, eval_episodes=0, progress=False
        )
    reward = np.asarray(result.metrics["reward"])
    assert (reward[:, -5:].mean(1) > 0.9).all() and (reward[:, 0] < 0.5).all()
    assert np.isfinite(np.asarray(result.metrics["value_loss"])).all()


@pytest.mark.slow
def test_a_kl_in_the_reward_holds_the_policy_back():
    free, held = (
        ppo_lm.make(TASK, CONFIG, ppo_lm.Hyper(learning_rate=0.01, format_weight=1.0, kl_weight=beta))
        for beta in (0.0, 5.0)
    )
    kl = [
        run.train(a, jax.random.key(0), 20 * a.env_steps_per_update, eval_episodes=0, progress=False).metrics["kl"]
        for a in (free, held)
    ]
    assert abs(kl[1][0, -1]) < 0.1 < kl[0][0, -1]


def test_wrong_settings_are_one_clear_line():
    with pytest.raises(
        ValueError, match=r"config.num_minibatches \* micro_batches must divide num_answers = 64; got 5 and 1"
    ):
        ppo_lm.make(TASK, ppo_lm.Config(model=SHAPE, num_answers=64, num_minibatches=5))
    with pytest.raises(ValueError, match=r"hyper.gamma must be between 0 and 1; got 2"):
        ppo_lm.make(TASK, CONFIG, ppo_lm.Hyper(gamma=2.0))


# Against TRL 0.24.0 (tests/data/ppo_lm.json), whose answers have the score, and a value, one place behind their last token: the mask that
# rewards and values have here reaches to that place.

GOLDEN = json.loads((Path(__file__).parent / "data" / "ppo_lm.json").read_text())
INPUTS = {name: np.array(x) for name, x in GOLDEN["inputs"].items()}
SAID, VALUED = (~INPUTS[name].astype(bool) for name in ("padding_mask", "padding_mask_p1"))


@pytest.mark.thorough(2)
@pytest.mark.parametrize("case", GOLDEN["gae_cases"], ids=lambda case: case["name"])
def test_the_arithmetic_of_tokens_is_that_of_trl(case):
    wanted, more = {k: np.array(x) for k, x in case.items() if k not in ("name", "params", "update")}, case["params"]
    with jax.enable_x64(True):
        log_prob, ref = (jnp.where(SAID, INPUTS[name], 1.0) for name in ("logprobs", "ref_logprobs"))
        value, new_value = (jnp.where(VALUED, INPUTS[name], 0.0) for name in ("values", "new_values"))
        rewards = token_losses.token_rewards(INPUTS["scores"], log_prob, ref, jnp.asarray(VALUED), more["kl_coef"])
        if more["kl_estimator"] == "k3":
            kl = token_losses.kl_k3(log_prob, ref)
            rewards = rewards + more["kl_coef"] * (log_prob - ref) - more["kl_coef"] * kl
        if more["whiten_rewards"]:
            rewards = token_losses.whiten(rewards, jnp.asarray(VALUED), keep_mean=True)
        np.testing.assert_allclose(rewards, wanted["rewards"], rtol=1e-9, atol=1e-12)
        advantage = token_losses.gae(value, rewards, jnp.asarray(VALUED), more["gamma"], more["lam"])
        np.testing.assert_allclose(advantage, wanted["advantages_raw"], rtol=2e-6, atol=1e-6)
        white = token_losses.whiten(advantage, jnp.asarray(SAID))
        np.testing.assert_allclose(white, wanted["advantages_whitened"], rtol=2e-6, atol=1e-6)
        update, target = case["update"], advantage + value

        def losses_of(new, new_value):
            log_ratio = jnp.where(SAID, new - log_prob, 0.0)
            policy = jnp.sum(token_losses.clip(log_ratio, white, 0.2, 0.2), where=SAID) / SAID.sum()
            each = losses.clipped_value_loss(new_value, value, target, 0.2)
            critic = jnp.sum(each, where=VALUED) / VALUED.sum()
            return policy + 0.1 * critic, (policy, critic)

        new = jnp.where(SAID, INPUTS["new_logprobs"], 1.0)
        (_, found), slopes = jax.value_and_grad(losses_of, (0, 1), has_aux=True)(new, new_value)
        np.testing.assert_allclose(found, [update["pg_loss"], update["vf_loss"]], rtol=2e-6)
        for slope, name in zip(slopes, ("grad_new_logprobs", "grad_new_values"), strict=True):
            np.testing.assert_allclose(slope, update[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", GOLDEN["whiten_cases"], ids=lambda case: f"{case['name']}-{case['shift_mean']}")
def test_whitening_is_that_of_trl(case):
    mask = jnp.asarray(np.array(case["mask"]) > 0)
    with jax.enable_x64(True):
        found = token_losses.whiten(jnp.asarray(INPUTS["whiten_values"]), mask, keep_mean=not case["shift_mean"])
        np.testing.assert_allclose(found, np.where(mask, case["out"], 0), rtol=1e-9, atol=1e-12)


def test_beta_follows_the_kl_and_unended_answers_lose():
    hyper = jax.tree.map(jnp.float32, ppo_lm.Hyper(kl_target=2.0, kl_gain=0.5))
    state = ppo_lm.State({}, {}, (), jnp.float32(0.1), None, None, None, hyper)
    found = [float(ppo_lm.adapted_weight(state, jnp.float32(kl))) for kl in (2.0, 2.2, 100.0, 0.0)]
    np.testing.assert_allclose(found, [0.1, 0.105, 0.11, 0.09], rtol=1e-5)
    fixed = state._replace(hyper=hyper._replace(kl_target=jnp.float32(0)))
    np.testing.assert_allclose(ppo_lm.adapted_weight(fixed, jnp.float32(9.0)), 0.1, rtol=1e-6)
    tokens, mask = jnp.array([[3, 1, 0], [3, 3, 3], [3, 3, 3]]), jnp.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    said = Rollout(tokens, mask, jnp.zeros((3, 3)), None)
    np.testing.assert_array_equal(ppo_lm.unended(said, jnp.array([1])), [0, 1, 0])
    cut = said._replace(mask=mask.at[1, 2].set(False))  # by a stop string
    np.testing.assert_array_equal(ppo_lm.unended(cut, jnp.array([1])), [0, 0, 0])


@pytest.mark.slow
def test_micro_batches_and_adapters_of_actor_and_critic():
    def updated(**more):
        algo = ppo_lm.make(TASK, replace(CONFIG, num_epochs=1, **more), ppo_lm.Hyper(learning_rate=0.01))
        return jax.jit(algo.update)(jax.jit(algo.init)(jax.random.key(0)))

    (one, metrics), (two, again) = updated(), updated(micro_batches=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one.params, two.params)
    np.testing.assert_allclose(metrics["policy_loss"], again["policy_loss"], atol=1e-5)
    beside, _ = updated(adapter=adapters.Config("lora", rank=2))
    assert set(beside.params["actor"]) == set(beside.params["critic"]["body"]) >= {"layers/q"}
    assert set(beside.frozen) == {"actor", "critic"} and set(one.frozen) == {"actor"}
