"""Environments: the protocol, gymnax behind it, wrappers, your own, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import envs
from jrl.envs import gymnax as ours
from jrl.envs import probes, wrappers
from jrl.envs.types import Discrete, Environment, example_action, strict

RANK_PROMOTION = "allow"  # gymnax promotes ranks


def play(env, key, actions):
    """Observations, rewards and flags of one episode's first steps, without resets."""

    def step(carry, x):
        action, key = x
        obs, state, reward, terminated, truncated = env.step(key, carry, action)
        return state, (obs, reward, terminated, truncated)

    key, key_reset = jax.random.split(key)
    obs, state = env.reset(key_reset)
    return obs, jax.lax.scan(step, state, (actions, jax.random.split(key, len(actions))))[1]


@pytest.mark.parametrize("name", ours.IDS)
def test_every_gymnax_id_follows_the_protocol(name, key):
    env = envs.make(name)
    actions = jnp.stack([example_action(env.action_space)] * 3)
    first, (obs, reward, terminated, truncated) = jax.jit(lambda k: play(env, k, actions))(key)
    assert obs.shape[1:] == first.shape and obs.dtype == first.dtype == envs.observation_spec(env).dtype
    assert reward.dtype == jnp.float32 and terminated.dtype == truncated.dtype == bool
    assert np.isfinite(np.asarray(obs, float)).all() and np.isfinite(reward).all()
    assert not any(x.weak_type for x in jax.tree.leaves(jax.eval_shape(env.reset, key)))
    assert env.time_limit > 0


@pytest.mark.parametrize("name", ["CartPole-v1", "Breakout-MinAtar", "Pendulum-v1", "Catch-bsuite"])
def test_steps_are_gymnax_s_own(name, key):
    import gymnax

    env, (theirs, params) = envs.make(name), gymnax.make(name)
    obs, state = env.reset(key)
    their_obs, their_state = theirs.reset(key, params)
    np.testing.assert_array_equal(obs, their_obs)
    for i in range(5):
        key_step = jax.random.fold_in(key, i)
        action = theirs.action_space(params).sample(key_step)
        obs, state, reward, terminated, truncated = env.step(jax.random.split(key_step)[0], state, action)
        _, their_state, their_reward, their_terminated, their_truncated, info = theirs.step(
            key_step, their_state, action, params
        )
        np.testing.assert_allclose(obs, info["final_observation"], rtol=1e-6)
        assert (reward, terminated, truncated) == (their_reward, their_terminated, their_truncated)


def test_cartpole_truncates_at_its_limit_and_terminates_by_falling(key):
    env = strict(wrappers.time_limit(envs.make("CartPole-v1"), 5))
    _, (_, _, terminated, truncated) = play(env, key, jnp.zeros(5, jnp.int32))
    assert truncated.tolist() == [False] * 4 + [True] and not terminated.any()
    _, (_, _, terminated, truncated) = play(envs.make("CartPole-v1"), key, jnp.zeros(20, jnp.int32))
    assert terminated.any() and not truncated.any()


def test_minatar_observations_take_a_byte_each():
    assert envs.observation_spec(envs.make("Breakout-MinAtar")).dtype == bool


def test_discrete_observations_come_one_hot(key):
    obs, _ = envs.make("FrozenLake-misc").reset(key)
    assert obs.shape == (16,) and obs.sum() == 1


def test_parameters_of_gymnax():
    assert envs.make("MemoryChain-bsuite", memory_length=3).name == "MemoryChain-bsuite(memory_length=3)"
    with pytest.raises(ValueError, match=r"no parameter 'length'; it has: .*memory_length"):
        envs.make("MemoryChain-bsuite", length=3)


def test_unknown_names_are_refused_with_a_hint():
    with pytest.raises(ValueError, match="did you mean CartPole-v1"):
        envs.make("CartPole")
    with pytest.raises(ValueError, match=r"known: .*Breakout-MinAtar"):
        envs.make("zzzzzz")
    with pytest.raises(ValueError, match="no such environment file"):
        envs.make("missing.py")


def test_sticky_actions_repeat_and_never_on_the_first_step(key):
    def echo_step(key, state, action):
        return action.astype(jnp.float32)[None], state, 0.0, False, False

    echo = Environment("Echo", lambda key: (jnp.zeros(1), jnp.int32(0)), echo_step, Discrete(1000))
    actions = jnp.arange(1, 2001, dtype=jnp.int32) % 1000
    _, (obs, *_) = play(strict(wrappers.sticky_actions(strict(echo), 0.25)), key, actions)
    seen = obs[:, 0].astype(int)
    assert seen[0] == 1
    repeated = np.mean(seen[1:] == seen[:-1])
    assert 0.2 < repeated < 0.3
    assert ((seen == actions) | (seen == np.append(0, seen[:-1]))).all()


def test_frame_stack_and_time_feature(key):
    env = strict(wrappers.frame_stack(envs.make("CartPole-v1"), 3))
    first, (obs, *_) = play(env, key, jnp.zeros(2, jnp.int32))
    assert first.shape == (12,) and (first[:4] == first[8:]).all()
    np.testing.assert_array_equal(obs[1, :4], first[:4])
    np.testing.assert_array_equal(obs[1, 4:8], obs[0, 8:])

    env = strict(wrappers.time_feature(envs.make("Pendulum-v1")))
    first, (obs, *_) = play(env, key, jnp.zeros((2, 1)))
    np.testing.assert_allclose([first[-1], *obs[:, -1]], [0, 1 / 200, 2 / 200])
    with pytest.raises(ValueError, match="has no time limit"):
        wrappers.time_feature(probes.value()._replace(time_limit=None))


OWN = """
import jax, jax.numpy as jnp
from jrl.envs import Discrete
action_space = Discrete(2)
time_limit = 7
def reset(key):
    return jnp.zeros(3), 0
def step(key, state, action):
    t = state + 1
    return jnp.full(3, t, float), t, action, False, t >= time_limit
"""


def test_an_environment_in_a_file(tmp_path, key):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    env = envs.make(str(path))
    assert env.name == "mine" and env.time_limit == 7
    _, (obs, reward, _, truncated) = play(env, key, jnp.ones(7, jnp.int32))
    assert reward.dtype == jnp.float32 and truncated[-1] and obs[-1, 0] == 7


@pytest.mark.parametrize(
    "edit, message",
    [
        (("action_space = Discrete(2)", ""), "must define action_space"),
        (("jnp.full(3, t, float)", "jnp.zeros(4)"), r"observation of shape \(4,\), reset one of shape \(3,\)"),
        (("return jnp.full(3, t, float), t,", "return jnp.full(3, t, float), (t, t),"), "another state structure"),
        (
            ("action, False, t >= time_limit", "action, False"),
            "must return \\(obs, state, reward, terminated, truncated\\)",
        ),
        (("action, False,", "jnp.ones(2), False,"), r"scalar reward, got shape \(2,\)"),
        (("t = state + 1", "t = nonsense"), "step cannot be traced: name 'nonsense'"),
    ],
)
def test_a_broken_environment_is_refused(tmp_path, edit, message):
    path = tmp_path / "mine.py"
    path.write_text(OWN.replace(*edit))
    with pytest.raises(ValueError, match=message):
        envs.make(str(path))


def test_register():
    envs.register("Mine-v0", probes.value)
    assert envs.make("Mine-v0").name == "Probe-value"
    with pytest.raises(ValueError, match="registered already"):
        envs.register("CartPole-v1", probes.value)
