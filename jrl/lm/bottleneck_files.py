"""Houlsby's and Pfeiffer's adapters in the layout of the library ``adapters``, for ``jrl.lm.peft``."""

from typing import Any

import numpy as np

from jrl.nets import adapters, transformer
from jrl.nets.adapters import Config
from jrl.nets.bottleneck import PLACES

Tensors = dict[str, np.ndarray]
# The library's names of the networks of bottlenecks, and of their parameters.
LIBRARY_PLACES = {
    "attention_adapter": "attention_adapters",
    "ffn_adapter": "output_adapters",
    "stream_adapter": "output_adapters",
}
LIBRARY_LEAVES = {
    "down": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}


def read(found: dict[str, Any], given: Tensors, shape: transformer.Config) -> tuple[Config, dict[str, Any]]:
    """Settings and parameters of what stands in a file."""
    settings = found["config"]
    kind: adapters.Kind = "houlsby" if settings["mh_adapter"] else "pfeiffer"
    wanted = _settings(kind) | {"reduction_factor": settings["reduction_factor"]}
    for name, x in wanted.items():
        if settings.get(name, x) != x:
            raise ValueError(f"{name} must be {x!r} for {kind}; got {settings[name]!r}")
    arrays = {_library_name(*name.split(".")[2:]): x for name, x in given.items()}
    trained: dict[str, Any] = {}
    for place in PLACES[kind]:
        for leaf, theirs in LIBRARY_LEAVES.items():
            names = [f"{i}.{LIBRARY_PLACES[place]}.{theirs}" for i in range(shape.num_layers)]
            rows = np.stack([take(arrays, name).T for name in names])
            trained.setdefault("layers", {}).setdefault(place, {})[leaf] = rows
    width = trained["layers"][PLACES[kind][0]]["down"].shape[-1]
    return Config(kind, rank=width), trained


def write(config: Config, trained: dict[str, Any], shape: transformer.Config) -> tuple[dict[str, Any], Tensors]:
    """The configuration and the tensors of an adapter's files. Raises ``ValueError`` for a width that the library cannot name."""
    if shape.dim % config.rank:
        raise ValueError(f"the width of a bottleneck must divide the decoder's {shape.dim}; got {config.rank}")
    tensors = {}
    for place, leaves in trained["layers"].items():
        for leaf, theirs in LIBRARY_LEAVES.items():
            for i, x in enumerate(leaves[leaf]):
                tensors[f"model.layers.{i}.{LIBRARY_PLACES[place]}.adapters.jrl.{theirs}"] = x.T
    settings = _settings(config.kind) | {"reduction_factor": shape.dim / config.rank}
    return {"config": settings, "hidden_size": shape.dim, "model_type": "llama", "name": "jrl"}, tensors


def _library_name(number: str, place: str, adapters: str, name: str, *leaf: str) -> str:
    """Without the name that the adapter has."""
    return ".".join((number, place, *leaf))


def _settings(kind: str) -> dict[str, Any]:
    """The library's settings of an adapter that is computed as here."""
    houlsby = kind == "houlsby"
    return {
        "mh_adapter": houlsby,
        "output_adapter": True,
        "non_linearity": "swish" if houlsby else "relu",
        "original_ln_before": not houlsby,
        "original_ln_after": True,
        "residual_before_ln": True,
        "adapter_residual_before_ln": False,
        "ln_before": False,
        "ln_after": False,
        "is_parallel": False,
        "scaling": 1.0,
        "use_gating": False,
        "phm_layer": False,
        "dropout": 0.0,
    }


def take(given: Tensors, name: str) -> np.ndarray:
    """A tensor by its name. Raises ``ValueError`` if there is none."""
    if name not in given:
        raise ValueError(f"{name} is missing")
    return given[name]
