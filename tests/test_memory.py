"""A memory of attention: its steps are its unrolled sequence, and nothing leaks over the start of an episode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import envs, nets, run
from jrl.algos import ppo, pqn
from jrl.nets.memory import AttentionConfig
from jrl.numerics.optim import OptimizerConfig

RANK_PROMOTION = "allow"  # gymnax promotes ranks

DENSE = AttentionConfig("dense", context=6, num_layers=2, num_heads=2, num_kv_heads=1)
SPARSE = AttentionConfig(
    "nsa", context=24, num_layers=2, num_heads=2, num_kv_heads=1, block=4, select_block=4, selected=4, window=3
)
KINDS = {"dense": DENSE, "window": dataclasses.replace(DENSE, window=3), "nsa": SPARSE}


def network(attention, **kwargs):
    config = nets.Config(hidden=(8,), attention=attention, shared=True, **kwargs)
    return compiled(nets.actor_critic(config, jax.ShapeDtypeStruct((3,), jnp.float32), envs.Discrete(2)))


def sequence(length, batch=2, starts=((0, 0), (13, 0), (17, 1), (18, 1), (40, 1)), seed=1):
    obs = np.random.default_rng(seed).standard_normal((length, batch, 3)).astype(np.float32)
    first = np.zeros((length, batch), bool)
    for t, b in starts:
        if t < length:
            first[t, b] = True
    return obs, first


def compiled(net):
    """The network with its functions compiled as a whole, where operations one by one would be dozens of programs."""
    return net._replace(**{name: jax.jit(getattr(net, name)) for name in ("init", "step", "unroll", "memory_at")})


def stepped(net, params, memory, obs, first):
    def step(memory, x):
        memory, out = net.step(params, memory, *x)
        return memory, out

    return jax.device_get(jax.jit(lambda *a: jax.lax.scan(step, *a))(memory, (obs, first)))


def empty(net, batch=2):
    return jax.tree.map(lambda x: np.broadcast_to(x, (batch, *x.shape)), net.memory)


def close(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_unrolled_sequences_give_the_same(kind, key):
    net = network(KINDS[kind])
    params, (obs, first) = net.init(key), sequence(60)
    obs[40:, 1] = obs[13:33, 0]
    memory, wanted = stepped(net, params, empty(net), obs, first)
    line, out = jax.device_get(net.unroll(params, empty(net), obs, first))
    close(out, wanted)
    # An episode gives the same wherever in the rollout it begins.
    close(jax.tree.map(lambda x: x[40:, 1], out), jax.tree.map(lambda x: x[13:33, 0], out))
    # Cut anywhere, the memory carries on; and the memory after any step is the one of then.
    half, _ = stepped(net, params, empty(net), obs[:23], first[:23])
    close(net.unroll(params, half, obs[23:], first[23:])[1], jax.tree.map(lambda x: x[23:], wanted))
    rows = np.arange(2)
    kept = net.memory_at(line, np.full(2, 22), rows)

    def next_out(memory):
        return net.step(params, memory, obs[23], first[23])[1]

    close(next_out(kept), next_out(half))
    close(
        net.step(params, net.memory_at(line, np.full(2, 59), rows), obs[0], first[5])[1],
        net.step(params, memory, obs[0], first[5])[1],
    )


@pytest.mark.thorough(1)
@pytest.mark.parametrize("kind", KINDS)
def test_an_episode_sees_nothing_of_the_one_before(kind, key):
    net = network(KINDS[kind])
    params, (obs, first) = net.init(key), sequence(30, 1, ((0, 0), (11, 0)))

    def value(obs):
        return net.unroll(params, empty(net, 1), obs, first)[1]

    changed = np.where(np.arange(30)[:, None, None] < 11, obs + 3, obs)
    whole, other = jax.device_get((value(obs), value(changed)))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[11:], y[11:]), whole, other)
    assert (whole.value[:11] != other.value[:11]).any()
    gradient = jax.grad(lambda obs: value(obs).value[11:].sum())(obs)
    assert (gradient[:11] == 0).all() and (gradient[11:] != 0).any()
    fresh = net.unroll(params, empty(net, 1), obs[11:], first[11:])[1]
    close(fresh, jax.tree.map(lambda x: x[11:], whole))


def test_what_is_beyond_the_context_is_out_of_sight(key):
    net = network(dataclasses.replace(DENSE, num_layers=1))
    params, (obs, first) = net.init(key), sequence(12, 1, ((0, 0),))
    gradient = jax.jit(jax.grad(lambda obs: net.unroll(params, empty(net, 1), obs, first)[1].value[11].sum()))(obs)
    assert (gradient[:5] == 0).all() and (gradient[5:] != 0).any(axis=-1).all()


@pytest.mark.slow
def test_memory_carries_no_gradient_and_half_width_runs(key):
    algo = ppo.make(
        envs.make("Probe-memory"),
        ppo.Config(
            num_envs=4,
            num_steps=8,
            num_minibatches=2,
            network=nets.Config(hidden=(8,), attention=DENSE),
            precision="bfloat16",
        ),
    )
    begin = jax.jit(algo.init)(key)
    state, metrics = jax.jit(algo.update)(begin)
    assert jnp.isfinite(metrics["loss"]) and begin.actors.memory[0].k.dtype == state.actors.memory[0].k.dtype


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "nsa"])
def test_ppo_remembers_with_attention(kind):
    config = ppo.Config(
        num_envs=8,
        num_steps=16,
        num_minibatches=2,
        network=nets.Config(hidden=(16,), attention=KINDS[kind], shared=True),
        optimizer=OptimizerConfig("adam", "constant"),
    )
    algo = ppo.make(envs.make("Probe-memory"), config, ppo.Hyper(learning_rate=3e-3, entropy_weight=0.0))
    states, metrics = jax.jit(jax.vmap(run.train_fn(algo, 150 * 128)))(jax.random.split(jax.random.key(0), 3))
    scores = jax.vmap(lambda s: run.evaluate(algo, s, jax.random.key(1), 32).returns.mean())(states)
    assert np.median(scores) > 0.9
    # What acted is what is trained: with the parameters that acted, ratios are 1.
    assert (metrics["approximate_kl"] >= 0).all()


@pytest.mark.slow
def test_truncated_episodes_are_valued_with_their_memory():
    """Reward 1 a step, truncated at 20, never terminated: V = 1 / (1 - gamma) = 10."""

    def step(key, t, action):
        return (jnp.ones(1), t + 1, 1.0, False, t + 1 >= 20)

    env = envs.strict(envs.Environment("Forever", lambda key: (jnp.ones(1), jnp.int32(0)), step, envs.Discrete(2), 20))
    config = pqn.Config(
        num_envs=8,
        num_steps=16,
        num_minibatches=2,
        network=nets.ValueConfig(hidden=(16,), attention=DENSE),
        optimizer=OptimizerConfig("adam", "constant"),
    )
    algo = pqn.make(env, config, pqn.Hyper(learning_rate=3e-3, gamma=0.9))
    _, metrics = jax.jit(jax.vmap(run.train_fn(algo, 200 * 128)))(jax.random.split(jax.random.key(0), 2))
    np.testing.assert_allclose(metrics["q"][:, -10:].mean(1), 10, atol=0.7)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AttentionConfig("sparse"), "network.attention.kind must be one of none, dense, nsa; got 'sparse'"),
        (
            lambda: AttentionConfig("dense", context=0),
            "network.attention.context must be an integer of at least 1; got 0",
        ),
        (lambda: nets.Config(gru=8, attention=DENSE), "network.attention needs network.gru = network.lstm = 0"),
        (lambda: nets.Config(hidden=(9,), attention=DENSE), "transformer.dim must be a multiple of num_heads = 2"),
        (lambda: AttentionConfig("nsa", selected=2), "nsa.selected must be at least"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
