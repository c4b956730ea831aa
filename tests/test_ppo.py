"""PPO: what it learns, what it must not confuse, and how it composes."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrl import envs, nets, run
from jrl.algorithm import check, over_devices, over_hypers, over_seeds, with_evaluation
from jrl.algos import dqn, ppo, pqn, r2d2, td
from jrl.experience import rollout
from jrl.numerics import optim

RANK_PROMOTION = "allow"  # gymnax promotes ranks

SMALL = nets.Config(hidden=(16,))
FAST = ppo.Config(
    num_envs=8, num_steps=16, num_minibatches=2, network=SMALL, optimizer=optim.OptimizerConfig(schedule="constant")
)
HYPER = ppo.Hyper(learning_rate=1e-2)
TINY = ppo.Config(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=2, network=nets.Config(hidden=(8,)))


def with_(config, **fields):
    return dataclasses.replace(config, **fields)


@functools.cache
def trained(name, config=FAST, hyper=HYPER, updates=100, seeds=4):
    """Final states ``[seeds]`` and the algorithm."""
    algo = ppo.make(envs.make(name), config, hyper)
    train = jax.jit(jax.vmap(run.train_fn(algo, updates * algo.env_steps_per_update)))
    states, _ = train(jax.random.split(jax.random.key(0), seeds))
    return algo, states


def values(algo, states, obs):
    network = nets.actor_critic(algo.config.network, envs.observation_spec(algo.env), algo.env.action_space)

    def value(s):
        return network.step(s.params, (), jnp.asarray(obs, jnp.float32), jnp.ones(len(obs), bool))[1].value

    return np.asarray(jax.vmap(value)(states))


def score(algo, states, greedy=True):
    returns = jax.vmap(lambda s: run.evaluate(algo, s, jax.random.key(1), 64, greedy).returns)(states)
    return np.asarray(returns.mean(1))


# Probes: each fails for one fault


def test_probe_value():
    algo, states = trained("Probe-value")
    np.testing.assert_allclose(values(algo, states, [[0.0]]), 1, atol=0.05)


@pytest.mark.slow
def test_probe_value_from_observation():
    algo, states = trained("Probe-observation")
    np.testing.assert_allclose(values(algo, states, [[-1.0], [1.0]]), [[-1, 1]] * 4, atol=0.1)


def test_probe_discount():
    algo, states = trained("Probe-discount", hyper=HYPER._replace(gamma=0.5))
    np.testing.assert_allclose(values(algo, states, [[0.0], [1.0]]), [[0.5, 1]] * 4, atol=0.05)


@pytest.mark.thorough(2)
@pytest.mark.parametrize(
    "name, best", [("Probe-action", 1), ("Probe-policy", 1), ("Probe-mask", 1), ("Probe-multi", 2), ("Probe-credit", 1)]
)
def test_probe_policies(name, best):
    np.testing.assert_allclose(score(*trained(name)), best, atol=0.05)


@pytest.mark.slow
def test_probe_memory_needs_memory():
    assert np.abs(score(*trained("Probe-memory"))).max() < 0.4
    config = with_(FAST, network=nets.Config(hidden=(16,), gru=16))
    np.testing.assert_allclose(
        score(*trained("Probe-memory", config, HYPER._replace(learning_rate=3e-3), 300)), 1, atol=0.05
    )


@pytest.mark.thorough(1)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("gru", [0, 8])
def test_truncation_is_not_termination(shared, gru):
    """Reward 1 a step, never terminated, truncated at 20, gamma 0.99: V = 100, where a merged ``done`` gives about 9.9."""
    network = nets.Config(hidden=(8,), shared=shared, gru=gru)
    config = with_(FAST, network=network, value_clip=False, normalize_rewards=False, num_steps=32)
    # 100 is far from an initial 0, so that the last layer must be able to grow fast.
    algo, states = trained("Probe-truncation", config, ppo.Hyper(learning_rate=3e-2, max_grad_norm=1e9), 800, 2)
    network = nets.actor_critic(network, envs.observation_spec(algo.env), algo.env.action_space)
    memory = jax.vmap(lambda s: jax.tree.map(lambda m: m[:1], s.actors.memory))(states)
    one, first = jnp.ones((1, 1)), jnp.zeros(1, bool)
    value = jax.vmap(lambda s, m: network.step(s.params, m, one, first)[1].value[0])(states, memory)
    np.testing.assert_allclose(value, 100, atol=8)


# Variants of the loss


@pytest.mark.thorough(2)
@pytest.mark.parametrize(
    "fields",
    [
        {"loss": "penalty"},
        {"dual_clip": True},
        {"kl_stop": True},
        {"value_clip": False},
        {"standardize_advantages": "batch"},
        {"standardize_advantages": "none"},
        {"normalize_observations": True, "normalize_rewards": True},
        {"precision": "bfloat16"},
        {"precision": "params=bfloat16,compute=bfloat16"},
        {"precision": "pure_bfloat16", "optimizer": optim.OptimizerConfig(rounding="stochastic", moments="bfloat16")},
        {"optimizer": optim.OptimizerConfig("adamw", "cosine", warmup=0.1, accumulate=2)},
        {"optimizer": optim.OptimizerConfig("schedule_free_adamw", "constant")},
        {"optimizer": optim.OptimizerConfig("rmsprop", "piecewise", clip="value", ema=True)},
        {"network": nets.Config(hidden=(16,), shared=True, activation="relu")},
    ],
    ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items())[:40],
)
def test_every_variant_learns(fields):
    np.testing.assert_allclose(score(*trained("Probe-policy", with_(FAST, **fields), updates=60)), 1, atol=0.1)


@pytest.mark.slow
def test_sgd_learns():
    config = with_(FAST, optimizer=optim.OptimizerConfig("sgd", "constant"))
    np.testing.assert_allclose(score(*trained("Probe-policy", config, ppo.Hyper(learning_rate=0.1))), 1, atol=0.1)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("continuous", ["normal", "tanh_normal"])
def test_continuous_actions(continuous, key):
    def reset(key):
        goal = jax.random.uniform(key, (1,), minval=-2, maxval=2)
        return goal, goal

    def step(key, goal, action):
        return goal, goal, -jnp.abs(action[0] - goal[0]), True, False

    env = envs.strict(envs.Environment("Reach", reset, step, envs.Box((-3.0,), (3.0,)), 1))
    algo = ppo.make(env, with_(FAST, continuous=continuous), HYPER._replace(entropy_weight=0.0))
    state, _ = jax.jit(run.train_fn(algo, 200 * algo.env_steps_per_update))(key)
    assert run.evaluate(algo, state, key, 64).returns.mean() > -0.15
    actions, _ = jax.vmap(lambda k: algo.act(state, jnp.array([9.0]), k))(jax.random.split(key, 100))
    assert actions.shape == (100, 1) and (jnp.abs(actions) <= 3).all()


@pytest.mark.slow
def test_kl_stop_masks_the_rest_of_the_update(key):
    config = with_(TINY, num_epochs=4, kl_stop=True)
    env = envs.make("Probe-policy")

    def taken(kl):
        return ppo.make(env, config, ppo.Hyper(learning_rate=0.1, target_kl=kl))

    loose, tight = taken(1e9), taken(1e-6)
    after, metrics = jax.jit(loose.update)(loose.init(key))
    assert metrics["minibatches"] == 8
    stopped, metrics = jax.jit(tight.update)(tight.init(key))
    assert 1 <= metrics["minibatches"] < 8
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(stopped.params), strict=True)
    )
    # What was skipped left no trace: the optimizer counted only the steps that were taken.
    count = optax.tree_utils.tree_get(stopped.opt_state, "count")
    assert count == metrics["minibatches"]


def test_penalty_weight_follows_the_kl(key):
    env = envs.make("Probe-policy")
    for target, factor in ((1e9, 0.5), (1e-9, 2.0)):
        algo = ppo.make(env, with_(TINY, loss="penalty"), ppo.Hyper(learning_rate=0.05, target_kl=target))
        state, metrics = jax.jit(algo.update)(algo.init(key))
        assert state.kl_weight == factor and metrics["kl_weight"] == 1 and metrics["kl"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("gru", [8, 0])
def test_the_first_ratio_is_one(gru, key):
    """With one minibatch and one epoch the policy that learns is the one that acted, normalizers included."""
    network = nets.Config(hidden=(8,), gru=gru)
    config = with_(TINY, num_minibatches=1, network=network, normalize_observations=True, normalize_rewards=True)
    algo = ppo.make(envs.make("CartPole-v1"), config)
    state, update = jax.jit(algo.init)(key), jax.jit(algo.update)
    for _ in range(4):
        state, metrics = update(state)
        assert abs(metrics["approximate_kl"]) < 1e-9 and metrics["clip_fraction"] == 0


@pytest.mark.thorough(1)
@pytest.mark.parametrize("gru", [0, 4])
@pytest.mark.parametrize("limit", [3, 100])
def test_advantages_use_the_value_before_each_reset(gru, limit, key, monkeypatch):
    """The few values that PPO computes again equal those of every observation before its reset, computed one by one."""
    env = envs.strict(envs.wrappers.time_limit(envs.make("Pendulum-v1"), limit))
    config = with_(TINY, network=nets.Config(hidden=(8,), gru=gru), num_minibatches=1, standardize_advantages="none")
    algo = ppo.make(env, config)
    network = nets.actor_critic(config.network, envs.observation_spec(env), env.action_space)
    state, seen, collect = algo.init(key), {}, ppo.rollout.collect

    def spy(*args):
        actors, seen["steps"], episodes = collect(*args)
        return actors, seen["steps"], episodes

    def watched(state):
        _, metrics = algo.update(state)
        return metrics["value_loss"], seen["steps"]

    monkeypatch.setattr(ppo.rollout, "collect", spy)
    value_loss, steps = jax.jit(watched)(state)
    memories, outputs = network.unroll(state.params, state.actors.memory, steps.obs, steps.first)
    after = jax.vmap(lambda m, o: network.step(state.params, m, o, jnp.zeros(2, bool))[1].value)(
        memories, steps.next_obs
    )
    discount, go_on = 0.99 * (1 - steps.terminated), 1.0 - (steps.terminated | steps.truncated)
    gae = jax.vmap(ppo.returns.gae, in_axes=(1, 1, 1, 1, 1, None), out_axes=1)
    advantage = gae(outputs.value, steps.reward, discount, after, go_on, 0.95)
    # On the first and only minibatch the value loss is half the mean square of the advantages.
    np.testing.assert_allclose(value_loss, 0.5 * jnp.square(advantage).mean(), rtol=1e-5)


# Composition


def close(a, b, rtol=1e-4, atol=1e-5):
    def leaf(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(np.asarray(x, float), np.asarray(y, float), rtol=rtol, atol=atol)

    jax.tree.map(leaf, a, b)


@pytest.mark.slow
def test_a_vmapped_seed_is_its_solo_run(key):
    algo = ppo.make(envs.make("CartPole-v1"), TINY)
    train = run.train_fn(algo, 3 * algo.env_steps_per_update)
    keys = jax.random.split(key, 3)
    states, metrics = jax.jit(jax.vmap(train))(keys)
    for i in range(3):
        close(jax.tree.map(lambda x, i=i: x[i], (states, metrics)), jax.jit(train)(keys[i]))


@pytest.mark.slow
def test_a_cell_of_a_grid_is_its_solo_run(key):
    algo = ppo.make(envs.make("CartPole-v1"), TINY)
    cells = list(run.sweep.grid(ppo.Hyper(), {"learning_rate": [1e-3, 1e-2], "gamma": [0.9]}).values())
    stacked = jax.tree.map(lambda *xs: jnp.array(xs), *cells)
    both = over_hypers(over_seeds(algo))
    keys = jax.random.split(key, 2)
    states, _ = jax.jit(both.update)(both.init(keys, stacked, 5))
    for i, cell in enumerate(cells):
        alone, _ = jax.jit(algo.update)(algo.init(keys[1], cell, 5))
        close(jax.tree.map(lambda x, i=i: x[i, 1], states), alone)


@pytest.mark.slow
@pytest.mark.two_devices
def test_over_devices_changes_nothing(key):
    algo = over_seeds(ppo.make(envs.make("CartPole-v1"), TINY))
    mesh = jax.make_mesh((2,), ("seeds",), axis_types=(jax.sharding.AxisType.Auto,))
    state = algo.init(jax.random.split(key, 4))
    close(jax.jit(over_devices(algo, mesh).update)(state), jax.jit(algo.update)(state))


@pytest.mark.slow
def test_evaluation_within_a_run_leaves_training_alone(key):
    algo = ppo.make(envs.make("CartPole-v1"), TINY)

    def evaluate(s, k):
        return {"return": run.evaluate(algo, s, k, 4).returns.mean()}

    evaluated = with_evaluation(algo, evaluate, 3, jax.random.key(9))
    state, metrics = jax.jit(evaluated.update)(evaluated.init(key, None, 1))
    plain, _ = jax.jit(run.train_fn(algo, 3 * algo.env_steps_per_update))(key)
    close(state.params, plain.params)
    assert metrics["eval_return"] > 5


@pytest.mark.thorough(1)
@pytest.mark.parametrize("gru", [0, 8])
@pytest.mark.parametrize("greedy", [True, False])
def test_no_key_is_used_twice(gru, greedy):
    algo = ppo.make(envs.make("CartPole-v1"), with_(TINY, network=nets.Config(hidden=(8,), gru=gru)))

    def train_and_evaluate(key, eval_key):
        state, _ = run.train_fn(algo, 2 * algo.env_steps_per_update)(key)
        return run.evaluate(algo, state, eval_key, 2, greedy)

    with jax.debug_key_reuse(True):
        jax.jit(train_and_evaluate)(jax.random.key(2), jax.random.key(3))


def test_one_trace_serves_a_whole_run(key):
    algo, traces = ppo.make(envs.make("Catch-bsuite"), TINY), []

    def counted(state):
        traces.append(1)
        return algo.update(state)

    update, state = jax.jit(counted), algo.init(key, None, 3)
    for _ in range(3):
        state, _ = update(state)
    assert len(traces) == 1


def test_learning_rate_anneals_to_the_end(key):
    algo = ppo.make(envs.make("Probe-policy"), TINY, HYPER)
    state, _ = jax.jit(run.train_fn(algo, 4 * algo.env_steps_per_update))(key)
    after, _ = jax.jit(algo.update)(state)  # past the end the rate is 0
    close(after.params, state.params, rtol=0, atol=0)


# Bad input


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_envs": 0}, "config.num_envs must be an integer of at least 1; got 0"),
        ({"num_minibatches": 7}, r"must divide num_envs \* num_steps = 512; got 7"),
        ({"network": nets.Config(gru=4), "num_minibatches": 8}, "must divide num_envs = 4; got 8"),
        ({"loss": "reinforce"}, "config.loss must be one of clip, penalty; got 'reinforce'"),
        ({"precision": "half"}, "precision must be one of float32, bfloat16"),
        ({"loss": "penalty", "dual_clip": True}, "config.dual_clip needs config.loss=clip; got penalty"),
        ({"standardize_advantages": "batches"}, "must be one of minibatch, batch, none"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ppo.make(envs.make("Probe-value"), ppo.Config(**fields))


def test_wrong_numbers_are_refused():
    env = envs.make("Probe-value")
    with pytest.raises(ValueError, match=r"hyper.gamma must be between 0 and 1; got 1.5"):
        ppo.make(env, TINY, ppo.Hyper(gamma=1.5))
    with pytest.raises(ValueError, match=r"hyper.learning_rate must be at least 0; got -1"):
        ppo.make(env, TINY).init(jax.random.key(0), ppo.Hyper(learning_rate=-1.0))
    with pytest.raises(ValueError, match="env_steps must be at least one update, 16; got 15"):
        run.train_fn(ppo.make(env, TINY), 15)


def test_a_shuffle_is_uniform():
    orders = jax.jit(jax.vmap(lambda k: rollout.shuffle(k, 5)))(jax.random.split(jax.random.key(0), 20_000))
    assert (jnp.sort(orders, axis=1) == jnp.arange(5)).all()
    counts = jax.vmap(lambda row: jnp.bincount(row, length=5), in_axes=1)(orders)
    np.testing.assert_allclose(counts / 20_000, 0.2, atol=0.015)
    assert rollout.shuffle(jax.random.key(0), 1).tolist() == [0]


def test_early_truncations_all_bootstrap(key):
    """An environment that truncates far sooner than its time limit: a bound taken from the limit would drop some."""

    def step(key, t, action):
        return (jnp.ones(1), t + 1, 1.0, False, t % 2 == 1)

    losses = []
    for limit in (None, 2, 1000):
        env = envs.strict(
            envs.Environment("Early", lambda key: (jnp.zeros(1), jnp.int32(0)), step, envs.Discrete(2), limit)
        )
        algo = ppo.make(env, TINY)
        losses.append(float(jax.jit(algo.update)(algo.init(key))[1]["value_loss"]))
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.slow
def test_masks_hold_in_float16():
    config = with_(FAST, precision="params=float32,compute=float16,output=float32")
    np.testing.assert_allclose(score(*trained("Probe-mask", config, updates=60)), 1, atol=0.1)


def test_a_minibatch_of_one_sample_is_refused():
    one = with_(TINY, num_envs=2, num_steps=4, num_minibatches=8)
    with pytest.raises(ValueError, match="standardize_advantages=minibatch needs two samples or more"):
        ppo.make(envs.make("Probe-action"), one)
    ppo.make(envs.make("Probe-action"), with_(one, standardize_advantages="batch"))
    with pytest.raises(ValueError, match="standardize_advantages=batch needs two samples or more"):
        single = with_(one, num_envs=1, num_steps=1, num_minibatches=1)
        ppo.make(envs.make("Probe-action"), with_(single, standardize_advantages="batch"))


def test_bounds_that_a_policy_cannot_reach_are_refused():
    def step(key, state, action):
        return jnp.zeros(1), state, 1.0, True, False

    env = envs.Environment("free", lambda key: (jnp.zeros(1), 0), step, envs.Box((-np.inf, -1.0), (np.inf, 3.0)), 1)
    with pytest.raises(ValueError, match="tanh_normal needs finite bounds"):
        ppo.make(env, with_(TINY, continuous="tanh_normal"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        action = ppo.to_env(env.action_space, jnp.array([7.0, 0.5]))
    np.testing.assert_allclose(action, [7.0, 2.0])


def test_the_penalty_comes_back_after_a_phase_of_small_steps(key):
    """At a learning rate of 0 the weight is halved at every update, down to a hundredth of its start and no further."""
    algo = ppo.make(envs.make("Probe-action"), with_(TINY, loss="penalty"), ppo.Hyper(learning_rate=0.0))
    state, metrics = jax.jit(run.train_fn(algo, 200 * algo.env_steps_per_update))(key)
    np.testing.assert_allclose(metrics["kl_weight"][:3], [1, 0.5, 0.25])
    np.testing.assert_allclose(state.kl_weight, 0.01, rtol=1e-6)


@pytest.mark.slow
def test_evaluation_within_a_run_weighs_episodes_as_the_run_loop_does(key):
    """Updates in which no episode ended count for nothing: 3 rows of 4 updates have the returns of all their episodes."""
    algo = ppo.make(envs.make("CartPole-v1"), TINY)
    evaluated = with_evaluation(algo, lambda state, key: {}, 4, jax.random.key(9))
    _, rows = jax.jit(run.train_fn(evaluated, 12 * algo.env_steps_per_update))(key)
    _, fine = jax.jit(run.train_fn(algo, 12 * algo.env_steps_per_update))(key)
    count = np.asarray(fine["episodes"]).reshape(3, 4)
    assert (count == 0).any() and count.sum() > 0
    np.testing.assert_array_equal(rows["episodes"], count.sum(1))
    total = np.nansum(np.asarray(fine["episode_return"]).reshape(3, 4) * count, 1)
    ended = count.sum(1) > 0
    np.testing.assert_allclose(rows["episode_return"][ended], total[ended] / count.sum(1)[ended], rtol=1e-5)


def test_a_search_for_nans_finds_none_where_no_episode_ended(key):
    algo = ppo.make(envs.make("CartPole-v1"), with_(TINY, num_steps=8))
    with jax.debug_nans(True):
        _, metrics = jax.jit(run.train_fn(algo, algo.env_steps_per_update))(key)
    assert metrics["episodes"] == 0 and metrics["episode_return"] == 0


@pytest.mark.thorough(4)
@pytest.mark.parametrize(
    "module, fields",
    [
        (ppo, {"loss": "penalty", "normalize_rewards": True}),
        (dqn, {"prioritized": True, "munchausen": True}),
        (dqn, {"distribution": "categorical"}),
        (pqn, {}),
        (r2d2, {}),
        *((td, {"method": method}) for method in td.METHODS),
    ],
)
def test_what_is_learned_stays_float32_with_64_bits_enabled(module, fields):
    with jax.enable_x64(True):
        algo = module.make(envs.make("Garnet"), module.Config(**fields))
        shapes = check(algo)
    assert not [
        x for x in jax.tree.leaves(shapes) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and x.dtype.itemsize > 4
    ]
