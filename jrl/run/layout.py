"""How the members of a run (seeds, or settings x seeds) lie over devices and in groups.

Members are independent, so they can be computed on several devices and, on each, group by group: a smaller group needs
less memory, and on a CPU stays in cache. The numbers of a member do not depend on it beyond float rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

CPU_GROUP = 8


class Layout(NamedTuple):
    """``num_members`` members on ``devices``, each computing ``num_groups`` groups of ``group_size`` one after another."""

    num_members: int
    devices: tuple[Any, ...]
    num_groups: int
    group_size: int

    @property
    def num_slots(self) -> int:
        """Members with padding: those beyond ``num_members`` repeat the last one and are dropped from every result."""
        return len(self.devices) * self.num_groups * self.group_size

    @property
    def mesh(self) -> Mesh:
        return Mesh(np.array(self.devices), ("members",), axis_types=(AxisType.Auto,))

    @property
    def sharding(self) -> Sharding:
        if len(self.devices) == 1:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.mesh, PartitionSpec("members"))


def choose(num_members: int, devices: list[Any], at_once: int | None) -> Layout:
    """Spread members evenly: no more devices than members, groups of at most ``at_once`` per device, little padding.

    ``at_once`` counts members over all devices; None means 8 on each CPU device, and all on an accelerator.
    """
    devices = devices[: min(len(devices), num_members, at_once or num_members)]
    per_device = -(-num_members // len(devices))
    if at_once is None:
        most = CPU_GROUP if devices[0].platform == "cpu" else per_device
    else:
        most = max(1, at_once // len(devices))
    fewest = -(-per_device // most)
    # A few more groups than needed may waste less padding, but groups of less than half the wanted size waste more.
    usable = [g for g in range(fewest, 2 * fewest + 1) if g == fewest or 2 * -(-per_device // g) > most]
    num_groups = min(usable, key=lambda g: (g * -(-per_device // g), g))
    return Layout(num_members, tuple(devices), num_groups, -(-per_device // num_groups))


def pad(layout: Layout, tree: Any) -> Any:
    """Host or device arrays ``[num_members, ...]`` to ``[num_slots, ...]``."""
    rows = np.minimum(np.arange(layout.num_slots), layout.num_members - 1)
    return jax.tree.map(lambda x: x[rows], tree)


def over_members(layout: Layout, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(group, *args)`` on trees ``[group_size, ...]``, as a function of trees ``[num_slots, ...]``; pure, to jit."""

    def on_device(members: Any, *args: Any) -> Any:
        if layout.num_groups == 1:
            return function(members, *args)
        groups = jax.tree.map(lambda x: x.reshape(layout.num_groups, layout.group_size, *x.shape[1:]), members)
        out = jax.lax.map(lambda group: function(group, *args), groups)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

    if len(layout.devices) == 1:
        return on_device
    members, everywhere = PartitionSpec("members"), PartitionSpec()

    def sharded(tree: Any, *args: Any) -> Any:
        specs = (members, *(everywhere for _ in args))
        return jax.shard_map(on_device, mesh=layout.mesh, in_specs=specs, out_specs=members, check_vma=False)(
            tree, *args
        )

    return sharded


def put(layout: Layout, tree: Any) -> Any:
    """Place ``[num_slots, ...]`` on the layout's devices."""
    return jax.device_put(tree, layout.sharding)


def shapes(layout: Layout, tree: Any) -> Any:
    """The shapes of ``[num_slots, ...]`` on the layout's devices, of arrays or shapes with any leading axis."""

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((layout.num_slots, *x.shape[1:]), x.dtype, sharding=layout.sharding)

    return jax.tree.map(leaf, tree)


def fetch(layout: Layout, tree: Any) -> Any:
    """Copies on the host, without the padding: ``[num_members, ...]`` NumPy arrays, keys as their data."""

    def leaf(x: Any) -> np.ndarray:
        data = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return np.array(data)[: layout.num_members]  # a copy: the device's own memory may be donated to the next chunk

    return jax.tree.map(leaf, tree)
