"""Deep Q-networks (Mnih et al. 2015, https://doi.org/10.1038/nature14236), on CartPole-v1.

Q(x, a) is the expected discounted return after action a in state x. Acting is epsilon-greedy: the action of the largest Q, or with
probability epsilon any action. Transitions go to a replay, a ring that keeps the latest ones. Learning draws a minibatch of them and
takes a gradient step towards what Q should be one step later:

    target   y = r + gamma max_a Q'(x', a)         or y = r alone where the episode terminated
    loss     L = E[ (y - Q(x, a))^2 / 2 ]          the mean over the minibatch

Two things keep this stable. The replay mixes transitions of different times, so that samples are nearly independent. The target network
Q' is an older copy of Q, renewed only once in a while, so that the target does not move with every step.

A time limit that runs out *truncates* an episode without ending it: only termination sets the value of what follows to 0, and x' is
the last observation of the old episode, not the first of the next one.

What differs from the paper: several environments step in parallel; Adam replaces RMSProp, with a learning rate that falls linearly to 0;
the error is not clipped, but the gradient is, by its global norm.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jrl import envs
from jrl.equations import losses

NUM_SEEDS, NUM_UPDATES = 4, 20_000  # an update is a step in every environment and one gradient step
NUM_ENVS = 8  # B: environments that each seed steps in parallel
REPLAY_LENGTH = 2_500  # steps of each environment that the replay keeps
LEARNING_STARTS = 1_000  # environment steps before the first gradient step
BATCH_SIZE = 128  # transitions in a minibatch
TARGET_EVERY = 50  # updates between copies into the target network
LEARNING_RATE, MAX_GRAD_NORM, GAMMA = 2.5e-4, 10.0, 0.99
EPSILON_START, EPSILON_END, EPSILON_FRACTION = 1.0, 0.05, 0.25  # epsilon falls over the first quarter of the run

# reset(key) -> (obs, state);  step(key, state, action) -> (obs, state, reward, terminated, truncated), without a reset
ENV = envs.make("CartPole-v1")
OBS_SIZE, NUM_ACTIONS, WIDTH = 4, 2, 128

Array = jax.Array

# The network: a multilayer perceptron with one output for each action. A layer is a pair of weights and biases.


def init_params(key: Array) -> list[tuple[Array, Array]]:
    shapes, scales = [(OBS_SIZE, WIDTH), (WIDTH, WIDTH), (WIDTH, NUM_ACTIONS)], [2**0.5, 2**0.5, 1.0]
    weights = [jax.nn.initializers.orthogonal(x) for x in scales]
    keys = jax.random.split(key, 3)
    return [(w(k, shape), jnp.zeros(shape[1])) for w, k, shape in zip(weights, keys, shapes, strict=True)]


def q_values(params: list[tuple[Array, Array]], obs: Array) -> Array:
    """``Q(x, .)`` of every action, ``[..., NUM_ACTIONS]``."""
    x = obs
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    w, b = params[-1]
    return x @ w + b


class Transition(NamedTuple):
    """A step of every environment, ``[B, ...]``; in the replay, ``[REPLAY_LENGTH, B, ...]``; in a minibatch, ``[BATCH_SIZE, ...]``."""

    obs: Array
    action: Array
    reward: Array
    terminated: Array
    next_obs: Array  # the observation that followed, before any reset


class State(NamedTuple):
    """The whole run."""

    params: Any
    target_params: Any
    opt_state: Any
    replay: Transition
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
    ring = (REPLAY_LENGTH, NUM_ENVS)
    obs_ring = jnp.zeros((*ring, OBS_SIZE))
    replay = Transition(obs_ring, jnp.zeros(ring, int), jnp.zeros(ring), jnp.zeros(ring, bool), obs_ring)
    opt_state = optimizer(0).init(params)
    return State(params, params, opt_state, replay, env_state, obs, jnp.zeros(NUM_ENVS), key_run, jnp.int32(0))


def choose(condition: Array, x: Any, y: Any) -> Any:
    """The tree ``x`` where a condition ``[]`` holds, else ``y``."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), x, y)


def epsilon(updates: Array) -> Array:
    done = jnp.minimum(updates / NUM_UPDATES / EPSILON_FRACTION, 1.0)
    return EPSILON_START + (EPSILON_END - EPSILON_START) * done


def act(state: State, key_explore: Array, key_envs: Array) -> tuple[State, Transition, dict[str, Array]]:
    """A step in every environment; and, of the episodes that ended, the sum of their returns and their number."""
    chance = jax.random.uniform(key_explore, (NUM_ENVS, 1 + NUM_ACTIONS))
    explore, scores = chance[:, :1] < epsilon(state.updates), chance[:, 1:]  # the best of random scores is any action
    action = jnp.argmax(jnp.where(explore, scores, q_values(state.params, state.obs)), axis=-1)

    step_keys, reset_keys = jax.random.split(key_envs, (2, NUM_ENVS))
    next_obs, env_state, reward, terminated, truncated = jax.vmap(ENV.step)(step_keys, state.env_state, action)
    transition = Transition(state.obs, action, reward, terminated, next_obs)

    ended, total = terminated | truncated, state.episode_return + reward
    obs, env_state = jax.vmap(choose)(ended, jax.vmap(ENV.reset)(reset_keys), (next_obs, env_state))
    state = state._replace(env_state=env_state, obs=obs, episode_return=jnp.where(ended, 0.0, total))
    return state, transition, {"return_sum": jnp.where(ended, total, 0.0).sum(), "episodes": ended.sum()}


def sample(state: State, key: Array) -> Transition:
    """A minibatch from the replay, each stored transition as likely as another."""
    stored = jnp.minimum(state.updates, REPLAY_LENGTH)
    uniform = jax.random.uniform(key, (2, BATCH_SIZE))
    env, age = (uniform[0] * NUM_ENVS).astype(int), (uniform[1] * stored).astype(int)
    row = (state.updates - 1 - age) % REPLAY_LENGTH  # age 0 is the latest
    return jax.tree.map(lambda x: x[row, env], state.replay)


def loss(params: Any, target_params: Any, batch: Transition) -> Array:
    """Mean squared error, halved, of ``Q(x, a)`` against the target y."""
    v_t = q_values(target_params, batch.next_obs).max(-1)
    y = batch.reward + GAMMA * (1 - batch.terminated) * v_t
    q = jnp.take_along_axis(q_values(params, batch.obs), batch.action[:, None], axis=-1)[:, 0]
    return losses.value_loss(q, y).mean()


def update(state: State, _: None = None) -> tuple[State, dict[str, Array]]:
    """A step in every environment and one gradient step, which is dropped until the replay holds enough."""
    # As jrl.algos.dqn splits it, so that both give the same numbers; the fourth key is for noisy networks.
    key, key_explore, key_envs, _, key_batch = jax.random.split(state.key, 5)
    acted, transition, metrics = act(state, key_explore, key_envs)

    error, grads = jax.value_and_grad(loss)(state.params, state.target_params, sample(state, key_batch))
    change, opt_state = optimizer(state.updates).update(grads, state.opt_state)
    learned = (optax.apply_updates(state.params, change), opt_state)
    row, updates = state.updates % REPLAY_LENGTH, state.updates + 1
    params, opt_state = choose(updates * NUM_ENVS >= LEARNING_STARTS, learned, (state.params, state.opt_state))
    target_params = choose(updates % TARGET_EVERY == 0, params, state.target_params)

    replay = jax.tree.map(lambda ring, x: ring.at[row].set(x), state.replay, transition)
    learned = {"params": params, "target_params": target_params, "opt_state": opt_state}
    return acted._replace(**learned, replay=replay, key=key, updates=updates), metrics | {"loss": error}


def train(key: Array) -> tuple[State, dict[str, Array]]:
    """A whole run: its last state, and the metrics of each update."""
    return jax.lax.scan(update, init(key), length=NUM_UPDATES)


def main() -> None:
    begin = time.perf_counter()
    keys = jax.random.split(jax.random.key(0), NUM_SEEDS)
    _, metrics = jax.block_until_ready(jax.jit(jax.vmap(train))(keys))  # all seeds in one program
    print(f"DQN on CartPole-v1, {NUM_SEEDS} seeds: {time.perf_counter() - begin:.0f} s, compilation included")
    print("     steps  mean return  worst seed  best seed")
    total, count = (metrics[name].reshape(NUM_SEEDS, 10, -1).sum(-1) for name in ("return_sum", "episodes"))
    for tenth, score in enumerate((total / count).T, start=1):  # of the episodes that ended in each tenth of the run
        steps = tenth * NUM_UPDATES * NUM_ENVS // 10
        print(f"{steps:10,} {score.mean():12.1f} {score.min():11.1f} {score.max():10.1f}")


if __name__ == "__main__":
    main()
