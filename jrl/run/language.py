"""A published language model on the devices that a run uses, and what the run leaves of it."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jrl import lm
from jrl.lm import hf, layout, models, peft
from jrl.lm.model import Model, decoder
from jrl.lm.models import ADAPTER, BASE, MODEL
from jrl.nets import adapters, transformer
from jrl.numerics import checks, precision, sharding
from jrl.run import folders, memory
from jrl.run.checkpoint import disk_errors

# Words of a command line that may differ when a run goes on.
FREE = ("run_dir", "number", "steps", "epochs", "save_every", "devices", "model_devices", "prompt_length", "log")


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
        dtype: The dtype that the parameters are kept in.
    """

    path: Path
    shape: transformer.Config
    params: Any
    words: lm.Tokenizer
    model: Model
    mesh: Mesh
    pad: int
    dtype: str


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
    return Opened(
        path, shape, params, words, decoder(shape, parsed.compute, words.vocab_size), mesh, pad, parsed.params
    )


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


def settings_of(
    algorithm: str, args: Any, it: Opened, read: Mapping[str, Sequence[Path]], **more: Any
) -> dict[str, Any]:
    """What a run of an algorithm must share with the one that it goes on from, as flat JSON values: the words of its command line, but those that change
    no mathematics, files by their content, the folder or file of the model among them, and ``more``."""
    words = {name: x for name, x in asdict(args).items() if name not in FREE}
    if hasattr(args, "config"):
        words |= {"config": asdict(args.config) | {"model": asdict(it.shape)}, "hyper": folders.as_dict(args.hyper)}
    by_content = {name: [folders.fingerprint(path) for path in paths] for name, paths in read.items()}
    by_content["model"] = [folders.fingerprint(path) for path in models.files_of(it.path)]
    one = {"algorithm": algorithm, "num_seeds": 1, "cells": [""]}
    return folders.plain(words | by_content | one | more)


def leave(folder: Path, it: Opened, config: adapters.Config, params: Any) -> str:
    """Write what was trained of a decoder in Hugging Face's layout, or PEFT's, and say where. The base of an adapter is a whole model: where the run began
    with one under another adapter, that is written, too."""
    with disk_errors(folder):
        if config.trains_all:
            lm.save(folder / MODEL, replace(it.shape, remat=False), params, it.words)
            return f"{folder / MODEL}"
        base = models.base_of(it.path)
        if base is None:
            base = folder / BASE
            lm.save(base, *lm.load(it.path, it.dtype))
        peft.save(folder / ADAPTER, it.shape, config, params, base=str(base.resolve()))
        it.words.save(folder / ADAPTER)
        return f"{folder / ADAPTER}"


def leave_scorer(folder: Path, it: Opened, params: Any, separator: str | None) -> str:
    """Write a reward model ``{"body", "head"}``, and say where; ``separator`` is what stands behind each step, for one that judges steps."""
    with disk_errors(folder):
        hf.save_scorer(folder / MODEL, replace(it.shape, remat=False), params, pad=it.pad, separator=separator)
        it.words.save(folder / MODEL)
    return f"{folder / MODEL}"
