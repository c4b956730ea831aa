"""Rewards carried backwards, learning from one's own past, PPO-CMA: equations by hand, and what every algorithm promises."""

import bits
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import algorithm, envs, nets, run
from jrl.algos import ebu, option_critic, ppo, ppo_cma, rudder, self_imitation
from jrl.envs import wrappers
from jrl.equations import losses, returns
from jrl.experience import replay
from jrl.run import loop

RANK_PROMOTION = "allow"  # gymnax promotes ranks
NETWORK = nets.ValueConfig(hidden=(8,), norm="none")
IMITATION = self_imitation.Config(num_gradient_steps=2, batch_size=8, capacity=100, horizon=20)


def made_ebu(env="CartPole-v1", hyper=ebu.Hyper(), **more):
    small = {"num_envs": 2, "batch_size": 3, "length": 6, "capacity": 100, "learning_starts": 20, "network": NETWORK}
    return ebu.make(envs.make(env) if isinstance(env, str) else env, ebu.Config(**(small | more)), hyper)


def made_sil(env="CartPole-v1", **more):
    small = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "network": nets.Config(hidden=(8,))}
    return ppo.make(envs.make(env), ppo.Config(**(small | {"imitation": IMITATION} | more)))


def made_rudder(env="DelayedChoice", **more):
    small = {"num_envs": 4, "num_gradient_steps": 2, "batch_size": 4, "capacity": 8, "lstm": 4, "hidden": (4,)}
    made = envs.make(env, **({"delay": 5} if env == "DelayedChoice" else {}))
    return rudder.make(made, rudder.Config(**(small | more)))


def made_cma(env="Pendulum-v1", **more):
    small = {"num_envs": 2, "num_steps": 8, "num_gradient_steps": 2, "batch_size": 4, "history": 2}
    small["network"] = nets.ContinuousConfig(hidden=(8,))
    made = envs.make(env) if isinstance(env, str) else env
    return ppo_cma.make(made, ppo_cma.Config(**(small | more)))


def made_options(env="FourRooms", hyper=option_critic.Hyper(), **more):
    config = option_critic.Config(**({"num_options": 2, "num_steps": 8} | more))
    return option_critic.make(envs.make(env) if isinstance(env, str) else env, config, hyper)


MAKERS = pytest.mark.parametrize(
    "make",
    [made_ebu, made_sil, made_rudder, made_cma, made_options],
    ids=["ebu", "sil", "rudder", "ppo_cma", "options"],
)


MAKERS_WITH_NETWORKS = pytest.mark.parametrize(
    "make", [made_ebu, made_sil, made_rudder, made_cma], ids=["ebu", "sil", "rudder", "ppo_cma"]
)


@pytest.mark.parametrize(
    "beta, wanted", [(0.5, [0.2025, 0.45, 1.0]), (1.0, [0.81, 0.9, 1.0]), (0.0, [0.18, 0.09, 1.0])]
)
def test_backward_targets_by_hand(beta, wanted):
    r, discount = jnp.array([0.0, 0.0, 1.0]), jnp.array([0.9, 0.9, 0.0])
    q = jnp.array([[0.2, 0.0], [0.0, 0.1], [-jnp.inf, -jnp.inf]])  # at the end no action is legal
    y = returns.backward_targets(r, discount, q, jnp.array([1, 0, 0]), jnp.array([1.0, 1.0, 0.0]), beta)
    np.testing.assert_allclose(y, wanted, rtol=1e-6)


def test_backward_targets_of_a_truncated_episode_bootstrap_from_its_end():
    cut = returns.backward_targets(
        jnp.array([1.0, 5.0]),
        jnp.array([0.5, 0.5]),
        jnp.array([[2.0, 4.0], [6.0, 0.0]]),
        jnp.array([0, 0]),
        jnp.zeros(2),
        1.0,
    )
    np.testing.assert_allclose(cut, [3.0, 8.0])  # nothing of the second step, which is of the next episode
    with pytest.raises(ValueError, match="backward_targets: arguments must have one shape"):
        returns.backward_targets(jnp.zeros(2), jnp.zeros(3), jnp.zeros((2, 2)), jnp.zeros(2, int), jnp.zeros(2), 1.0)


def test_without_diffusion_the_targets_are_those_of_q_learning():
    keys = jax.random.split(jax.random.key(0), 5)
    r, q = jax.random.normal(keys[0], (9,)), jax.random.normal(keys[1], (9, 3))
    discount = 0.9 * jax.random.bernoulli(keys[2], 0.8, (9,))
    a, goes_on = jax.random.randint(keys[3], (9,), 0, 3), 1.0 * jax.random.bernoulli(keys[4], 0.7, (9,))
    np.testing.assert_allclose(
        returns.backward_targets(r, discount, q, a, goes_on, 0.0), r + discount * q.max(-1), rtol=1e-6
    )


def test_self_imitation_by_hand():
    log_prob, value, target = jnp.log(jnp.array([0.25, 0.5])), jnp.array([1.2, 0.9]), jnp.array([2.0, 0.5])
    policy, worth, advantage = losses.self_imitation(log_prob, value, target)
    np.testing.assert_allclose(advantage, [0.8, 0.0], rtol=1e-6)
    np.testing.assert_allclose([policy.mean(), worth.mean()], [0.55452, 0.16], rtol=1e-4)
    slopes = jax.grad(lambda lp, v: sum(x.sum() for x in losses.self_imitation(lp, v, target)[:2]), argnums=(0, 1))
    by_policy, by_value = slopes(log_prob, value)
    np.testing.assert_allclose(by_policy, [-0.8, 0.0], rtol=1e-6)  # where the return was lower, nothing is learned
    np.testing.assert_allclose(by_value, [-0.8, 0.0], rtol=1e-6)  # of the value's loss alone


def test_long_returns_are_those_of_short_steps():
    """More steps than are compiled one by one: the rewards of whole episodes, discounted."""
    spec, n = jax.ShapeDtypeStruct((1,), jnp.float32), 12
    store = replay.make(spec, 1, 60, 16, n_step=n)
    reward, ends = jax.random.normal(jax.random.key(0), (50,)), np.zeros((2, 50), bool)
    ends[0, [8, 30]], ends[1, [15]] = True, True  # terminated, truncated
    obs = jnp.arange(51.0)[:, None, None]
    rows = replay.Step(obs[:-1], jnp.zeros((50, 1), int), reward[:, None], *jnp.asarray(ends)[..., None], obs[1:])
    buffer, _ = jax.lax.scan(lambda b, s: (store.add(b, s), None), store.init(), rows)
    batch = jax.jit(lambda key: store.sample(buffer, key, 0.9))(jax.random.key(1))
    for i in np.flatnonzero(batch.weight > 0):
        t = first = int(batch.obs[i, 0])
        total, discount = 0.0, 1.0
        while True:
            total, discount = total + discount * reward[t], discount * 0.9
            last = ends[:, t].any() or t + 1 - first == n or t + 1 == 49  # of the newest step the end is not known
            if last:
                break
            t += 1
        np.testing.assert_allclose(batch.reward[i], total, rtol=1e-4)
        np.testing.assert_allclose(batch.discount[i], 0.0 if ends[0, t] else discount, rtol=1e-5)


def test_predicted_returns_are_paid_as_they_change_and_sum_to_the_return():
    """An untrained predictor, in an environment that truncates and one that terminates."""
    for name, env in (("CartPole-v1", None), ("DelayedChoice", None)):
        predictor = made_rudder(name)
        state = jax.jit(predictor.init)(jax.random.key(0))
        state = state._replace(
            return_stats=state.return_stats._replace(mean=jnp.float32(2.0), variance=jnp.float32(9.0))
        )
        easier, env = rudder.redistributed(predictor, state), predictor.env
        obs, inner = env.reset(jax.random.key(1))
        easier_obs, carried = easier.reset(jax.random.key(1))
        rewards, new = [], []
        step, easier_step = jax.jit(env.step), jax.jit(easier.step)
        for t in range(500):
            key = jax.random.key(t)
            action = jnp.int32(t % 2)
            obs, inner, reward, terminated, truncated = step(key, inner, action)
            easier_obs, carried, paid, *ends = easier_step(key, carried, action)
            np.testing.assert_allclose(obs, easier_obs, atol=1e-6)
            assert ends == [terminated, truncated]
            rewards.append(reward)
            new.append(paid)
            if terminated | truncated:
                break
        np.testing.assert_allclose(sum(new), sum(rewards), atol=1e-4)
        assert np.abs(new[0] - rewards[0]) > 1e-3
        np.testing.assert_allclose(new[0], 2.0, atol=3.5)  # the first prediction, in units of returns


def test_the_first_episode_of_each_environment_is_what_is_learned_from():
    predictor = made_rudder("CartPole-v1")
    state, metrics = jax.jit(predictor.update)(jax.jit(predictor.init)(jax.random.key(0)))
    episodes = state.episodes
    lengths = episodes.alive[:4].sum(1)
    np.testing.assert_allclose(episodes.total[:4], lengths)  # CartPole pays 1 a step
    assert (np.diff(episodes.alive[:4].astype(int), axis=1) <= 0).all() and not episodes.alive[4:].any()
    np.testing.assert_allclose(metrics["episode_length"], lengths.mean())


@pytest.mark.thorough(1)
@MAKERS_WITH_NETWORKS
def test_keys_are_not_reused_and_precision_and_hyperparameters_are_settings(make):
    algo = make(precision="pure_bfloat16")
    with jax.debug_key_reuse(True):
        state, metrics = jax.jit(algo.update)(jax.jit(algo.init)(jax.random.key(0)))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert all(np.isfinite(metrics[name]) for name in ({"loss", "mean_loss"} & metrics.keys()))
    swept = algorithm.over_hypers(algo)
    hypers = jax.tree.map(lambda x: jnp.full(2, x), algo.hyper)._replace(learning_rate=jnp.array([1e-3, 1e-2]))
    after = jax.eval_shape(lambda k: swept.update(swept.init(k, hypers))[1], jax.random.key(0))
    assert {x.shape for x in jax.tree.leaves(after)} == {(2,)}


@pytest.mark.slow
@MAKERS
def test_a_run_is_resumed_bit_for_bit_and_loaded(make, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHUNK_SECONDS", 0.0)  # one update at a time
    algo = make()
    more = {"num_seeds": 2, "progress": False, "eval_episodes": 0}
    steps = 16 * algo.env_steps_per_update
    whole = run.train(algo, jax.random.key(0), steps, **more, run_dir=tmp_path / "whole")
    run.train(algo, jax.random.key(0), steps, **more, run_dir=tmp_path / "half", on_chunk=lambda chunk: True)
    resumed = run.train(algo, jax.random.key(0), steps, **more, run_dir=tmp_path / "half", resume=True)
    bits.assert_same(resumed.state, whole.state)
    bits.assert_same(run.load(tmp_path / "whole").state, whole.state)


def test_the_exact_values_of_the_delayed_choice():
    from jrl.envs import tabular
    from jrl.equations import mdp

    process = tabular.delayed_choice(delay=3, num_actions=2)
    v = mdp.value_iteration(process, 0.5)
    np.testing.assert_allclose(v, [0.125, 0, 0, 0, 0.25, 0.5, 1.0, 0], atol=1e-6)
    np.testing.assert_array_equal(mdp.action_values(process, v, 0.5)[0], [0, 0.125])


def test_wrong_settings_are_refused():
    recurrent = nets.Config(hidden=(8,), gru=4)
    for message, make in {
        "config.capacity must be at least 18, length": lambda: made_ebu(capacity=17, learning_starts=1),
        "R2D2 and PQN train recurrent networks": lambda: made_ebu(network=nets.ValueConfig(gru=4)),
        "config.network.noisy is an option of DQN": lambda: made_ebu(network=nets.ValueConfig(noisy=True)),
        "hyper.diffusion must be": lambda: made_ebu(hyper=ebu.Hyper(diffusion=2.0)),
        "config.imitation replays single transitions": lambda: made_sil(network=recurrent, num_minibatches=1),
        "imitation.horizon must be": lambda: self_imitation.Config(horizon=0),
        r"ppo_cma needs real actions \(Box\); CartPole-v1 has Discrete": lambda: made_cma("CartPole-v1"),
        "config.first_std must be between 0.01 and 1": lambda: made_cma(first_std=2.0),
        "config.first_mean must be between -1 and 1": lambda: made_cma(first_mean=1.0),
        "option_critic needs discrete actions": lambda: made_options("Pendulum-v1"),
        "option_critic needs an observation vector": lambda: made_options("Breakout-MinAtar"),
        "the goal must be a free cell of four rooms; got row 0": lambda: envs.make("FourRooms", goal_row=0),
        "rudder needs episodes that end; RandomWalk has no time limit": lambda: made_rudder("RandomWalk"),
        "config.capacity must be at least num_envs and batch_size; got 3": lambda: made_rudder(capacity=3),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


def test_actions_that_went_badly_are_mirrored():
    action, weight = losses.mirrored_actions(
        jnp.array([[0.5, -0.2], [0.5, -0.2]]), jnp.array([-2.0, 3.0]), jnp.zeros((2, 2)), jnp.full((2, 2), 0.5)
    )
    np.testing.assert_allclose(action, [[-0.5, 0.2], [0.5, -0.2]], rtol=1e-6)
    np.testing.assert_allclose(
        weight, [2 * 0.76482, 3.0], rtol=1e-4
    )  # the mean of two kernels; their product is 0.55990


@pytest.mark.slow
def test_on_a_hill_the_deviation_first_grows_and_then_shrinks():
    """The paper's quadratic: -|a|^2 from (-1, -1) with a deviation of 0.25. Policy gradients alone would shrink it from the start."""

    def step(key, state, action):
        return jnp.zeros(1), state, -jnp.sum(action**2), jnp.bool_(True), jnp.bool_(False)

    space = envs.Box((-2.0, -2.0), (2.0, 2.0))
    env = envs.strict(envs.Environment("Hill", lambda key: (jnp.zeros(1), jnp.int32(0)), step, space, time_limit=1))
    config = ppo_cma.Config(
        num_envs=64,
        num_steps=1,
        batch_size=64,
        first_mean=-0.5,
        first_std=0.125,
        network=nets.ContinuousConfig(hidden=(32,)),
    )
    algo = ppo_cma.make(env, config, ppo_cma.Hyper(gamma=0.0, learning_rate=2e-3))

    def trace(key):
        def one(state, _):
            state, metrics = algo.update(state)
            return state, (jnp.linalg.norm(algo.act(state, jnp.zeros(1))[0]), 2 * metrics["std"])

        return jax.lax.scan(one, algo.init(key), length=20)[1]

    distance, std = (x.mean(0) for x in jax.jit(jax.vmap(trace))(jax.random.split(jax.random.key(0), 2)))
    np.testing.assert_allclose(std[0], 0.25, atol=0.03)
    assert std[:10].max() > 0.27 and std[-1] < 0.18 and distance[0] > 1.2 and distance[-1] < 0.1


@pytest.mark.slow
def test_a_mean_is_not_moved_by_the_deviation_s_loss_nor_by_the_value_s():
    algo = made_cma(wrappers.reward_above(envs.make("Pendulum-v1"), -20.0), num_gradient_steps=3)  # 1 a step
    state = jax.jit(algo.init)(jax.random.key(0))
    later, metrics = jax.jit(algo.update)(state)
    for name in ("mean", "std", "value"):
        moved = jax.tree.map(lambda x, y: jnp.any(x != y), later.params[name], state.params[name])
        assert any(jax.tree.leaves(moved)) and metrics[f"{name}_grad_norm"] > 0
    assert later.history.advantage[0].any() and not later.history.advantage[1].any()
    np.testing.assert_allclose(later.history.advantage[0].std(), 1.0, rtol=1e-3)  # divided by the deviation


def test_the_value_upon_arrival_of_an_option():
    """0.7 of the option that goes on, 0.3 of the best one."""
    u = option_critic.upon_arrival(jnp.array([1.0, 2.0]), 0, 0.3)
    np.testing.assert_allclose([u, 0.99 * u], [1.3, 1.287], rtol=1e-6)


def test_one_step_of_the_option_critic_by_hand():
    """A corridor of one step to the right: option 0 is worse where it arrives, and learns to stop there."""

    def step(key, state, action):
        return jnp.array([0.0, 1.0]), state, jnp.float32(0.5), jnp.bool_(False), jnp.bool_(False)

    first = (jnp.array([1.0, 0.0]), jnp.int32(0))
    env = envs.strict(envs.Environment("Corridor", lambda key: first, step, envs.Discrete(2), time_limit=9))
    hyper = option_critic.Hyper(
        learning_rate=0.5, option_learning_rate=0.1, termination_learning_rate=1.0, gamma=0.9, temperature=1.0
    )
    algo = made_options(env, hyper, num_steps=1)
    state = jax.jit(algo.init)(jax.random.key(0))
    q = jnp.zeros((2, 2, 2)).at[0, :, 1].set(1.0).at[1, :, 1].set(2.0).at[0, 0, 0].set(0.4)  # Q(s') = [1, 2]
    logit = jnp.log(0.3 / 0.7)  # beta = 0.3
    state = state._replace(
        q=q,
        theta=jnp.zeros((2, 2, 2)),
        nu=jnp.full((2, 2), logit),
        option=jnp.int32(0),
        action=jnp.int32(0),
        hyper=state.hyper._replace(margin=jnp.float32(0)),
    )
    with jax.debug_key_reuse(True):
        later, metrics = jax.jit(algo.update)(state)
    error = 0.5 + 0.9 * 1.3 - 0.4
    np.testing.assert_allclose(metrics["td_error"], error, rtol=1e-5)
    np.testing.assert_allclose(later.q[0, 0, 0], 0.4 + 0.5 * error, rtol=1e-5)
    # The advantage of the action is 0.4 - 0.2, the slope of its logarithm 1 - 1/2.
    np.testing.assert_allclose(later.theta[0, :, 0], [0.1 * 0.2 * 0.5, -0.1 * 0.2 * 0.5], rtol=1e-5)
    np.testing.assert_allclose(later.nu[0, 1], logit + 0.21 * 1, rtol=1e-5)  # beta (1 - beta) (2 - 1): it rises
    np.testing.assert_array_equal(later.nu[1], logit)


@pytest.mark.slow
def test_options_find_the_door_and_recover_when_the_goal_is_moved():
    algos = [
        made_options(envs.make("FourRooms", **goal), num_options=4, num_steps=500)
        for goal in ({}, {"goal_row": 10, "goal_column": 8})
    ]

    def train(key):
        state, lengths = algos[0].init(key), []
        for algo in algos:
            state, metrics = jax.lax.scan(lambda s, _, algo=algo: algo.update(s), state, length=200)
            lengths.append(metrics["episode_length"])
        return jnp.stack(lengths)

    lengths = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 4))
    assert (jnp.nanmean(lengths[:, :, -20:], axis=-1) < 60).all()


@pytest.mark.slow
def test_a_reward_travels_back_over_fifty_steps_where_q_learning_carries_it_one():
    """After so few steps deep Q-learning does not know the first action yet; targets made backwards do."""
    from jrl.algos import dqn

    env = envs.make("DelayedChoice", noise=0.5)
    shared = {
        "num_envs": 10,
        "capacity": 20_000,
        "target_every": 50,
        "network": nets.ValueConfig(hidden=(64,), norm="none"),
    }
    numbers = {"learning_rate": 3e-3, "gamma": 1.0, "epsilon_start": 0.3, "epsilon_end": 0.3}
    obs = env.reset(jax.random.key(0))[0]

    def right(module, **extra):
        algo = module.make(env, module.Config(**shared), module.Hyper(**numbers, **extra))
        state, _ = jax.jit(jax.vmap(run.train_fn(algo, 10_000)))(jax.random.split(jax.random.key(0), 8))
        return int((jax.vmap(lambda s: algo.act(s, obs)[0])(state) == 3).sum())

    assert right(ebu, diffusion=1.0) >= 6 and right(dqn) <= 4


@pytest.mark.slow
def test_a_redistributed_reward_is_learned_from_without_looking_ahead():
    env = envs.make("DelayedChoice", noise=0.5)
    predictor = rudder.make(env)

    def whole(key):
        keys = jax.random.split(key)
        state, _ = run.train_fn(predictor, 5 * predictor.env_steps_per_update)(keys[0])
        easier = rudder.redistributed(predictor, state)
        from jrl.algos import td

        algo = td.make(easier, td.Config(num_steps=510), td.Hyper(gamma=0.0, epsilon=0.3))
        learned, _ = run.train_fn(algo, 8_000)(keys[1])
        return algo.act(learned, env.reset(key)[0])[0]

    assert (jax.jit(jax.vmap(whole))(jax.random.split(jax.random.key(0), 8)) == 3).sum() >= 7
