"""Data and parameters of one large model over many devices, by the names of their axes; the compiler does the rest.

    mesh = make_mesh(data=2, model=4)
    params = jax.device_put(params, shardings(mesh, transformer.axes(config), params))
    with jax.set_mesh(mesh):
        state, metrics = jax.jit(algo.update)(state)

Rows of a batch lie over the mesh axis "data", and the named axes of parameters over those that ``rules`` give. Members of a run
(seeds, hyperparameters) are laid out by ``run.layout`` instead: there a model fits on a device.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jrl.numerics import checks, parameters
from jrl.numerics.types import Params

# Megatron's cut (1909.08053): columns of the first matrix of a pair and rows of the second, so that a pair costs one sum.
RULES: Mapping[str, str] = {"vocab": "model", "heads": "model", "kv_heads": "model", "ffn": "model", "experts": "model"}


def make_mesh(data: int = 1, model: int = 1, devices: list[Any] | None = None) -> Mesh:
    """A mesh of ``data`` x ``model`` devices. Raises ``ValueError`` unless they are all that there are."""
    devices = jax.devices() if devices is None else devices
    for name, size in (("data", data), ("model", model)):
        checks.positive_int(f"mesh axis {name}", size)
    if data * model != len(devices):
        raise ValueError(f"a mesh of {data} x {model} devices needs {data * model}; there are {len(devices)}")
    return jax.make_mesh((data, model), ("data", "model"), (AxisType.Auto, AxisType.Auto), devices=devices)


def shardings(mesh: Mesh, axes: Any, params: Params, rules: Mapping[str, str] = RULES) -> Any:
    """A sharding for each parameter, or its shape, by the names of its axes (``transformer.axes``).

    An axis is cut if a rule names it, the mesh axis is not taken by an earlier axis of the same parameter, and it divides evenly;
    else every device holds it whole. Raises ``ValueError`` for a rule that names no axis of the mesh.
    """
    for name, over in rules.items():
        checks.one_of(f"the rule of {name!r}", over, mesh.axis_names)

    def leaf(names: tuple[str, ...], x: Any) -> NamedSharding:
        spec: list[str | None] = []
        for name, size in zip(names, x.shape, strict=True):
            over = rules.get(name)
            free = over is not None and over not in spec and size % mesh.shape[over] == 0
            spec.append(over if free else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(leaf, axes, params, is_leaf=lambda x: isinstance(x, tuple))


def like(mesh: Mesh, params: Params, of_params: Params, state: Any) -> Any:
    """Shardings for a state that holds parameters, or what is shaped like them (an optimizer's moments): those lie as they do.

    ``of_params`` are the shardings of ``params``. All else is whole on every device.
    """
    known = {
        (parameters.names(path), x.shape): sharding
        for (path, x), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(of_params), strict=True
        )
    }
    whole = NamedSharding(mesh, PartitionSpec())

    def leaf(path: Any, x: Any) -> NamedSharding:
        names = parameters.names(path)
        return next((known[k] for i in range(len(names)) if (k := (names[i:], x.shape)) in known), whole)

    return jax.tree_util.tree_map_with_path(leaf, state)


def data_devices() -> int | None:
    """Number of devices of the mesh axis "data" of ``jax.set_mesh``; None without one."""
    return dict(jax.sharding.get_abstract_mesh().shape).get("data")


def rows(tree: Any) -> Any:
    """Leading axes laid over the mesh axis "data" of ``jax.set_mesh``; as they are without one.

    Raises ``ValueError`` for rows that do not divide evenly.
    """
    devices = data_devices()
    if devices is None:
        return tree
    for x in jax.tree.leaves(tree):
        if len(x) % devices:
            raise ValueError(
                f"rows at once must be a multiple of the {devices} devices of mesh axis data; got {len(x)}"
            )
    return jax.lax.with_sharding_constraint(tree, PartitionSpec("data"))
