"""Self-imitation learning beside PPO (Oh et al. 2018, arXiv 1806.05635).

    policy    -log pi(a|x) (R - V(x))+              (eq. 2)         R the return that followed (x, a) in the replay
    value     1/2 || (R - V(x))+ ||^2               (eq. 3)

What turned out better than expected is done again. Transitions are drawn by ``(R - V)+`` (section 3.1). After PPO's epochs
come ``num_gradient_steps`` minibatches of this loss, with the same optimizer.

What differs from the paper: episodes teach once they terminated, within ``horizon`` steps. Those that are under way or were truncated, whose
return is not known, teach nothing, or with ``bootstrap`` by a return that the value of their last observation continues (Tang 2020,
arXiv 2006.07442).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jrl.algorithm import Metrics
from jrl.envs.types import Environment, example_action, observation_spec
from jrl.equations import losses
from jrl.equations.distributions import Distribution
from jrl.experience import normalize, replay, rollout
from jrl.nets.types import Network, outputs
from jrl.numerics import optim
from jrl.numerics.settings import NonNegative, NonNegativeInt, Positive, Settings, Unit, check
from jrl.numerics.types import Params

Array = jax.Array


@dataclass(frozen=True)
class Config(Settings, prefix="imitation"):
    """Static settings of self-imitation."""

    num_gradient_steps: NonNegativeInt = 0  # Minibatches of self-imitation per update; 0 for none.
    batch_size: Positive = 256  # Transitions in a minibatch.
    capacity: Positive = 50_000  # Rows of the replay, over all environments.
    horizon: Positive = 1_000  # Most steps of a return.
    # Continue by the value what did not terminate within the horizon, instead of leaving it out.
    bootstrap: bool = False


class Hyper(NamedTuple):
    """Numbers of self-imitation, floats or traced scalars; each may be swept."""

    weight: NonNegative = 0.1  # Weight of its loss beside PPO's.
    value_weight: NonNegative = 0.01  # Weight of the value loss within it.
    priority_exponent: Unit = 0.6  # Alpha of prioritized replay.
    importance: Unit = 0.1  # Beta of prioritized replay.


Numbers = Annotated[Hyper, check]  # a field of an algorithm's hyperparameters


class Imitation(NamedTuple):
    """Pure functions of self-imitation.

    Attributes:
        init: ``() -> replay.Buffer``, empty.
        update: ``(state, Steps [T, B], actions [T, B], key, optimizer) -> (state, metrics)``, of the algorithm's state whose ``imitation``
            is the buffer.
    """

    init: Callable[[], replay.Buffer]
    update: Callable[..., tuple[Any, Metrics]]


def make(
    config: Config, env: Environment, num_envs: int, network: Network, distribution: Distribution
) -> Imitation | None:
    """Self-imitation of the policy and the value of ``network``; None if ``config`` asks for no gradient steps.

    Raises ``ValueError`` for a network with a memory, or a replay that does not fit.
    """
    if not config.num_gradient_steps:
        return None
    if network.remembers:
        raise ValueError(
            "config.imitation replays single transitions: network.gru, lstm and attention have no place in it"
        )
    action = example_action(env.action_space)
    store = replay.make(
        observation_spec(env),
        num_envs,
        config.capacity,
        config.batch_size,
        n_step=config.horizon,
        prioritized=True,
        action_spec=jax.ShapeDtypeStruct(action.shape, action.dtype),
    )

    def update(
        state: Any, steps: rollout.Steps, action: Array, key: Array, tx: optax.GradientTransformation
    ) -> tuple[Any, Metrics]:
        state = state._replace(imitation=replay.add_rollout(store, state.imitation, steps, action))

        def learn(state: Any, key: Array) -> tuple[Any, Metrics]:
            h = state.hyper.imitation
            batch = normalize.transitions(state, store.sample(state.imitation, key, state.hyper.gamma, h.importance))
            step = optim.minimize(tx, lambda p: loss(p, batch, h), state.params, state.opt_state)
            metrics, advantage = step.extra
            priority = jnp.maximum(advantage, 1e-6) ** h.priority_exponent
            buffer = store.update(state.imitation, batch.rows, priority)
            return state._replace(params=step.params, opt_state=step.opt_state, imitation=buffer), metrics

        state, metrics = jax.lax.scan(learn, state, jax.random.split(key, config.num_gradient_steps))
        return state, jax.tree.map(jnp.mean, metrics)

    def loss(params: Params, batch: replay.Batch, hyper: Hyper) -> tuple[Array, tuple[Metrics, Array]]:
        now = outputs(network, params, batch.obs)
        target, used = batch.reward, batch.weight > 0
        if config.bootstrap:
            following = jax.lax.stop_gradient(outputs(network, params, batch.next_obs).value)
            target += jnp.where(batch.discount > 0, batch.discount * following, 0.0)
        else:
            used &= batch.discount == 0
        log_prob = distribution.log_prob(now.policy, batch.action)
        policy_loss, value_loss, advantage = losses.self_imitation(log_prob, now.value, target)
        each = batch.weight * losses.masked(policy_loss + hyper.value_weight * value_loss, used)
        total = hyper.weight * each.sum() / jnp.maximum(used.sum(), 1)
        better = jnp.sum(used & (advantage > 0)) / jnp.maximum(used.sum(), 1)
        return total, ({"imitation_loss": total, "imitated": better}, jnp.where(used, advantage, 0.0))

    return Imitation(store.init, update)
