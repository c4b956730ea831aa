"""Checkpoints in Hugging Face's layout: ``config.json``, and safetensors in one file or in several with an index.

    config, params = hf.load("SmolLM2-135M")                       llama, qwen2, qwen3, mixtral or deepseek_v3
    hf.save("mine", config, params)                                for jrl, and for ``transformers``

Names and shapes of all tensors are checked before any is read.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jrl.lm import layout, settings
from jrl.lm.layout import Tensor
from jrl.nets.transformer import Config
from jrl.numerics import checks
from jrl.numerics.types import Params

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
SCORE = "score.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
SEPARATOR = "step_separator"  # of a reward model that judges steps, in its config.json
DTYPES = ("float32", "bfloat16", "float16")


def load(folder: str | Path, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[Config, dict[str, Any]]:
    """The decoder's configuration and parameters of ``dtype`` (float32, bfloat16 or float16), those of ``precision.FLOAT32`` in float32.

    Raises ``ValueError`` for a file that is missing or damaged, a setting that the decoder cannot do, and a tensor that is
    missing, extra or of another shape, with its name.
    """
    folder = Path(folder)
    config, found, held = _opened(folder, dtype)
    if SCORE in held:
        raise ValueError(f"{folder} is a reward model: it has {SCORE}, and says no tokens")
    params = _gathered(folder, config, found, held, dtype)

    def get(name):
        return held[name][1].get_tensor(name)

    if config.tie_embeddings and "lm_head.weight" in held:
        file, _ = held["lm_head.weight"]
        if not np.array_equal(get("lm_head.weight"), get("model.embed_tokens.weight")):
            raise ValueError(
                f"{file}: lm_head.weight differs from model.embed_tokens.weight, with tie_word_embeddings=true"
            )
    return config, params


def load_scorer(folder: str | Path, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[Config, dict[str, Any]]:
    """A decoder's configuration and ``{"body", "head"}`` of a reward model: a decoder without a head for tokens, and ``score.weight`` ``[1, dim]``,
    as ``transformers`` writes those of sequence classification with one label. Raises as ``load`` does."""
    folder = Path(folder)
    config, found, held = _opened(folder, dtype)
    config = replace(config, tie_embeddings=True)
    if SCORE not in held:
        raise ValueError(f"{folder}: tensor {SCORE} is missing: this is no reward model")
    head = np.asarray(held.pop(SCORE)[1].get_tensor(SCORE), np.float32)
    if head.shape != (1, config.dim):
        raise ValueError(f"{folder}: tensor {SCORE} must be {[1, config.dim]}; got {list(head.shape)}")
    body = _gathered(folder, config, found, held, dtype)
    return config, {"body": body, "head": jnp.asarray(head[0])}


def save_scorer(
    folder: str | Path, config: Config, params: Params, *, pad: int | None = None, separator: str | None = None
) -> None:
    """Write a reward model ``{"body", "head"}`` as ``load_scorer`` reads it, in one file, without a head for tokens. ``transformers`` reads the score at
    the last token that is not ``pad``. Of a model that judges steps ``separator`` is what stands behind each."""
    folder = Path(folder)
    config = replace(config, tie_embeddings=True)
    body = {name: x for name, x in params["body"].items() if name != "head"}
    family = settings.ARCHITECTURES[settings.write(config)["model_type"]].removesuffix("ForCausalLM")
    more: dict[str, Any] = {"architectures": [f"{family}ForSequenceClassification"], "pad_token_id": pad}
    more |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    more |= {} if separator is None else {SEPARATOR: separator}
    save(folder, config, body, more=more, shard_bytes=2**62)
    tensors = safetensors.numpy.load_file(folder / ONE)
    tensors[SCORE] = np.asarray(params["head"], np.float32)[None]
    safetensors.numpy.save_file(tensors, folder / ONE, metadata={"format": "pt"})


def _opened(folder: Path, dtype: jax.typing.DTypeLike) -> tuple[Config, dict[str, Any], dict[str, tuple[Path, Any]]]:
    """The configuration, as it is used and as it stands in the file, and the tensors' files."""
    checks.one_of("dtype", jnp.dtype(dtype).name, DTYPES)
    found = read_json(folder / "config.json")
    try:
        config = settings.read(found)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    held = _held(_files(folder))
    layout.enough(config, len(held), str(folder))
    if config.ahead and f"model.layers.{config.num_layers}.eh_proj.weight" not in held:
        config = replace(config, ahead=0)  # as transformers writes them
    return config, found, held


def _gathered(
    folder: Path, config: Config, found: Mapping[str, Any], held: Mapping[str, tuple[Path, Any]], dtype: Any
) -> dict[str, Any]:
    """The parameters, once all names and shapes are as they must be."""
    wanted = _wanted(config, found)
    _check(folder, wanted, held, found)
    return layout.gather(config, wanted, lambda name: held[name][1].get_tensor(name), dtype)


def save(
    folder: str | Path,
    config: Config,
    params: Params,
    *,
    shard_bytes: int = 5 * 10**9,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write ``config.json`` and the weights, of the dtype they have; in several files if one would hold over ``shard_bytes``.

    ``more`` goes into ``config.json`` besides (``eos_token_id``, ``max_position_embeddings``); ``lm.save`` writes the tokenizer as
    well. Raises ``ValueError`` for a decoder
    that is of none of the families, and for parameters of another shape.
    """
    folder = Path(folder)
    checks.positive_int("shard_bytes", shard_bytes)
    found = settings.write(config) | {"torch_dtype": jnp.dtype(params["embedding"].dtype).name} | dict(more or {})
    layout.check_shapes(params, config)
    shards = _shards(layout.tensors(config), params, shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / "config.json", folder / ONE, folder / INDEX, *folder.glob("model-*-of-*.safetensors")):
        old.unlink(missing_ok=True)
    params = jax.device_get(params)  # once, not for each file
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip([ONE] if len(shards) == 1 else names, shards, strict=True):
        arrays = dict(layout.scatter(params, shard))
        safetensors.numpy.save_file(arrays, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
        where = {x.name: name for name, shard in zip(names, shards, strict=True) for x in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    write_json(folder / "config.json", found)


def read_json(path: Path) -> dict[str, Any]:
    """An object of a file; ``ValueError`` if there is none."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False).encode()  # half of a character can be written as \\ud800, and is no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object; got {type(found).__name__}")
    return found


def write_json(path: Path, found: Any) -> None:
    path.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """The files with weights, and the tensors that the index says are in each, if there is one."""
    if (folder / ONE).is_file():
        return {folder / ONE: None}
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} holds neither {ONE} nor {INDEX}")
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(_is_a_file_here(x) for x in where.values()):
        raise ValueError(
            f"{folder / INDEX}: weight_map must name the file of each tensor, a .safetensors file in the same folder"
        )
    return {folder / file: {x for x in where if where[x] == file} for file in sorted(set(where.values()))}


def _is_a_file_here(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _held(files: Mapping[Path, set[str] | None]) -> dict[str, tuple[Path, Any]]:
    """The file of each tensor, opened."""
    held: dict[str, tuple[Path, Any]] = {}
    for path, names in files.items():
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        try:
            opened = safetensors.safe_open(path, framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        there = set(opened.keys())
        for name in sorted(there if names is None else names | there):
            if name not in there:
                raise ValueError(f"{path}: tensor {name} is missing, which {INDEX} says is here")
            if names is not None and name not in names:
                raise ValueError(f"{path}: tensor {name} is not in {INDEX}")
            held[name] = path, opened
    return held


def _wanted(config: Config, found: Mapping[str, Any]) -> list[Tensor]:
    wanted = layout.tensors(config)
    if not found.get("rope_interleave", True):
        wanted = [x._replace(pairs=0) for x in wanted]
    return wanted


def _check(folder: Path, wanted: list[Tensor], held: Mapping[str, tuple[Path, Any]], found: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for the first tensor that is missing, extra, misshapen or not of floating point."""
    for x in wanted:
        if x.name not in held:
            raise ValueError(f"{folder}: tensor {x.name} {list(x.shape)} is missing")
        path, opened = held[x.name]
        given = opened.get_slice(x.name)
        if tuple(given.get_shape()) != x.shape:
            raise ValueError(f"{path}: tensor {x.name} must be {list(x.shape)}; got {list(given.get_shape())}")
        if given.get_dtype() not in FLOATS:
            raise ValueError(f"{path}: tensor {x.name} must be one of {', '.join(FLOATS)}; got {given.get_dtype()}")
    modules = any(x.name.endswith("eh_proj.weight") for x in wanted)
    for name in held.keys() - {x.name for x in wanted}:
        path, opened = held[name]
        shape = opened.get_slice(name).get_shape()
        if not _unused(name, shape, found, modules):
            raise ValueError(f"{path}: tensor {name} {shape} is not of a {found['model_type']} with these settings")


def _unused(name: str, shape: list[int], found: Mapping[str, Any], modules: bool) -> bool:
    """Whether a tensor may be there without being read; ``modules`` that predict further ahead are read."""
    if name == "lm_head.weight":
        return bool(found.get("tie_word_embeddings"))  # compared with the embedding later
    if name.endswith("rotary_emb.inv_freq") or 0 in shape:
        return True
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    first = found["num_hidden_layers"]
    ahead = found.get("num_nextn_predict_layers") or 0  # DeepSeek-V3's layers for predicting further ahead
    copied = name.endswith(("embed_tokens.weight", "shared_head.head.weight"))  # of embedding and head
    there = layer is not None and found["model_type"] == "deepseek_v3" and first <= int(layer[1]) < first + ahead
    return there and (copied or not modules)


def _shards(wanted: list[Tensor], params: Params, limit: int) -> list[list[Tensor]]:
    """Tensors of each file, in order, as many as fit."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for x in wanted:
        size = int(np.prod(x.shape)) * layout.dtype_of(params, x).itemsize
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(x)
        filled += size
    return shards
