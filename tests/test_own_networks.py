"""Networks of a user's own in place of those that settings describe."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import envs, nets, run
from jrl.algos import dqn, ppo, pqn, r2d2
from jrl.envs.types import observation_spec

RANK_PROMOTION = "allow"  # gymnax promotes ranks
ENV = envs.make("CartPole-v1")
SPEC, SPACE = observation_spec(ENV), ENV.action_space
POLICY = nets.actor_critic(nets.Config(hidden=(8,)), SPEC, SPACE)
VALUES = nets.action_values(nets.ValueConfig(hidden=(8,), norm="none"), SPEC, SPACE)
RECURRENT = nets.action_values(nets.ValueConfig(hidden=(8,), norm="none", gru=4), SPEC, SPACE)


def program(algo):
    """The whole update, as text."""
    return str(jax.make_jaxpr(algo.update)(jax.eval_shape(algo.init, jax.random.key(0))))


@pytest.mark.thorough(3)
@pytest.mark.parametrize(
    "algo, config, network",
    [
        (ppo, ppo.Config(network=nets.Config(hidden=(8,))), POLICY),
        (dqn, dqn.Config(network=nets.ValueConfig(hidden=(8,), norm="none")), VALUES),
        (pqn, pqn.Config(network=nets.ValueConfig(hidden=(8,), norm="none")), VALUES),
        (r2d2, r2d2.Config(network=nets.ValueConfig(hidden=(8,), norm="none", gru=4)), RECURRENT),
    ],
    ids=["ppo", "dqn", "pqn", "r2d2"],
)
def test_the_network_that_settings_describe_gives_the_same_program_as_one_s_own(algo, config, network):
    described, own = algo.make(ENV, config), algo.make(ENV, config, network=network)
    assert program(own) == program(described)
    assert program(own.remake(config)) == program(own), "what remakes it keeps the network"


class Module(nn.Module):
    """A network of flax, of a dictionary of observations."""

    @nn.compact
    def __call__(self, obs):
        x = nn.tanh(nn.Dense(16)(jnp.concatenate([obs["place"], obs["speed"]], axis=-1)))
        return nets.Outputs(nn.Dense(2)(x), nn.Dense(1)(x)[..., 0])


@pytest.mark.slow
def test_a_module_of_flax_learns_from_a_dictionary_of_observations():
    def shown(obs):
        return {"place": obs[..., :2], "speed": obs[..., 2:]}

    def reset(key):
        obs, state = ENV.reset(key)
        return shown(obs), state

    def step(key, state, action):
        obs, *more = ENV.step(key, state, action)
        return shown(obs), *more

    env = ENV._replace(reset=reset, step=step)
    example = {"place": jnp.zeros((1, 2)), "speed": jnp.zeros((1, 2))}
    network = nets.feed_forward(lambda key: Module().init(key, example), Module().apply)
    config, hyper = ppo.Config(num_envs=8, num_steps=32), ppo.Hyper(learning_rate=3e-3)
    algo = ppo.make(env, config, hyper, network=network)
    with pytest.raises(ValueError, match="needs observations of one array"):
        ppo.make(env, dataclasses.replace(config, normalize_observations=True), network=network)
    result = run.train(algo, jax.random.key(0), 20_000, num_seeds=2, eval_episodes=0, progress=False)
    returns = result.metrics["episode_return"]
    assert np.nanmean(returns[:, -10:]) > 2 * np.nanmean(returns[:, :5])


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: ppo.make(ENV, network=VALUES),
            r"the network must return Outputs\(policy=float\[2\], value=float\[\]\) for one observation; got float\[2\]",
        ),
        (
            lambda: dqn.make(ENV, network=POLICY),
            r"the network must return float\[2\] for one observation; got Outputs",
        ),
        (
            lambda: dqn.make(ENV, dqn.Config(distribution="quantile", atoms=5), network=VALUES),
            r"must return float\[2, 5\] for one observation; got float\[2\]",
        ),
        (lambda: ppo.make(envs.make("Acrobot-v1"), network=POLICY), "network cannot be traced"),
        (lambda: ppo.make(ENV, network=Module()), "network must be a jrl.nets.types.Network; got"),
        (lambda: dqn.make(ENV, network=RECURRENT), "DQN replays single transitions"),
        (lambda: r2d2.make(ENV, network=VALUES), "without a memory this is DQN"),
        (
            lambda: dqn.make(ENV, dqn.Config(network=nets.ValueConfig(noisy=True)), network=VALUES),
            "config.network.noisy has no effect on a network of your own",
        ),
        (
            lambda: pqn.make(ENV, pqn.Config(num_envs=3, num_minibatches=2), network=RECURRENT),
            "config.num_minibatches must divide num_envs = 3; got 2",
        ),
    ],
)
def test_a_network_that_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
