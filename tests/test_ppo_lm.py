"""PPO on a language model: it learns from verified rewards, and from any other reward that is given."""

import jax
import numpy as np
import pytest

from jrl import run
from jrl.algos import ppo_lm
from jrl.lm import tasks
from jrl.nets import transformer
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
    with pytest.raises(ValueError, match=r"config.num_minibatches must divide num_answers = 64; got 5"):
        ppo_lm.make(TASK, ppo_lm.Config(model=SHAPE, num_answers=64, num_minibatches=5))
    with pytest.raises(ValueError, match=r"hyper.gamma must be between 0 and 1; got 2"):
        ppo_lm.make(TASK, CONFIG, ppo_lm.Hyper(gamma=2.0))
