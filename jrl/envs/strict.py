"""Checking an environment by abstract evaluation, before anything compiles."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrl.envs.spaces import Box, Discrete, MultiDiscrete, Space, as_space
from jrl.envs.types import Environment, MaskedObs, State, example_action, without_mask
from jrl.numerics import checks
from jrl.numerics.types import Observation

Array = jax.Array
ORDER = "(obs, state, reward, terminated, truncated)"


def strict(env: Any) -> Environment:
    """The environment, checked, with dtypes that never change.

    Rewards come out float32, flags bool, no leaf is weakly typed (else a second call would compile again), and observations
    and states keep the dtypes of ``reset`` from step to step; where ``reset`` gave Python numbers, those that ``step`` needs.
    A state in which no action is legal is terminal. ``env`` is any record or module with the names of ``Environment``.

    Raises ``ValueError`` naming the environment, the function and the mismatch; among these are floats that ``step`` returns
    where ``reset`` returned integers, which would be rounded.
    """
    env = _record(env)
    if getattr(env.step, "is_strict", False):
        return env
    key = jax.eval_shape(lambda: jax.random.key(0))
    obs, state = _pair(env, checks.traced(env.name, "reset", env.reset, key))
    action = jax.eval_shape(lambda: example_action(env.action_space))
    before = None
    while jax.tree.leaves((obs, state)) != before:  # a promoted number may promote the ones that follow from it
        before = jax.tree.leaves((obs, state))
        returned = _five(env, checks.traced(env.name, "step", env.step, key, _shapes(state), action))
        obs, state = _joined(env.name, "observation", obs, returned[0]), _joined(env.name, "state", state, returned[1])
    _check_observation(env, obs)
    _check_scalars(env.name, *returned[2:])

    def reset(key: Array) -> tuple[Any, State]:
        return _cast(env.reset(key), (obs, state))

    def step(key: Array, env_state: State, action: Array) -> tuple[Any, State, Array, Array, Array]:
        next_obs, next_state, reward, terminated, truncated = env.step(key, env_state, action)
        next_obs, next_state = _cast((next_obs, next_state), (obs, state))
        if isinstance(next_obs, MaskedObs):
            terminated = terminated | ~has_legal_action(env.action_space, next_obs.mask)
        return (
            next_obs,
            next_state,
            jnp.asarray(reward, jnp.float32),
            jnp.asarray(terminated, bool),
            jnp.asarray(truncated, bool),
        )

    step.is_strict = True  # type: ignore[attr-defined]
    return env._replace(reset=reset, step=step)


def seems_one_hot(env: Environment) -> bool:
    """Whether all arrays of the first observation of an episode are one-hot or single numbers. Of simulators, which are not asked, it is true."""
    if env.host:
        return True
    with jax.ensure_compile_time_eval():
        obs = without_mask(env.reset(jax.random.key(0))[0])
    arrays = [np.asarray(x, np.float32) for x in jax.tree.leaves(obs)]
    return all(not x.shape or (x.max() == 1 and np.count_nonzero(x) == 1) for x in arrays)


def has_legal_action(space: Space, mask: Array) -> Array:
    """Whether a mask ``[..., A]`` leaves an action, of each choice one; bool ``[...]``."""
    bounds = np.cumsum(space.nvec)[:-1].tolist() if isinstance(space, MultiDiscrete) else []
    return jnp.stack([part.any(-1) for part in jnp.split(mask, bounds, axis=-1)]).all(0)


def _record(env: Any) -> Environment:
    """An ``Environment`` of anything that has its names."""
    package = type(env).__module__.partition(".")[0]
    if hasattr(env, "unwrapped") and hasattr(env, "observation_space"):
        raise ValueError(
            f"{type(env).__name__} has the interface of gymnasium: envs.on_host(lambda: gymnasium.make(...)) makes an Environment of it"
        )
    if package in ("gymnax", "brax", "jumanji", "pgx", "craftax", "navix", "xminigrid", "mujoco_playground"):
        raise ValueError(
            f"{type(env).__name__} is an environment of {package}, which has another protocol: write reset and step as "
            "functions of jrl.envs.Environment (envs.make knows those of gymnax, brax, craftax, jumanji, navix, pgx, playground and xminigrid by name)"
        )
    missing = [name for name in ("reset", "step", "action_space") if not hasattr(env, name)]
    if missing:
        raise ValueError(
            f"an environment must have {', '.join(missing)}; got {env!r} (envs.make makes one by its name)"
        )
    name = str(getattr(env, "name", None) or getattr(env, "__name__", None) or type(env).__name__)
    fields: dict[str, Any] = {field: getattr(env, field, None) for field in Environment._fields}
    fields |= {field: getattr(env, field, default) for field, default in Environment._field_defaults.items()}
    fields |= {"name": name, "settings": fields["settings"] or ()}
    for field in ("reset", "step"):
        checks.function(f"{name}: {field}", fields[field])
    for field in ("time_limit", "first_truncation", "steps_per_reset"):
        if fields[field] is not None:
            checks.positive_int(f"{name}: {field}", fields[field])
    try:
        return Environment(**fields)._replace(action_space=as_space(fields["action_space"]))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _pair(env: Environment, returned: Any) -> tuple[Any, State]:
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise ValueError(f"{env.name}: reset must return (obs, state); got {_described(returned)}")
    return returned


def _five(env: Environment, returned: Any) -> Any:
    looks_foreign = isinstance(returned, tuple) and len(returned) >= 4 and isinstance(returned[-1], dict)
    hint = "; gymnax's order (obs, state, reward, done, info) does not tell terminated from truncated" * looks_foreign
    if not isinstance(returned, tuple) or len(returned) != 5 or looks_foreign:
        raise ValueError(f"{env.name}: step must return {ORDER}; got {_described(returned)}{hint}")
    return returned


def _described(returned: Any) -> str:
    return f"{len(returned)} values" if isinstance(returned, tuple) else _kind(returned)


def _kind(x: Any) -> str:
    return f"{x.dtype} of shape {x.shape}" if hasattr(x, "shape") else type(x).__name__


def _shapes(tree: Any) -> Any:
    """The same without weak types."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _joined(env: str, name: str, first: Any, then: Any) -> Any:
    """Shapes of what ``reset`` gave first and ``step`` then, promoted where ``reset`` gave Python numbers."""
    if _structure(first) != _structure(then):
        raise ValueError(
            f"{env}: step returns another {name} structure than reset: {_short(then)} against {_short(first)}"
        )

    def leaf(path: Any, a: Any, b: Any) -> Any:
        place = name + jax.tree_util.keystr(path)
        if a.shape != b.shape:
            raise ValueError(f"{env}: step returns {place} of shape {b.shape}, reset one of shape {a.shape}")
        if a.dtype == b.dtype or _is_key(a) or _is_key(b):
            return a
        dtype = jnp.result_type(a, b)
        floats = jnp.issubdtype(a.dtype, jnp.floating) and jnp.issubdtype(b.dtype, jnp.floating)
        if dtype == a.dtype or (floats and not a.weak_type):
            return a
        if not a.weak_type:
            raise ValueError(
                f"{env}: step returns {place} of dtype {b.dtype}, reset one of dtype {a.dtype}, in which it would be rounded "
                f"or cut off; let reset return {b.dtype}"
            )
        return jax.ShapeDtypeStruct(a.shape, dtype)

    return jax.tree_util.tree_map_with_path(leaf, first, then)


def _check_observation(env: Environment, obs: Observation) -> None:
    """Raise ``ValueError`` for complex numbers, and for a mask that does not fit the actions or beside no single array."""
    for x in jax.tree.leaves(obs):
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise ValueError(f"{env.name}: observations must be real; got dtype {x.dtype}")
    if not isinstance(obs, MaskedObs):
        return
    match env.action_space:
        case Discrete(n):
            wanted: int = n
        case MultiDiscrete(nvec):
            wanted = sum(nvec)
        case Box():
            raise ValueError(f"{env.name}: a mask is for discrete actions; the actions are {env.action_space}")
    mask = obs.mask
    if getattr(mask, "shape", None) != (wanted,) or mask.dtype != bool:
        raise ValueError(
            f"{env.name}: the mask must be bool of shape ({wanted},), one for each action; got {_kind(mask)}"
        )
    if len(jax.tree.leaves(obs.obs)) != 1 or not hasattr(obs.obs, "shape"):
        raise ValueError(f"{env.name}: the observation beside a mask must be one array; got {_described(obs.obs)}")


def _check_scalars(env: str, reward: Any, terminated: Any, truncated: Any) -> None:
    for name, given in (("reward", reward), ("terminated", terminated), ("truncated", truncated)):
        if not hasattr(given, "shape"):
            raise ValueError(f"{env}: step must return {ORDER}, a scalar {name} among them; got {_described(given)}")
        if given.shape != ():
            raise ValueError(f"{env}: step must return a scalar {name}, got shape {given.shape}")
        flag = given.dtype == bool
        if name == "reward" and not (flag or jnp.issubdtype(given.dtype, jnp.number)):
            raise ValueError(f"{env}: the reward must be a number; got dtype {given.dtype}")
        if name == "reward" and jnp.issubdtype(given.dtype, jnp.complexfloating):
            raise ValueError(f"{env}: the reward must be real; got dtype {given.dtype}")
        if name != "reward" and not flag:
            raise ValueError(f"{env}: {name} must be bool, since step returns {ORDER}; got dtype {given.dtype}")


def _structure(tree: Any) -> str:
    """The structure of a tree as text, without the addresses of what stands in it."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(jax.tree.structure(tree)))


def _short(tree: Any) -> str:
    text = str(tree)
    return text if len(text) <= 400 else f"{text[:400]} ..."


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _cast(tree: Any, like: Any) -> Any:
    """Leaves with the dtypes of ``like``, none weakly typed."""

    def leaf(x: Any, like: Any) -> Array:
        return x if _is_key(like) else jax.lax.convert_element_type(jnp.asarray(x), like.dtype)

    return jax.tree.map(leaf, tree, like)
