"""Memory, known before anything runs: of a state by its shapes, of an update on a TPU by the TPU's compiler."""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jrl.algorithm import Algorithm, over_seeds
from jrl.envs.types import Environment
from jrl.numerics.host import device_memory


class Chip(NamedTuple):
    """A TPU: the smallest topology the compiler knows it by, and the memory of one chip in GiB."""

    topology: str
    gib: int


TPUS = {"v5e": Chip("v5e:2x2", 16), "v6e": Chip("v6e:2x2", 32), "v5p": Chip("v5p:2x2x1", 95)}


def state_bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree, or of their shapes (``jax.eval_shape``)."""

    def leaf(x: Any) -> int:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.eval_shape(jax.random.key_data, x)
        return x.size * x.dtype.itemsize

    return sum(map(leaf, jax.tree.leaves(tree)))


def refuse_states(state: Any, members: int, devices: int) -> None:
    """Raise ``ValueError`` if all members' states, each of these shapes, do not fit the devices."""
    _refuse("states", state_bytes(state), members, devices, "take fewer seeds, or a smaller replay")


def refuse_episodes(env: Environment, episodes: int, members: int, devices: int) -> None:
    """Raise ``ValueError`` if so many environments, for each of the members evaluated at once on each device, do not fit."""
    one = jax.eval_shape(env.reset, jax.eval_shape(lambda: jax.random.key(0)))
    _refuse("episodes of evaluation", state_bytes(one), episodes * members * devices, devices, "take fewer")


def _refuse(what: str, one: int, count: int, devices: int, advice: str) -> None:
    there = device_memory()
    if there is None:
        return
    room = there if jax.devices()[0].platform == "cpu" else there * devices
    if one * count > room:
        raise ValueError(
            f"{count:,} {what} of {_readable(one)}, {_readable(one * count)} in all, are larger than the {_readable(room)} there "
            f"are: {advice}"
        )


def refuse_if_too_large(what: str, arrays: Any) -> None:
    """Raise ``ValueError`` that names ``what`` if arrays of these shapes (``jax.eval_shape``) do not fit the first device."""
    there, needed = device_memory(), state_bytes(arrays)
    if there is not None and needed > there:
        raise ValueError(
            f"{what}: too large, since it takes {_readable(needed)} of memory and there are {_readable(there)}"
        )


def _readable(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**27 else f"{size:,} bytes"


def tpu_gib(chip: str, algo: Algorithm, num_seeds: int) -> float:
    """Memory that one update of ``num_seeds`` seeds needs on one chip, ahead of time and without a TPU.

    Raises ``ValueError`` for an unknown chip, ``ImportError`` without the package libtpu, and XLA's error if the program does
    not fit.
    """
    if chip not in TPUS:
        raise ValueError(f"chips must be of {', '.join(TPUS)}; got {chip!r}")
    import libtpu  # noqa: F401

    # The compiler holds no TPU: it need not look for one, and several processes may load it at once.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost")
    device = topologies.get_topology_desc(TPUS[chip].topology, platform="tpu").devices[0]
    algo = over_seeds(algo)
    state = jax.eval_shape(algo.init, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_seeds)))
    place = SingleDeviceSharding(device)
    compiled = jax.jit(algo.update, donate_argnums=0, in_shardings=place, out_shardings=place).lower(state).compile()
    used: Any = compiled.memory_analysis()
    total = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes + used.temp_size_in_bytes
    return total / 2**30
