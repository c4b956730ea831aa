"""Tabular methods: updates by hand, exact answers, views that agree, and what must diverge."""

import functools

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

from jrl import envs, run
from jrl.algos import td
from jrl.envs import tabular, wrappers
from jrl.envs.types import observation_spec
from jrl.equations import distributions, mdp, returns

WALK = tabular.random_walk(5, 0.0, 1.0)


@functools.partial(jax.jit, static_argnames=("steps",))
def walk(key, process, steps):
    """A stream of the uniform policy's transitions, one-hot features, and the states left."""
    env = tabular.environment(process)

    def step(carry, key):
        s = carry
        key_action, key_step, key_reset = jax.random.split(key, 3)
        policy = mdp.uniform_policy(process)[s]
        a = jax.random.categorical(key_action, jnp.log(policy))
        _, (to, _), reward, terminated, _ = env.step(key_step, (s, jnp.int32(0)), a)
        first = env.reset(key_reset)[1][0]
        return jnp.where(terminated, first, to), (s, reward, terminated, to)

    key_first, key_steps = jax.random.split(key)
    start = env.reset(key_first)[1][0]
    _, (s, r, terminated, to) = jax.lax.scan(step, start, jax.random.split(key_steps, steps))
    x = jnp.eye(len(process.terminal))
    return td.Stream(x[s], r, 0.9 * (1.0 - terminated), x[to], 1.0 - terminated)


def random_stream(key, steps=30, features=4):
    """Not a process at all: random features, rewards and ends, for identities that hold for every stream."""
    keys = jax.random.split(key, 4)
    x = jax.random.normal(keys[0], (steps + 1, features))
    ended = jax.random.bernoulli(keys[1], 0.15, (steps,))
    terminated = ended & jax.random.bernoulli(keys[2], 0.5, (steps,))
    r = jax.random.normal(keys[3], (steps,))
    return td.Stream(x[:-1], r, 0.9 * (1.0 - terminated), x[1:], 1.0 - ended)


# Exact answers


def test_the_random_walk_s_values_are_sixths():
    v = mdp.evaluate_policy(WALK, mdp.uniform_policy(WALK), 1.0)
    np.testing.assert_allclose(v, [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 0], atol=1e-6)


def test_frozen_lake_s_value_is_known():
    process = tabular.frozen_lake()
    np.testing.assert_allclose(mdp.value_iteration(process, 0.99, 1e-7)[0], 0.5420, atol=5e-5)
    np.testing.assert_allclose(mdp.policy_iteration(process, 0.99)[1][0], 0.5420, atol=5e-5)


def test_the_cliff_takes_thirteen_steps():
    np.testing.assert_allclose(mdp.value_iteration(tabular.cliff(), 1.0)[36], -13, atol=1e-5)


def test_the_key_and_the_door_take_the_shortest_way_by_the_key():
    size, gamma = 8, 0.9
    process = tabular.key_and_door(size)
    to_key, to_goal = 7 + 3, 3 + 4 + 4  # down and right; up to the door's row, through it, and up to the goal
    v = mdp.value_iteration(process, gamma)
    np.testing.assert_allclose(v[0], gamma ** (to_key + to_goal - 1), rtol=1e-4)
    row, column, has_key, steps = 0, 0, False, 0
    policy = np.argmax(mdp.greedy_policy(process, mdp.action_values(process, v, gamma)), -1)
    s = 0
    while not process.terminal[s]:
        s, steps = int(np.argmax(process.transition[s, policy[s]])), steps + 1
        has_key = has_key or s == 64 + 7 * 8 + 3
        row, column = divmod(s % 64, 8)
        assert has_key or column < 4
    assert has_key and (row, column, steps) == (0, 7, to_key + to_goal)
    env = envs.make("KeyAndDoor", size=5)
    assert envs.observation_spec(env).shape == (50,) and env.time_limit == 256
    with pytest.raises(ValueError, match="size must be an integer of at least 5; got 4"):
        tabular.key_and_door(4)


@pytest.mark.parametrize("seed", range(3))
def test_a_potential_keeps_the_optimal_policies_and_another_bonus_does_not(seed):
    gamma = 0.9
    process = tabular.garnet(jax.random.key(seed), 12, 3, 4)
    process = process._replace(terminal=jnp.arange(12) == 0)
    potential = 3 * jax.random.normal(jax.random.key(seed + 100), (12,))
    v = mdp.value_iteration(process, gamma, 1e-7)
    q = mdp.action_values(process, v, gamma)

    def optimal(of):
        q = np.asarray(mdp.action_values(of, mdp.value_iteration(of, gamma, 1e-7), gamma))[1:]
        return np.abs(q - q.max(-1, keepdims=True)) < 1e-4

    shaped = mdp.shaped(process, potential, gamma)
    np.testing.assert_array_equal(optimal(shaped), optimal(process))
    of_shaped = mdp.value_iteration(shaped, gamma, 1e-7)
    np.testing.assert_allclose(of_shaped[1:], (v - potential)[1:], atol=1e-4)
    bribed = process._replace(reward=process.reward + potential[None, None])  # for arriving, without a difference
    assert (optimal(bribed) != optimal(process)).any()
    # With the exact value as the potential the first sweep from 0 gives each action's advantage: the policy is found at once.
    once = mdp.action_values(mdp.shaped(process, v, gamma), jnp.zeros(12), gamma)
    np.testing.assert_allclose(once[1:], (q - v[:, None])[1:], atol=1e-4)


def test_an_environment_is_shaped_by_a_potential_of_its_observations(key):
    """A chain of places with potentials 0, 1, 3 (gamma 0.9): bonuses 0.9 and 1.7, or -1 where the second step terminates."""
    potential = jnp.array([0.0, 1.0, 3.0])

    def bonuses(terminal):
        transition = np.zeros((3, 1, 3))
        transition[[0, 1, 2], 0, [1, 2, 2]] = 1
        process = mdp.make(transition, np.zeros((3, 1)), [False, False, terminal], [1, 0, 0])
        env = envs.strict(wrappers.shaped(tabular.environment(process, time_limit=2), lambda obs: obs @ potential, 0.9))
        _, state = env.reset(key)
        rewards = []
        for _ in range(2):
            _, state, reward, terminated, truncated = env.step(key, state, jnp.int32(0))
            rewards.append(reward)
        assert bool(terminated) == terminal and truncated
        by_array = mdp.shaped(process, potential, 0.9).reward[jnp.arange(2), 0, jnp.arange(2) + 1]
        np.testing.assert_allclose(rewards, by_array, atol=1e-6)
        return rewards

    np.testing.assert_allclose(bonuses(False), [0.9, 1.7], atol=1e-6)
    np.testing.assert_allclose(bonuses(True), [0.9, -1.0], atol=1e-6)
    with pytest.raises(ValueError, match="shaped: gamma must be between 0 and 1; got 2"):
        wrappers.shaped(envs.make("RandomWalk"), lambda obs: obs[0], 2)


@pytest.mark.parametrize("seed", range(3))
def test_both_iterations_agree_on_random_processes(seed):
    process = tabular.garnet(jax.random.key(seed), 12, 3, 4)
    np.testing.assert_allclose(process.transition.sum(-1), 1, atol=1e-5)
    assert ((process.transition > 0).sum(-1) == 4).all()
    v = mdp.value_iteration(process, 0.9)
    policy, v_of_policy = mdp.policy_iteration(process, 0.9)
    np.testing.assert_allclose(v, v_of_policy, atol=1e-4)
    np.testing.assert_allclose(mdp.evaluate_policy(process, policy, 0.9), v, atol=1e-4)
    # Bellman's equations, written out for one state.
    q = [sum(process.transition[3, a, t] * (process.reward[3, a, t] + 0.9 * v[t]) for t in range(12)) for a in range(3)]
    np.testing.assert_allclose(max(q), v[3], atol=1e-4)


def test_exact_answers_vmap():
    def values(key):
        return mdp.value_iteration(tabular.garnet(key), 0.9)

    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_allclose(jax.jit(jax.vmap(values))(keys)[1], jax.jit(values)(keys[1]), atol=1e-4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mdp.make(jnp.ones((2, 1, 3)), jnp.ones((2, 1))), r"transition must be \[states, actions, states\]"),
        (lambda: mdp.make(jnp.ones((2, 1, 2)), jnp.ones((2, 1))), "must be a distribution over next states"),
        (lambda: mdp.make(jnp.ones((1, 1, 1)), jnp.ones((2, 1))), r"reward must have shape \(1, 1, 1\)"),
        (lambda: tabular.gridworld(["S.", "G"]), "one length"),
        (lambda: tabular.gridworld(["..", ".G"]), "needs a start"),
        (lambda: tabular.garnet(jax.random.key(0), 10**6), "num_states must be between 1 and 10000"),
        (lambda: tabular.garnet(jax.random.key(0), 3, 10**6), "num_actions must be between 1 and 10000"),
        (lambda: tabular.random_walk(10**12), "num_states must be between 1 and 10000"),
        (lambda: tabular.random_walk(0), "num_states must be an integer of at least 1; got 0"),
        (lambda: tabular.garnet(jax.random.key(0), 3, 2, 4), "branching must be between 1 and num_states = 3; got 4"),
    ],
)
def test_wrong_processes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Environments of them


def test_a_process_as_an_environment_follows_its_probabilities():
    process = tabular.frozen_lake()
    env = envs.strict(tabular.environment(process, "lake", time_limit=5))
    keys = jax.random.split(jax.random.key(0), 4000)
    _, (to, _), reward, terminated, truncated = jax.vmap(
        lambda k: env.step(k, (jnp.int32(14), jnp.int32(4)), jnp.int32(2))
    )(keys)
    share = np.bincount(np.asarray(to), minlength=16) / 4000
    np.testing.assert_allclose(share, process.transition[14, 2], atol=0.03)
    np.testing.assert_array_equal(reward, to == 15)
    np.testing.assert_array_equal(terminated, to == 15)
    assert truncated.all()


def test_illegal_actions_are_masked_and_names_are_known():
    spec = observation_spec(tabular.environment(tabular.maximization_bias(), one_hot=True))
    assert spec.obs.shape == (3,) and spec.mask.shape == (10,)
    env = envs.make("CliffWalking")
    assert env.action_space.n == 4 and observation_spec(env).shape == (48,)
    assert {"FrozenLake", "RandomWalk", "Garnet"} <= set(envs.names())


# Updates by hand

X = jnp.eye(3)


def stream_of(states, rewards, discounts, continues=None):
    s = jnp.array(states)
    continues = jnp.ones(len(rewards)) if continues is None else jnp.array(continues, jnp.float32)
    return td.Stream(X[s[:-1]], jnp.array(rewards, jnp.float32), jnp.array(discounts, jnp.float32), X[s[1:]], continues)


W = jnp.array([1.0, 2.0, 4.0])
TWO = stream_of([0, 1, 2], [3.0, 5.0], [0.5, 0.5])


def test_td_by_hand():
    # s0: 1 + 0.1 (3 + 0.5 * 2 - 1) = 1.3;  s1: 2 + 0.1 (5 + 0.5 * 4 - 2) = 2.5
    w, path = td.td(W, TWO, 0.1)
    np.testing.assert_allclose(w, [1.3, 2.5, 4], rtol=1e-6)
    np.testing.assert_allclose(path[0], [1.3, 2, 4], rtol=1e-6)


def test_n_step_by_hand():
    # s0: target 3 + 0.5 (5 + 0.5 * 4) = 6.5; the stream ends, so s1's target is 5 + 0.5 * 4 = 7
    w, _ = td.n_step_td(W, TWO, 0.1, 2)
    np.testing.assert_allclose(w, [1.55, 2.5, 4], rtol=1e-6)


def test_td_lambda_by_hand():
    # e after s0: (1, 0), delta 3; then (0.5 * 0.8, 1), delta 5 + 0.5 * 4 - 2 = 5
    w, _ = td.td_lambda(W, TWO, 0.1, 0.8)
    np.testing.assert_allclose(w, [1.3 + 0.1 * 5 * 0.4, 2 + 0.1 * 5, 4], rtol=1e-6)


@pytest.mark.parametrize("trace", ["accumulating", "replacing", "dutch"])
def test_traces_differ_where_a_state_comes_back(trace):
    # s0 -> s0 -> s1, lambda 1, gamma 0.5, alpha 0.1: at the second step the trace of s0 is 1.5, 1, or 0.5 + 1 - 0.1 * 0.5.
    again = stream_of([0, 0, 1], [1.0, 1.0], [0.5, 0.5])
    w, path = td.td_lambda(jnp.zeros(3), again, 0.1, 1.0, trace)
    assert path[0][0] == pytest.approx(0.1)
    delta = 1 + 0.5 * 0 - 0.1
    if trace == "dutch":  # the last value of s0, before the step, was 0: v - v_old = 0.1
        wanted = 0.1 + 0.1 * (delta + 0.1) * 1.45 - 0.1 * 0.1
    else:
        wanted = 0.1 + 0.1 * delta * {"accumulating": 1.5, "replacing": 1.0}[trace]
    np.testing.assert_allclose(w[0], wanted, rtol=1e-5)


def test_gradient_td_by_hand():
    x, x_next = jnp.array([1.0, 2.0]), jnp.array([0.5, 1.0])
    once = td.Stream(x[None], jnp.array([1.0]), jnp.array([0.9]), x_next[None], jnp.ones(1))
    two = jax.tree.map(lambda a: jnp.concatenate([a, a]), once)
    w = jnp.array([0.2, 0.1])
    delta = 1 + 0.9 * (0.1 + 0.1) - 0.4
    u = 0.5 * 2 * delta * x  # after the first step, rho = 2
    for method, first, second in (
        ("semi", delta * x, None),
        ("tdc", delta * x, lambda d: d * x - 0.9 * x_next * (x @ u)),
        ("gtd2", 0 * x, lambda d: (x - 0.9 * x_next) * (x @ u)),
    ):
        end, path = td.gradient_td(w, two, 0.1, 0.5, jnp.array([2.0, 2.0]), method)
        np.testing.assert_allclose(path[0], w + 0.1 * 2 * first, rtol=1e-5)
        if second is not None:
            d = 1 + 0.9 * path[0] @ x_next - path[0] @ x
            np.testing.assert_allclose(end, path[0] + 0.1 * 2 * second(d), rtol=1e-4)


# Views that agree


@pytest.mark.parametrize("seed", range(4))
def test_n_step_transitions_are_n_step_returns(seed):
    s = random_stream(jax.random.key(seed))
    v = jnp.sin(jnp.arange(30.0))
    for n in (1, 2, 3, 7, 30, 50):
        reward, discount, last = returns.n_step_transitions(s.r_t, s.discount_t, s.continue_t, n)
        wanted = returns.n_step_returns(s.r_t, s.discount_t, v, s.continue_t, n)
        np.testing.assert_allclose(reward + discount * v[last], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_forward_and_backward_views_agree(seed):
    """Offline, the lambda-return's updates and the traces' sum to the same, exactly (section 12.2)."""
    s = random_stream(jax.random.key(seed))
    w = jax.random.normal(jax.random.key(9), (4,))
    v, v_next = s.x_tm1 @ w, s.x_t @ w
    forward = (returns.lambda_returns(s.r_t, s.discount_t, v_next, s.continue_t, 0.7) - v) @ s.x_tm1
    delta, e, backward = returns.td_error(v, s.r_t, s.discount_t, v_next), jnp.zeros(4), jnp.zeros(4)
    for t in range(30):
        e = e + s.x_tm1[t]
        backward = backward + delta[t] * e
        e = e * s.discount_t[t] * 0.7 * s.continue_t[t]
    np.testing.assert_allclose(forward, backward, rtol=1e-4, atol=1e-4)
    # A small step makes the online method the same to first order.
    online = (td.td_lambda(w, s, 1e-4, 0.7)[0] - w) / 1e-4
    np.testing.assert_allclose(online, backward, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_true_online_td_is_the_online_lambda_return(seed):
    """Its weights after each step are those of the forward view computed anew with all data so far (section 12.5)."""
    s = jax.tree.map(lambda x: x[:8], random_stream(jax.random.key(seed)))
    s = s._replace(continue_t=jnp.ones(8), discount_t=jnp.full(8, 0.9))
    w0, alpha, lam = jnp.array([0.3, -0.2, 0.1, 0.5]), 0.05, 0.8
    kept = [w0]  # the weights of each horizon's end, w_h^h
    for h in range(1, 9):
        w = w0
        for t in range(h):
            # The interim lambda-return: values of x_{k+1} with the weights of time k, as (12.10) has them.
            g, weight, total, product = 0.0, 1.0, 0.0, 1.0
            for k in range(t, h):
                total = total + product * s.r_t[k]
                product = product * 0.9
                reached = total + product * (kept[k] @ s.x_t[k])
                g = g + (weight * (1 - lam) if k < h - 1 else weight) * reached
                weight = weight * lam
            w = w + alpha * (g - w @ s.x_tm1[t]) * s.x_tm1[t]
        kept.append(w)
    _, path = td.td_lambda(w0, s, alpha, lam, "dutch")
    np.testing.assert_allclose(path, jnp.stack(kept[1:]), rtol=1e-4, atol=1e-5)


def test_lambda_0_is_td_and_lambda_1_is_monte_carlo():
    s = random_stream(jax.random.key(0))
    w = jnp.zeros(4)
    for trace in ("accumulating", "dutch"):
        np.testing.assert_allclose(td.td_lambda(w, s, 0.1, 0.0, trace)[1], td.td(w, s, 0.1)[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(td.n_step_td(w, s, 0.1, 1)[1], td.td(w, s, 0.1)[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(td.monte_carlo(w, s, 0.1)[0], td.lambda_return(w, s, 0.1, 1.0), rtol=0.5, atol=1)
    episode = stream_of([0, 1, 2], [1.0, 2.0], [0.9, 0.0], [1, 0])
    np.testing.assert_allclose(td.monte_carlo(W, episode, 0.1)[0], td.lambda_return(W, episode, 0.1, 1.0), rtol=1e-6)


# Convergence


@pytest.mark.parametrize(
    "method",
    [
        lambda w, s, a: td.td(w, s, a)[0],
        lambda w, s, a: td.n_step_td(w, s, a, 3)[0],
        lambda w, s, a: td.monte_carlo(w, s, a)[0],
        lambda w, s, a: td.td_lambda(w, s, a, 0.8)[0],
        lambda w, s, a: td.td_lambda(w, s, a, 0.8, "replacing")[0],
        lambda w, s, a: td.td_lambda(w, s, a, 0.8, "dutch")[0],
        lambda w, s, a: td.gradient_td(w, s, a, 0.02, jnp.ones(len(s.r_t)))[0],
        lambda w, s, a: td.gradient_td(w, s, a, 0.2, jnp.ones(len(s.r_t)), "gtd2")[0],
    ],
    ids=["td", "n-step", "mc", "accumulating", "replacing", "dutch", "tdc", "gtd2"],
)
def test_prediction_converges_to_the_exact_values(method):
    exact = mdp.evaluate_policy(WALK, mdp.uniform_policy(WALK), 0.9)
    streams = jax.vmap(lambda k: walk(k, WALK, 3000))(jax.random.split(jax.random.key(0), 16))

    def learn(s):  # steps that shrink, as convergence wants
        w = jnp.zeros(7)
        for alpha in (0.1, 0.02):
            w = method(w, s, alpha)
        return w

    w = jax.jit(jax.vmap(learn))(streams)
    np.testing.assert_allclose(w.mean(0)[1:-1], exact[1:-1], atol=0.03)


def test_baird_s_counterexample_diverges_and_is_cured():
    """Off-policy semi-gradient TD diverges where TDC and GTD2 do not, from the same data (figures 11.2 and 11.5)."""
    _, features, behaviour, target = tabular.baird()
    key_states, key_actions = jax.random.split(jax.random.key(0))
    steps = 3000
    actions = jax.random.categorical(key_actions, jnp.log(behaviour[0]), shape=(steps,))
    upper = jax.random.randint(key_states, (steps,), 0, 6)
    reached = jnp.where(actions == 1, 6, upper)
    left = jnp.concatenate([jnp.array([0]), reached[:-1]])
    s = td.Stream(features[left], jnp.zeros(steps), jnp.full(steps, 0.99), features[reached], jnp.ones(steps))
    rho = target[left, actions] / behaviour[left, actions]
    w = jnp.array([1.0, 1, 1, 1, 1, 1, 10, 1])

    def error(w):
        return float(jnp.sqrt(jnp.mean((features @ w) ** 2)))

    semi, _ = td.gradient_td(w, s, 0.01, 0.05, rho, "semi")
    assert not error(semi) < 100 * error(w)
    for method in ("tdc", "gtd2"):
        slow = jax.tree.map(lambda a: jnp.concatenate([a] * 10), s)
        end, _ = td.gradient_td(w, slow, 0.005, 0.05, jnp.concatenate([rho] * 10), method)
        assert error(end) < 0.5 * error(w) and jnp.isfinite(end).all(), method


LAKE = tabular.gridworld(["S..", ".#.", "..G"], step_reward=-1.0, rewards={"G": 0.0})


@pytest.mark.thorough(3)
@pytest.mark.parametrize("method", list(td.METHODS))
def test_control_finds_the_optimal_values_along_its_path(method):
    env = envs.strict(tabular.environment(LAKE, "grid", time_limit=200, one_hot=True))
    algo = td.make(env, td.Config(method), td.Hyper(gamma=1.0, learning_rate=0.2, epsilon=0.1, trace_decay=0.5))
    states, metrics = jax.jit(jax.vmap(run.train_fn(algo, 4000)))(jax.random.split(jax.random.key(0), 4))
    best = mdp.value_iteration(LAKE, 1.0)
    assert best[0] == -3
    returns_ = jax.vmap(lambda s: run.evaluate(algo, s, jax.random.key(1), 4).returns.mean())(states)
    np.testing.assert_allclose(returns_, -3)
    if method in ("q_learning", "watkins_q", "double_q"):  # off-policy: the optimal values themselves
        q = states.q.mean(1) if method == "double_q" else states.q
        np.testing.assert_allclose(q.max(1)[:, 0], -3, atol=0.2)
    assert np.nanmean(metrics["episode_return"][:, -10:]) > -6


@pytest.mark.slow
def test_sarsa_learns_its_own_policy_s_values_and_q_learning_the_best_ones():
    """SARSA and expected SARSA converge to the values of the epsilon-greedy policy, by linear solve."""
    process = tabular.cliff()
    env = envs.strict(tabular.environment(process, "cliff", one_hot=True, time_limit=500))

    def learned(method):
        algo = td.make(env, td.Config(method, num_steps=1000), td.Hyper(gamma=1.0, learning_rate=0.5, epsilon=0.1))
        states, metrics = jax.jit(jax.vmap(run.train_fn(algo, 40_000)))(jax.random.split(jax.random.key(0), 8))
        return states.q.mean(0), float(np.nanmean(metrics["episode_return"][:, -30:]))

    q, online = learned("q_learning")
    np.testing.assert_allclose(q.max(0)[36], -13, atol=0.1)
    q, safe = learned("expected_sarsa")
    policy = jax.vmap(lambda q, legal: td.epsilon_greedy(q, 0.1, legal))(q.T, process.legal)
    v = mdp.evaluate_policy(process, policy, 1.0)
    np.testing.assert_allclose(td.expected(q.T[36], policy[36]), v[36], rtol=0.1)
    assert online < safe - 10  # near the edge, exploring costs


@pytest.mark.slow
def test_maximization_bias():
    """Example 6.7: Q-learning is drawn to the left, where every action loses on average; double Q-learning is not."""
    env = envs.strict(tabular.environment(tabular.maximization_bias(), "bias", one_hot=True))

    def left(method):
        algo = td.make(env, td.Config(method, num_steps=10), td.Hyper(gamma=1.0, learning_rate=0.1))
        # A step to the right ends an episode after 1 step, to the left after 2: the share of left is length - 1.
        _, metrics = jax.jit(jax.vmap(run.train_fn(algo, 200)))(jax.random.split(jax.random.key(0), 500))
        return float(np.nanmean(metrics["episode_length"][:, 5:15]) - 1)

    assert left("q_learning") > 0.35 and left("double_q") < left("q_learning") - 0.1


# One step of each control method by hand

T = td.Transition(
    x_tm1=jnp.array([1.0, 0.0]),
    a_tm1=jnp.array([1.0, 0.0]),
    r_t=jnp.float32(2.0),
    discount_t=jnp.float32(0.5),
    x_t=jnp.array([0.0, 1.0]),
    a_t=jnp.array([1.0, 0.0]),
    legal_t=jnp.ones(2, bool),
    ended=jnp.bool_(False),
)
Q = jnp.array([[1.0, 3.0], [0.0, 5.0]])  # [actions, states]: q(s1) = (3, 5)
H = td.Hyper(learning_rate=0.1, gamma=0.5, epsilon=0.2, trace_decay=0.8)


@pytest.mark.parametrize(
    "method, target",
    [
        ("sarsa", 3.0),
        ("expected_sarsa", 0.1 * 3 + 0.9 * 5),
        ("q_learning", 5.0),
        ("sarsa_lambda", 3.0),
        ("watkins_q", 5.0),
    ],
)
def test_one_step_by_hand(method, target):
    learn, start = td.METHODS[method]
    config = td.Config(method)
    q, memory, delta = learn(config, H, Q, start(config, 2, 2), T, jax.random.key(0))
    np.testing.assert_allclose(delta, 2 + 0.5 * target - 1, rtol=1e-6)
    np.testing.assert_allclose(q, [[1 + 0.1 * delta, 3], [0, 5]], rtol=1e-6)
    if method == "sarsa_lambda":
        np.testing.assert_allclose(memory, [[0.4, 0], [0, 0]], rtol=1e-6)
    if method == "watkins_q":  # the next action is not the greedy one: the trace ends
        np.testing.assert_allclose(memory, 0)


def test_double_q_by_hand():
    learn, start = td.METHODS["double_q"]
    config = td.Config("double_q")
    other = jnp.array([[4.0, 7.0], [0.0, 6.0]])
    for seed in range(8):
        q, _, delta = learn(config, H, jnp.stack([Q, other]), start(config, 2, 2), T, jax.random.key(seed))
        if (q[1] == other).all():  # the first moved: its best action in s1 is 1, which the other values at 6
            np.testing.assert_allclose(delta, 2 + 0.5 * 6 - 1, rtol=1e-6)
        else:  # the second moved: its best is 0, which the first values at 3
            np.testing.assert_allclose(delta, 2 + 0.5 * 3 - 4, rtol=1e-6)
            assert (q[0] == Q).all()


def test_tree_backup_by_hand():
    """Two steps from s0 by action 0 to s1 by action 1 (greedy) back to s0; epsilon 0.2."""
    learn, start = td.METHODS["tree_backup"]
    config = td.Config("tree_backup", n=2)
    memory = start(config, 2, 2)
    q, memory, _ = learn(config, H, Q, memory, T._replace(a_t=jnp.array([0.0, 1.0])), jax.random.key(0))
    np.testing.assert_array_equal(q, Q)  # nothing is due before two steps are there
    second = td.Transition(
        T.x_t, jnp.array([0.0, 1.0]), jnp.float32(1.0), jnp.float32(0.5), T.x_tm1, T.a_t, T.legal_t, T.ended
    )
    q, _, delta = learn(config, H, q, memory, second, jax.random.key(0))
    g1 = 1 + 0.5 * (0.9 * 1 + 0.1 * 0)
    g0 = 2 + 0.5 * (0.1 * 3 + 0.9 * g1)
    np.testing.assert_allclose(delta, g0 - 1, rtol=1e-6)
    np.testing.assert_allclose(q, [[1 + 0.1 * (g0 - 1), 3], [0, 5]], rtol=1e-6)


# As an algorithm


@pytest.mark.parametrize("method", ["q_learning", "sarsa", "expected_sarsa"])
def test_truncation_bootstraps(method):
    """Reward 1 a step, truncated at 20, never terminated: the value is 1 / (1 - gamma), not that of 20 steps."""

    def step(key, t, action):
        return (jnp.ones(1), t + 1, 1.0, False, t + 1 >= 20)

    env = envs.strict(envs.Environment("Forever", lambda key: (jnp.ones(1), jnp.int32(0)), step, envs.Discrete(1), 20))
    algo = td.make(env, td.Config(method, num_steps=1000), td.Hyper(gamma=0.99, learning_rate=0.5))
    state, _ = jax.jit(run.train_fn(algo, 20_000))(jax.random.key(0))
    np.testing.assert_allclose(state.q[0, 0], 100, rtol=0.01)


@pytest.mark.slow
def test_it_runs_in_the_loop_and_sweeps(tmp_path):
    algo = td.make(envs.make("CliffWalking"), td.Config("sarsa_lambda"))
    grid = run.sweep.grid(algo.hyper, {"learning_rate": [0.1, 0.3], "trace_decay": [0.0, 0.9]})
    kwargs = {"num_seeds": 2, "hypers": grid, "eval_episodes": 2, "progress": False}
    whole = run.train(algo, jax.random.key(0), 1000, run_dir=tmp_path / "a", **kwargs)
    run.train(algo, jax.random.key(0), 500, run_dir=tmp_path / "b", **kwargs)
    parts = run.train(algo, jax.random.key(0), 1000, run_dir=tmp_path / "b", resume=True, **kwargs)
    np.testing.assert_array_equal(whole.state.q, parts.state.q)
    assert whole.state.q.shape == (4, 2, 4, 48)


def test_keys_are_not_reused():
    algo = td.make(envs.make("CliffWalking"), td.Config("double_q", num_steps=2))
    with jax.debug_key_reuse(True):
        jax.jit(algo.update)(jax.jit(algo.init)(jax.random.key(0)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: td.Config("q-learning"), "config.method must be one of sarsa, expected_sarsa"),
        (lambda: td.Config(trace="dutch"), "config.trace must be one of accumulating, replacing"),
        (lambda: td.make(envs.make("Pendulum-v1")), "td needs discrete actions; Pendulum-v1"),
        (lambda: td.make(envs.make("Catch-bsuite")), "td needs an observation vector; Catch-bsuite"),
        (
            lambda: td.make(envs.make("CliffWalking"), td.Config(), td.Hyper(epsilon=2.0)),
            "hyper.epsilon must be between 0 and 1",
        ),
        (lambda: td.td_lambda(W, TWO, 0.1, 0.5, "dutsch"), "trace must be one of accumulating, replacing, dutch"),
    ],
)
def test_wrong_words_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_what_is_legal_nowhere_and_nearly_undiscounted_is_exact():
    legal = jnp.array([[True, True], [False, False]])
    to_end = jnp.zeros((2, 2, 2)).at[:, 0, 1].set(1).at[0, 1, 0].set(1).at[1, 1, 1].set(1)
    process = mdp.make(to_end, jnp.ones((2, 2)), jnp.array([False, True]), jnp.array([1.0, 0.0]), legal)
    np.testing.assert_allclose(mdp.value_iteration(process, 0.9), [10, 0], rtol=1e-5)
    np.testing.assert_allclose(mdp.policy_iteration(process, 0.9)[1], [10, 0], rtol=1e-5)
    assert np.isfinite(mdp.uniform_policy(process)).all()
    for method in ("q_learning", "expected_sarsa", "watkins_q", "tree_backup"):
        algo = td.make(envs.strict(tabular.environment(process)), td.Config(method, num_steps=50))
        state, _ = jax.jit(algo.update)(algo.init(jax.random.key(0)))
        assert np.isfinite(state.q).all(), method
    forever = mdp.make(jnp.ones((1, 1, 1)), jnp.ones((1, 1)))
    np.testing.assert_allclose(mdp.value_iteration(forever, 0.9999), [10_000], rtol=1e-3)


def test_slips_into_a_teleport_count_with_their_probability():
    grid = tabular.gridworld(["....", "SCCG"], step_reward=-1.0, rewards={"C": -100.0}, teleport={"C": "S"}, slip=0.1)
    expected = jnp.sum(grid.transition * grid.reward, axis=-1)
    start = 4
    np.testing.assert_allclose(expected[start, 1], 0.9 * -1 + 0.1 * -100, rtol=1e-5)  # down: a slip goes right
    np.testing.assert_allclose(expected[start, 2], 0.8 * -100 + 0.2 * -1, rtol=1e-5)


def test_a_walled_in_cell_spoils_no_answer():
    grid = tabular.gridworld(["##S", "##G"], step_reward=-1.0, terminals="G")
    values = mdp.value_iteration(grid, 1.0)
    np.testing.assert_allclose(mdp.policy_iteration(grid, 0.99)[1], values, atol=1e-4)
    assert values[2] == -1 and np.isfinite(mdp.evaluate_policy(grid, mdp.uniform_policy(grid), 1.0)).all()


@pytest.mark.parametrize(
    "bad, why",
    [
        ({"start": [0.2, 0.2]}, "start must be a distribution"),
        ({"start": [-1.0, 2.0]}, "start must be a distribution"),
        ({"reward": [[jnp.nan], [0.0]]}, "reward must be finite"),
        ({"reward_std": -1.0}, "reward_std must be at least 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(bad, why):
    with pytest.raises(ValueError, match=why):
        mdp.make(**({"transition": jnp.full((2, 1, 2), 0.5), "reward": jnp.zeros((2, 1))} | bad))


# Precision


def rounded_products(function, *args):
    """How many products of matrices a GPU or a TPU would round."""
    precisions = [
        eqn.params["precision"]
        for eqn, _ in jaxprs.equations(jaxprs.of(function, *args))
        if "dot" in eqn.primitive.name
    ]
    return len(precisions), sum(p != (jax.lax.Precision.HIGHEST,) * 2 for p in precisions)


def test_exact_answers_and_tabular_values_are_products_in_float32():
    process = tabular.random_walk(5)
    policy, features = mdp.uniform_policy(process), jnp.ones((7, 2))
    algo = td.make(envs.make("RandomWalk", num_states=5), td.Config(method="q_learning"))
    state = algo.init(jax.random.key(0))
    stream = random_stream(jax.random.key(0))
    cases = [
        (mdp.evaluate_policy, process, policy, 0.9),
        (mdp.value_iteration, process, 0.9),
        (lambda p, f: mdp.td_fixed_point(p, policy, 0.9, f, jnp.ones(7)), process, features),
        (algo.update, state),
        (lambda s: td.td(jnp.zeros(4), s, 0.1), stream),
        (lambda s: td.lambda_return(jnp.zeros(4), s, 0.1, 0.5), stream),
    ]
    for function, *args in cases:
        products, rounded = rounded_products(function, *args)
        assert products and not rounded
    entropy = distributions.tanh_normal(2).entropy
    params = distributions.NormalParams(jnp.ones((3, 2)), jnp.zeros((3, 2)))
    assert rounded_products(entropy, params)[0] == 0


@pytest.mark.slow
def test_shaping_by_the_exact_values_teaches_at_once():
    """Every step tells then whether it was a best one: a sweep over the states is enough where a reward would have to travel back."""
    env, process = envs.make("KeyAndDoor"), tabular.key_and_door()
    v = mdp.value_iteration(process, 0.99)

    def solved(easier, updates):
        algo = td.make(easier, td.Config(num_steps=100), td.Hyper(gamma=0.99, epsilon=0.1))._replace(env=env)

        def score(key):
            state, _ = run.train_fn(algo, 100 * updates)(key)
            return run.evaluate(algo, state, jax.random.key(9), 1).returns.mean()

        return int((jax.jit(jax.vmap(score))(jax.random.split(jax.random.key(0), 8)) > 0.95).sum())

    assert solved(wrappers.shaped(env, lambda obs: obs @ v, 0.99), 20) == 8
    assert solved(env, 80) == 0
