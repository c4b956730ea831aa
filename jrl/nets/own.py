"""Networks of a user's own, and trained ones, in place of those that settings describe: ``ppo.make(env, config, network=mine)``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jrl.nets.action_values import ValueConfig, action_values
from jrl.nets.actor_critic import Config, actor_critic
from jrl.nets.types import Network, step_one
from jrl.numerics import checks, optim
from jrl.numerics.types import Memory, Observation, Params

Array = jax.Array
VECTOR = jax.ShapeDtypeStruct((1,), jnp.float32)


def feed_forward(init: Callable[[Array], Params], apply: Callable[[Params, Observation], Any]) -> Network:
    """A network without a memory, of ``init: key -> params`` and ``apply: (params, obs [B, ...]) -> output [B, ...]``."""

    def step(params: Params, memory: Memory, obs: Observation, first: Array) -> tuple[Memory, Any]:
        return memory, apply(params, obs)

    def unroll(params: Params, memory: Memory, obs: Observation, first: Array) -> tuple[Memory, Any]:
        outputs = apply(params, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), obs))
        return (), jax.tree.map(lambda x: x.reshape(*first.shape, *x.shape[1:]), outputs)

    return Network(init, step, unroll, (), lambda memories, t, b: ())


def policy_network(own: Network | None, config: Config, obs_spec: Any, action_space: Any) -> Network:
    """The user's network if there is one, which must return ``Outputs`` for a policy over ``action_space``; else the one that
    ``config`` describes. Raises ``ValueError`` for a network that returns anything else."""
    if own is None:
        return actor_critic(config, obs_spec, action_space)
    return _checked(own, obs_spec, actor_critic(Config(hidden=(1,)), VECTOR, action_space))


def value_network(
    own: Network | None, config: ValueConfig, obs_spec: Any, action_space: Any, atoms: int = 1
) -> Network:
    """The user's network if there is one, which must return values of the actions in ``action_space``; else the one that
    ``config`` describes. Raises ``ValueError`` for a network that returns anything else."""
    if own is None:
        return action_values(config, obs_spec, action_space, atoms)
    return _checked(own, obs_spec, action_values(ValueConfig(hidden=(1,)), VECTOR, action_space, atoms))


def starting_from(network: Network, trained: Any) -> Network:
    """The network, initialized with the parameters that ``trained``, the state of one seed, acts with; unchanged if that is ``None``.

    Raises ``ValueError`` where they are not of this network.
    """
    if trained is None:
        return network
    checks.fields("start", trained, "params", "opt_state")
    given, wanted = trained.params, jax.eval_shape(network.init, jax.random.key(0))
    if _text(given) != _text(wanted):
        raise ValueError(f"start: parameters of the network must be {_text(wanted)}; got {_text(given)}")

    def init(key: Array) -> Params:
        learned = optim.eval_params(trained.opt_state, given)
        return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), learned, wanted)

    return network._replace(init=init)


def like(name: str, given: Params, wanted: Params) -> Params:
    """Trained parameters, which must have the shapes of fresh ones."""
    shapes = [str(jax.tree.map(lambda x: list(x.shape), tree)) for tree in (given, wanted)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"start: {name} must have the shapes {shapes[1]}; got {shapes[0]}")
    return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), given, wanted)


def _checked(own: Network, obs_spec: Any, example: Network) -> Network:
    """The user's network, if its output has the shapes of ``example``."""
    checks.instances("make", network=(own, Network))

    def output(of: Network, obs: Observation) -> Any:
        return step_one(of, of.init(jax.random.key(0)), obs)[1]

    found = checks.traced("make", "network", lambda obs: output(own, obs), obs_spec)
    wanted = jax.eval_shape(lambda obs: output(example, obs), VECTOR)
    if _text(found) != _text(wanted):
        raise ValueError(f"the network must return {_text(wanted)} for one observation; got {_text(found)}")
    return own


def _text(tree: Any) -> str:
    """The structure and the shapes of a tree of floating-point numbers."""

    def leaf(x: Any) -> str:
        return f"{'float' if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype}{list(x.shape)}"

    return str(jax.tree.map(leaf, tree)).replace("'", "")
