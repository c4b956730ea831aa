"""Proximal policy optimization, PPO-Clip (Schulman et al. 2017, https://arxiv.org/abs/1707.06347), on CartPole-v1.

One update acts for T steps in B environments, estimates how much better each action was than the policy's average, and then takes
several epochs of minibatch steps on a surrogate loss that is trusted only near the policy that acted.

    advantage  A_t = delta_t + gamma lambda A_{t+1},  delta_t = r_t + gamma V(x_{t+1}) - V(x_t)     GAE, 1506.02438, eq. 16
    policy     L_clip = E[ min(r A, clip(r, 1 - eps, 1 + eps) A) ],  r = pi(a|x) / pi_old(a|x)      eq. 7
    total      L = -L_clip + c_1 E[ (V(x) - V_target)^2 / 2 ] - c_2 E[ entropy of pi ],  V_target = A + V_old    eq. 9

An episode ends in one of two ways. Where it *terminated* nothing follows, so V(x_{t+1}) counts as 0. Where it was *truncated* by the
time limit the pole still stands, so V(x_{t+1}) counts in full; x_{t+1} is then the last observation of the old episode, not the first
of the next one. The sum over later deltas stops in both cases.

From the paper's code rather than its text: orthogonal initialization, advantages standardized in each minibatch, gradients clipped by
their global norm, a learning rate that falls linearly to 0, and Adam's epsilon of 1e-5.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jrl import envs
from jrl.equations import losses, returns

NUM_SEEDS, NUM_UPDATES = 8, 400
NUM_ENVS = 4  # B: environments that each seed steps in parallel
NUM_STEPS = 128  # T: steps in each environment per update
NUM_EPOCHS = 4  # passes over the samples of an update
NUM_MINIBATCHES = 4  # gradient steps per pass
LEARNING_RATE, MAX_GRAD_NORM = 1e-3, 0.5
GAMMA, LAMBDA, CLIP_EPS = 0.99, 0.95, 0.2
VALUE_WEIGHT, ENTROPY_WEIGHT = 0.5, 0.01  # c_1, c_2

# reset(key) -> (obs, state);  step(key, state, action) -> (obs, state, reward, terminated, truncated), without a reset
ENV = envs.make("CartPole-v1")
OBS_SIZE, NUM_ACTIONS, WIDTH = 4, 2, 64

Array = jax.Array

# Networks: two multilayer perceptrons, one for the policy and one for the value. A layer is a pair of weights and biases.


def init_mlp(key: Array, num_outputs: int, last_scale: float) -> list[tuple[Array, Array]]:
    shapes, scales = [(OBS_SIZE, WIDTH), (WIDTH, WIDTH), (WIDTH, num_outputs)], [2**0.5, 2**0.5, last_scale]
    weights = [jax.nn.initializers.orthogonal(x) for x in scales]
    keys = jax.random.split(key, 3)
    return [(w(k, shape), jnp.zeros(shape[1])) for w, k, shape in zip(weights, keys, shapes, strict=True)]


def mlp(layers: list[tuple[Array, Array]], x: Array) -> Array:
    for w, b in layers[:-1]:
        x = jnp.tanh(x @ w + b)
    w, b = layers[-1]
    return x @ w + b


def init_params(key: Array) -> Any:
    key_policy, key_value = jax.random.split(key)
    # The policy is nearly uniform at the start.
    return {"policy": init_mlp(key_policy, NUM_ACTIONS, 0.01), "value": init_mlp(key_value, 1, 1.0)}


def log_policy(params: Any, obs: Array) -> Array:
    """``log pi(. | x)`` of every action, ``[..., NUM_ACTIONS]``."""
    return jax.nn.log_softmax(mlp(params["policy"], obs))


def value(params: Any, obs: Array) -> Array:
    """``V(x)``, ``[...]``."""
    return mlp(params["value"], obs)[..., 0]


def of_action(x: Array, action: Array) -> Array:
    """The entry of ``x [..., NUM_ACTIONS]`` that belongs to ``action [...]``."""
    return jnp.take_along_axis(x, action[..., None], axis=-1)[..., 0]


class State(NamedTuple):
    """The whole run."""

    params: Any
    opt_state: Any
    env_state: Any  # of B environments
    obs: Array  # [B, OBS_SIZE]
    episode_return: Array  # [B], so far
    key: Array
    updates: Array


def optimizer(updates: Array | int) -> optax.GradientTransformation:
    learning_rate = LEARNING_RATE * (1 - updates / NUM_UPDATES)
    return optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adam(learning_rate, eps=1e-5))


def init(key: Array) -> State:
    key_params, key_envs, key_run = jax.random.split(key, 3)
    params = init_params(key_params)
    obs, env_state = jax.vmap(ENV.reset)(jax.random.split(key_envs, NUM_ENVS))
    return State(params, optimizer(0).init(params), env_state, obs, jnp.zeros(NUM_ENVS), key_run, jnp.int32(0))


class Step(NamedTuple):
    """One step of every environment, ``[B, ...]``; of a whole rollout, ``[T, B, ...]``."""

    obs: Array
    action: Array
    log_prob: Array  # of the action, by the policy that acted
    reward: Array
    terminated: Array
    truncated: Array
    next_obs: Array  # the observation that followed, before any reset


def rollout(state: State, key_actions: Array, key_envs: Array) -> tuple[State, Step, dict[str, Array]]:
    """T steps in every environment; and, of the episodes that ended, the sum of their returns and their number."""
    # What is random is drawn before the loop: that is much faster than drawing it step by step.
    noise = jax.random.gumbel(key_actions, (NUM_STEPS, NUM_ENVS, NUM_ACTIONS))
    step_keys, reset_keys = jax.random.split(key_envs, (2, NUM_STEPS, NUM_ENVS))
    resets = jax.vmap(jax.vmap(ENV.reset))(reset_keys)

    def step(state: State, x: Any) -> tuple[State, tuple[Step, Array, Array]]:
        noise, keys, reset = x
        log_pi = log_policy(state.params, state.obs)
        action = jnp.argmax(log_pi + noise, axis=-1)  # with Gumbel noise, the argmax is a sample of pi
        next_obs, env_state, reward, terminated, truncated = jax.vmap(ENV.step)(keys, state.env_state, action)
        done = Step(state.obs, action, of_action(log_pi, action), reward, terminated, truncated, next_obs)
        ended, total = terminated | truncated, state.episode_return + reward
        where = jax.vmap(jnp.where)
        obs, env_state = jax.tree.map(lambda x, y: where(ended, x, y), reset, (next_obs, env_state))
        state = state._replace(env_state=env_state, obs=obs, episode_return=jnp.where(ended, 0.0, total))
        return state, (done, jnp.where(ended, total, 0.0), ended)

    state, (steps, totals, ended) = jax.lax.scan(step, state, (noise, step_keys, resets))
    return state, steps, {"return_sum": totals.sum(), "episodes": ended.sum()}


def advantages(params: Any, steps: Step) -> tuple[Array, Array]:
    """Advantages and value targets, ``[T, B]``."""
    v_tm1, v_t = value(params, steps.obs), value(params, steps.next_obs)
    discount_t = GAMMA * (1 - steps.terminated)  # a truncated episode keeps the value of its last observation
    continue_t = 1.0 - (steps.terminated | steps.truncated)  # and no episode takes anything from the next one
    gae = jax.vmap(returns.gae, in_axes=(1, 1, 1, 1, 1, None), out_axes=1)
    advantage = gae(v_tm1, steps.reward, discount_t, v_t, continue_t, LAMBDA)
    return advantage, advantage + v_tm1


def loss(params: Any, steps: Step, advantage: Array, target: Array) -> Array:
    """Equation 9 on one minibatch."""
    log_pi = log_policy(params, steps.obs)
    log_ratio = of_action(log_pi, steps.action) - steps.log_prob
    policy_loss = losses.ppo_clip(log_ratio, losses.standardize(advantage), CLIP_EPS)
    value_loss = losses.value_loss(value(params, steps.obs), target)
    entropy = -jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1)
    return policy_loss.mean() + VALUE_WEIGHT * value_loss.mean() - ENTROPY_WEIGHT * entropy.mean()


def update(state: State, _: None = None) -> tuple[State, dict[str, Array]]:
    """Act, estimate advantages, and take epochs of minibatch steps."""
    key, key_actions, key_envs, key_learn = jax.random.split(state.key, 4)
    state, steps, metrics = rollout(state, key_actions, key_envs)
    samples = (steps, *advantages(state.params, steps))
    samples = jax.tree.map(lambda x: x.reshape(NUM_STEPS * NUM_ENVS, *x.shape[2:]), samples)
    bits = jax.vmap(lambda k: jax.random.bits(k, (NUM_STEPS * NUM_ENVS,)))(jax.random.split(key_learn, NUM_EPOCHS))
    order = jnp.argsort(bits).reshape(NUM_EPOCHS * NUM_MINIBATCHES, -1)  # sorting random bits shuffles
    tx = optimizer(state.updates)

    def minibatch(carry: Any, rows: Array) -> tuple[Any, Array]:
        params, opt_state = carry
        error, grads = jax.value_and_grad(loss)(params, *jax.tree.map(lambda x: x[rows], samples))
        change, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, change), opt_state), error

    (params, opt_state), errors = jax.lax.scan(minibatch, (state.params, state.opt_state), order)
    state = state._replace(params=params, opt_state=opt_state, key=key, updates=state.updates + 1)
    return state, metrics | {"loss": errors.mean()}


def train(key: Array) -> tuple[State, dict[str, Array]]:
    """A whole run: its last state, and the metrics of each update."""
    return jax.lax.scan(update, init(key), length=NUM_UPDATES)


def main() -> None:
    begin = time.perf_counter()
    keys = jax.random.split(jax.random.key(0), NUM_SEEDS)
    _, metrics = jax.block_until_ready(jax.jit(jax.vmap(train))(keys))  # all seeds in one program
    print(f"PPO on CartPole-v1, {NUM_SEEDS} seeds: {time.perf_counter() - begin:.0f} s, compilation included")
    print("     steps  mean return  worst seed  best seed")
    total, count = (metrics[name].reshape(NUM_SEEDS, 10, -1).sum(-1) for name in ("return_sum", "episodes"))
    for tenth, score in enumerate((total / count).T, start=1):  # of the episodes that ended in each tenth of the run
        steps = tenth * NUM_UPDATES * NUM_STEPS * NUM_ENVS // 10
        print(f"{steps:10,} {score.mean():12.1f} {score.min():11.1f} {score.max():10.1f}")


if __name__ == "__main__":
    main()
