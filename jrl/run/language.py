"""A published language model on the devices that a run uses, and what the run leaves of it."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jrl import lm
from jrl.lm import hf, layout, peft
from jrl.lm.model import Model, decoder
from jrl.lm.models import ADAPTER, MODEL
from jrl.nets import adapters, transformer
from jrl.numerics import checks, precision, sharding
from jrl.run import memory
from jrl.run.checkpoint import disk_errors


class Opened(NamedTuple):
    """A model that was read, and where it lies.

    Attributes:
        path: The folder or the file that it was read from.
        shape: Shape of the decoder.
        params: Parameters of the decoder, on one device until ``start`` lays them out and takes them.
        words: The tokenizer.
        model: The decoder as learners take it.
        mesh: The devices.
        pad: The token that fills rows.
    """

    path: Path
    shape: transformer.Config
    params: Any
    words: lm.Tokenizer
    model: Model
    mesh: Mesh
    pad: int


def opened(path: Path, policy: str, mesh: Mesh) -> Opened:
    """The model of a folder or file, computed as the precision policy says. Raises ``ValueError`` where it names no end token, and as ``lm.load``."""
    parsed = precision.parse(policy)
    shape, params, words = lm.load(path, parsed.params)
    if not words.ends:
        raise ValueError(f"{path} names no end token")
    try:
        layout.check_shapes(params, shape)
    except ValueError:
        raise ValueError(
            f"{path}: its adapter is no part of the model's matrices; begin with the model beside it"
        ) from None
    pad = words.ends[0] if words.pad is None else words.pad
    shape = replace(shape, remat=True)
    return Opened(path, shape, params, words, decoder(shape, parsed.compute, words.vocab_size), mesh, pad)


def mesh_of(devices: int | None, model_devices: int, rows: int, what: str) -> Mesh:
    """So many devices, all if none are asked for (but only one of a CPU's, which share its cores), of which ``model_devices`` hold a copy of the
    model together. Raises ``ValueError`` unless the copies share ``rows``, which are ``what`` says, evenly."""
    there = jax.devices()
    count = (1 if jax.default_backend() == "cpu" else len(there)) if devices is None else devices
    checks.within("devices", count, 1, len(there))
    checks.positive_int("model_devices", model_devices)
    if count % model_devices:
        raise ValueError(f"model_devices must divide the {count} devices; got {model_devices}")
    data = count // model_devices
    if rows % data:
        raise ValueError(f"{what} must be a multiple of the {data} devices that share them; got {rows}")
    return sharding.make_mesh(data, model_devices, there[:count])


def start(it: Opened, init: Callable[..., Any], *given: Any) -> tuple[Any, Any]:
    """The state ``init(key, params, ...)`` of what is ``given``, laid over the devices, and how: the model is cut, all else is whole. The parameters that are
    given go into the state, and are no more. Raises ``ValueError`` if it cannot fit."""
    of_params = sharding.shardings(it.mesh, transformer.axes(it.shape), it.params)
    shapes = jax.eval_shape(init, *given)
    memory.refuse_states(shapes, 1, it.mesh.size)
    where = sharding.like(it.mesh, it.params, of_params, shapes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        return jax.jit(init, out_shardings=where, donate_argnums=1)(*given), where


def leave(folder: Path, it: Opened, config: adapters.Config, params: Any) -> str:
    """Write what was trained of a decoder in Hugging Face's layout, or PEFT's, and say where."""
    with disk_errors(folder):
        if config.trains_all:
            lm.save(folder / MODEL, replace(it.shape, remat=False), params, it.words)
            return f"{folder / MODEL}"
        peft.save(folder / ADAPTER, it.shape, config, params, base=str(it.path.resolve()))
        return f"{folder / ADAPTER}"


def leave_scorer(folder: Path, it: Opened, params: Any) -> str:
    """Write a reward model ``{"body", "head"}``, and say where."""
    with disk_errors(folder):
        hf.save_scorer(folder / MODEL, replace(it.shape, remat=False), params, pad=it.pad)
        it.words.save(folder / MODEL)
    return f"{folder / MODEL}"
