"""Behaviour cloning: what is shown is done, and is a start for PPO."""

import bits
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import envs, nets, run
from jrl.algos import bc, dqn, ppo
from jrl.envs import spaces
from jrl.run import loop

RANK_PROMOTION = "allow"  # gymnax promotes ranks
NETWORK = nets.Config(hidden=(8,))
SMALL = bc.Config(num_gradient_steps=4, batch_size=32, network=NETWORK)
SIGNS = envs.make("Probe-policy")  # 1 for the action that names the sign of the observation


def shown(number=64):
    obs = jax.random.rademacher(jax.random.key(0), (number, 1), jnp.float32)
    return bc.Demonstrations(obs, (obs[:, 0] > 0).astype(jnp.int32))


@pytest.mark.slow
def test_what_was_shown_is_done_and_is_a_start_for_ppo(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHUNK_SECONDS", 0.0)  # one update at a time
    algo = bc.make(SIGNS, shown(), SMALL, bc.Hyper(learning_rate=0.03))
    steps, more = 20 * algo.env_steps_per_update, {"num_seeds": 2, "progress": False}
    with jax.debug_key_reuse(True):
        jax.jit(algo.update)(jax.jit(algo.init)(jax.random.key(0)))
    whole = run.train(algo, jax.random.key(0), steps, **more)
    assert whole.summary["eval"]["per_seed"] == [1.0, 1.0]
    run.train(algo, jax.random.key(0), steps, **more, run_dir=tmp_path / "half", on_chunk=lambda chunk: True)
    resumed = run.train(algo, jax.random.key(0), steps, **more, run_dir=tmp_path / "half", resume=True)
    bits.assert_same(resumed.state, whole.state)
    cloned = run.load(tmp_path / "half", algo=algo).member(1)
    following = ppo.make(SIGNS, ppo.Config(num_envs=2, num_steps=8, network=NETWORK), start=cloned)
    returns = run.evaluate(following, jax.jit(following.init)(jax.random.key(1)), jax.random.key(2), 8).returns
    np.testing.assert_array_equal(returns, 1.0)


def test_the_loss_by_hand():
    """A network whose parameters are all 0 finds both actions alike."""
    algo = bc.make(SIGNS, shown(), SMALL, bc.Hyper(learning_rate=0.0))
    state = jax.jit(algo.init)(jax.random.key(0))
    _, metrics = jax.jit(algo.update)(state._replace(params=jax.tree.map(jnp.zeros_like, state.params)))
    np.testing.assert_allclose([metrics["loss"], metrics["entropy"]], np.log(2), rtol=1e-6)


def test_a_trained_policy_demonstrates():
    greedy = bc.make(SIGNS, shown(), SMALL, bc.Hyper(learning_rate=0.03))
    state = jax.jit(run.train_fn(greedy, 20 * greedy.env_steps_per_update))(jax.random.key(0))[0]
    played = jax.jit(lambda key: bc.demonstrate(greedy, state, key, 10, num_envs=4, greedy=True))(jax.random.key(1))
    assert played.obs.shape == (12, 1)
    np.testing.assert_array_equal(played.action, played.obs[:, 0] > 0)


def test_real_actions_are_shown_in_the_units_of_a_policy():
    space = envs.Box((-2.0, 0.0, -np.inf), (2.0, 1.0, np.inf))
    action = jnp.array([[0.5, -1.0, 3.0], [-0.25, 0.5, -7.0]])
    np.testing.assert_allclose(spaces.from_env(space, spaces.to_env(space, action)), action, rtol=1e-6)
    assert spaces.from_env(envs.Discrete(3), jnp.int32(2)) == 2


def test_what_does_not_fit_is_refused():
    wrong = shown()._replace(action=jnp.zeros((64, 2), jnp.int32))
    for message, make in {
        r"demonstrations must be steps \[N\].*got \(\[1\], \[2\]\)": lambda: bc.make(SIGNS, wrong),
        r"one number of steps, at least 1; got \[63, 64\]": lambda: bc.make(
            SIGNS, shown()._replace(obs=shown().obs[1:])
        ),
        "demonstrations must be": lambda: bc.make(SIGNS, None),
        "has no memory": lambda: bc.make(SIGNS, shown(), bc.Config(network=nets.Config(hidden=(4,), gru=4))),
        "hyper.learning_rate must be": lambda: bc.make(SIGNS, shown(), SMALL, bc.Hyper(learning_rate=-1.0)),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.slow
def test_a_cloned_cart_pole_stands():
    env = envs.make("CartPole-v1")
    teacher = dqn.make(env, dqn.Config(num_envs=8, target_every=0), dqn.Hyper(learning_rate=1e-3, tau=0.02))
    taught = jax.jit(run.train_fn(teacher, 60_000))(jax.random.key(0))[0]
    demonstrations = bc.demonstrate(teacher, taught, jax.random.key(1), 5_000, greedy=True)
    clone = bc.make(env, demonstrations)
    state = jax.jit(run.train_fn(clone, 200 * clone.env_steps_per_update))(jax.random.key(2))[0]
    scores = [run.evaluate(a, s, jax.random.key(3), 16).returns.mean() for a, s in ((teacher, taught), (clone, state))]
    assert scores[1] > 0.8 * scores[0] > 100
