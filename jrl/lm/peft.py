"""Adapters in the layout of Hugging Face's PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

    config, trained = peft.load("my-adapter", shape)             LoRA, rsLoRA, DoRA, IA3, prefix and prompt tuning
    peft.save("mine", shape, config, trained, base="SmolLM2-135M")

``trained`` is what ``adapters.make(config, shape)`` trains. Houlsby's and Pfeiffer's are read and written in the layout of the library
``adapters``, whose file is ``adapter.safetensors``.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jrl.lm import bottleneck_files, layout
from jrl.lm.bottleneck_files import Tensors, take
from jrl.lm.hf import read_json, write_json
from jrl.nets import adapters, transformer
from jrl.nets.adapters import Config
from jrl.nets.bottleneck import PLACES
from jrl.numerics import checks, lora

CONFIG, PEFT, BOTTLENECK = "adapter_config.json", "adapter_model.safetensors", "adapter.safetensors"
BEFORE = "base_model.model."  # each tensor of PEFT's files


def load(folder: str | Path, shape: transformer.Config) -> tuple[Config, dict[str, Any]]:
    """Settings and parameters of an adapter of a decoder of that shape, float32.

    Ranks that differ between matrices become the largest, with columns of zeros, and their factors go into B; the function is the same.
    Raises ``ValueError`` for a file that is missing or damaged, a setting that is not read, and a tensor that is missing, extra or of another
    shape, with its name.
    """
    folder = Path(folder)
    found = read_json(folder / CONFIG)
    try:
        if "peft_type" not in found:
            config, trained = bottleneck_files.read(found, _tensors(folder / BOTTLENECK), shape)
        else:
            checks.one_of("peft_type", found["peft_type"], READERS)
            given = {name.removeprefix(BEFORE): x for name, x in _tensors(folder / PEFT).items()}
            config, trained = READERS[found["peft_type"]](found, given, shape)
        _check(config, trained, shape)
    except (ValueError, TypeError, KeyError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder}: {said}") from None
    return config, jax.tree.map(jnp.asarray, trained)


def save(
    folder: str | Path, shape: transformer.Config, config: Config, trained: dict[str, Any], *, base: str = ""
) -> None:
    """Write an adapter of a decoder of that shape; ``base`` names the decoder's folder or repository. Raises ``ValueError`` for what no library reads."""
    folder, trained = Path(folder), jax.tree.map(lambda x: np.asarray(x, np.float32), trained)
    _check(config, trained, shape)
    if config.kind in PLACES:
        found, tensors = bottleneck_files.write(config, trained, shape)
        found["base_model_name_or_path"] = base
        file = BOTTLENECK
    else:
        checks.one_of("adapter.kind", config.kind, WRITERS)
        more, tensors = WRITERS[config.kind](config, trained, shape)
        found = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True} | more
        tensors = {f"{BEFORE}{name}" if "." in name else name: x for name, x in tensors.items()}
        file = PEFT
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
    write_json(folder / CONFIG, found)


def _tensors(path: Path) -> Tensors:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        return {name: np.asarray(x, np.float32) for name, x in safetensors.numpy.load_file(path).items()}
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"{path} is damaged: {error}") from None


def _check(config: Config, trained: dict[str, Any], shape: transformer.Config) -> None:
    """Raise ``ValueError`` unless these are the arrays of such an adapter."""

    def expected() -> Any:
        key = jax.random.key(0)
        return adapters.make(config, shape).init(key, transformer.init(key, shape))

    wanted, given = _shapes(jax.eval_shape(expected)), _shapes(trained)
    for name in sorted(wanted | given):
        if wanted.get(name) != given.get(name):
            said = [layout.say(x.get(name)) for x in (wanted, given)]
            raise ValueError(f"the adapter's {name}: wanted {said[0]}; got {said[1]}")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}


# Beside matrices


def _matrices(shape: transformer.Config) -> dict[str, layout.Tensor]:
    """The matrices of a model's file that an adapter can stand beside, by their modules' names."""
    if shape.attention in ("mla", "dsa") or shape.experts.experts:
        raise ValueError("adapters of latent attention and of experts have no layout here")
    linear = [x for x in layout.tensors(shape) if x.at and x.flipped and len(x.shape) == 2]
    return {x.name.removesuffix(".weight"): x for x in linear}


def _read_lora(found: dict[str, Any], given: Tensors, shape: transformer.Config) -> tuple[Config, dict[str, Any]]:
    if found.get("bias", "none") != "none":
        raise ValueError(f"bias must be none; got {found['bias']!r}")
    rank, alpha, root = found["r"], found["lora_alpha"], bool(found.get("use_rslora"))
    modules, whole, rest = _matrices(shape), *_whole(found, given, shape)
    names = {name.rsplit(".lora_", 1)[0] for name in rest}
    ranks = {name: len(take(rest, f"{name}.lora_A.weight")) for name in names}
    most = max(ranks.values(), default=rank)
    trained: dict[str, Any] = {}
    for name in sorted(names):
        if name not in modules:
            raise ValueError(f"{name} is no matrix of this decoder")
        path, number = _path(modules[name]), modules[name].at
        a, b = rest.pop(f"{name}.lora_A.weight").T, take(rest, f"{name}.lora_B.weight").T
        del rest[f"{name}.lora_B.weight"]
        own = _of_module(found.get("rank_pattern"), name, rank), _of_module(found.get("alpha_pattern"), name, alpha)
        factor = lora.factor(own[0], own[1], root) / lora.factor(most, alpha, root)
        a, b = _padded(a, 1, most), _padded(factor * b, 0, most)
        parts = {"a": a, "b": b}
        if found.get("use_dora"):
            parts["magnitude"] = rest.pop(f"{name}.lora_magnitude_vector")
        _put(trained, path, number, parts, shape)
    if rest:
        raise ValueError(f"tensors that are not read: {', '.join(sorted(rest))}")
    kind: adapters.Kind = "dora" if found.get("use_dora") else "lora"
    targets = _pattern(trained)
    dropout = float(found.get("lora_dropout") or 0.0)
    config = Config(kind, most, float(alpha), root, targets, dropout, whole=_pattern(whole))
    return config, trained | whole


def _read_ia3(found: dict[str, Any], given: Tensors, shape: transformer.Config) -> tuple[Config, dict[str, Any]]:
    modules, whole, rest = _matrices(shape), *_whole(found, given, shape)
    trained: dict[str, Any] = {}
    for name, x in rest.items():
        module = name.removesuffix(".ia3_l")
        if module not in modules:
            raise ValueError(f"{name} is of no matrix of this decoder")
        kind = "row_scale" if len(x) == 1 else "column_scale"
        _put(trained, _path(modules[module]), modules[module].at, {kind: x.ravel()}, shape)
    return Config("ia3", whole=_pattern(whole)), trained | whole


def _write_lora(config: Config, trained: dict[str, Any], shape: transformer.Config) -> tuple[dict[str, Any], Tensors]:
    modules, tensors = _matrices(shape), _whole_tensors(trained, shape)
    targets = set()
    for module, tensor in modules.items():
        now = trained.get(_path(tensor))
        if not isinstance(now, dict):
            continue
        targets.add(module.rsplit(".", 1)[1])
        for name, key in (("lora_A.weight", "a"), ("lora_B.weight", "b")):
            x = now[key][tensor.at]
            tensors[f"{module}.{name}"] = x.reshape(x.shape[-2:]).T
        if config.kind == "dora":
            tensors[f"{module}.lora_magnitude_vector"] = now["magnitude"][tensor.at].ravel()
    given = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": adapters.alpha_of(config),
        "lora_dropout": config.dropout,
        "use_rslora": config.root,
        "use_dora": config.kind == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
    }
    return given | _targets(targets, trained), tensors


def _write_ia3(config: Config, trained: dict[str, Any], shape: transformer.Config) -> tuple[dict[str, Any], Tensors]:
    tensors, targets, feedforward = _whole_tensors(trained, shape), set(), set()
    for module, tensor in _matrices(shape).items():
        now = trained.get(_path(tensor))
        if not isinstance(now, dict):
            continue
        last = module.rsplit(".", 1)[1]
        targets.add(last)
        ((kind, x),) = now.items()
        feedforward |= {last} if kind == "row_scale" else set()
        numbers = x[tensor.at].ravel()
        tensors[f"{module}.ia3_l"] = numbers[None] if kind == "row_scale" else numbers[:, None]
    given = {"peft_type": "IA3", "feedforward_modules": sorted(feedforward), "fan_in_fan_out": False}
    return given | _targets(targets, trained), tensors


def _targets(targets: set[str], trained: dict[str, Any]) -> dict[str, Any]:
    whole = [LIBRARY_WHOLE[path] for path, x in trained.items() if not isinstance(x, dict)]
    return {"target_modules": sorted(targets), "modules_to_save": whole or None}


LIBRARY_WHOLE = {"embedding": "embed_tokens", "head": "lm_head"}


def _whole(found: dict[str, Any], given: Tensors, shape: transformer.Config) -> tuple[dict[str, Any], Tensors]:
    """The parameters that are trained themselves, and the other tensors."""
    names = {x.name: x for x in layout.tensors(shape) if x.leaves[0][-1] in LIBRARY_WHOLE}
    whole = {}
    for name, tensor in names.items():
        if name in given:
            x = given[name]
            whole[_path(tensor)] = x.T if tensor.flipped else x
    asked = [name for name in found.get("modules_to_save") or [] if name not in LIBRARY_WHOLE.values()]
    if asked:
        raise ValueError(f"modules_to_save must be of {', '.join(LIBRARY_WHOLE.values())}; got {', '.join(asked)}")
    return whole, {name: x for name, x in given.items() if name not in names}


def _whole_tensors(trained: dict[str, Any], shape: transformer.Config) -> Tensors:
    by_path = {_path(x): x for x in layout.tensors(shape)}
    tensors = {}
    for path, x in trained.items():
        if isinstance(x, dict):
            continue
        if path not in LIBRARY_WHOLE:
            raise ValueError(f"adapter.whole: PEFT's layout holds {', '.join(LIBRARY_WHOLE)} alone; got {path}")
        tensors[by_path[path].name] = x.T if by_path[path].flipped else x
    return tensors


def _put(trained: dict[str, Any], path: str, at: tuple[int, ...], parts: Tensors, shape: transformer.Config) -> None:
    """Write one matrix's arrays into those of all layers, where layers without any have zeros."""
    stack, *_ = path.split("/")
    layers = transformer.stacks(shape)[stack].num_layers
    branch = (1,) if path.endswith(("/k", "/v")) else ()
    for name, x in parts.items():
        rows = trained.setdefault(path, {}).setdefault(name, np.zeros((layers, *branch, *x.shape), np.float32))
        if rows[at].size != x.size:
            raise ValueError(
                f"{path} of layer {at[0]}: {name} must be {layout.say(rows.shape[1:])}; got {layout.say(x.shape)}"
            )
        rows[at] = x.reshape(rows[at].shape)


def _padded(x: np.ndarray, axis: int, length: int) -> np.ndarray:
    return np.pad(x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)])


def _path(tensor: layout.Tensor) -> str:
    return "/".join(tensor.leaves[0])


def _pattern(paths: dict[str, Any]) -> str:
    """A regular expression for these paths alone."""
    return f"^({'|'.join(paths)})$" if paths else ""


def _of_module(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """What the first pattern that fits says of a module."""
    fits = (x for pattern, x in (patterns or {}).items() if re.search(rf"(^|\.){pattern}$", module))
    return next(fits, default)


# Virtual tokens


def _read_prefix(found: dict[str, Any], given: Tensors, shape: transformer.Config) -> tuple[Config, dict[str, Any]]:
    if found.get("prefix_projection"):
        raise ValueError("prefix_projection must be false")
    x = take(given, "prompt_embeddings")
    wanted = (len(x), 2 * shape.num_layers * shape.num_kv_heads * shape.width)
    if x.shape != wanted:
        raise ValueError(f"prompt_embeddings must be {list(wanted)}; got {list(x.shape)}")
    both = x.reshape(len(x), shape.num_layers, 2, shape.num_kv_heads, shape.width)
    k, v = (np.swapaxes(both[:, :, i], 0, 1) for i in (0, 1))
    return Config("prefix", tokens=len(x)), {"layers": {"prefix_k": k, "prefix_v": v}}


def _write_prefix(config: Config, trained: dict[str, Any], shape: transformer.Config) -> tuple[dict[str, Any], Tensors]:
    both = np.stack([trained["layers"][name] for name in ("prefix_k", "prefix_v")], axis=1)  # [layers, 2, N, K, D]
    given = _virtual("PREFIX_TUNING", config, shape) | {
        "num_attention_heads": shape.num_kv_heads,
        "token_dim": shape.num_kv_heads * shape.width,
        "encoder_hidden_size": shape.num_kv_heads * shape.width,
        "prefix_projection": False,
    }
    return given, {"prompt_embeddings": np.moveaxis(both, 2, 0).reshape(config.tokens, -1)}


def _read_prompt(found: dict[str, Any], given: Tensors, shape: transformer.Config) -> tuple[Config, dict[str, Any]]:
    x = take(given, "prompt_embeddings")
    return Config("prompt", tokens=len(x)), {"prompt": x}


def _write_prompt(config: Config, trained: dict[str, Any], shape: transformer.Config) -> tuple[dict[str, Any], Tensors]:
    given = _virtual("PROMPT_TUNING", config, shape) | {
        "num_attention_heads": shape.num_heads,
        "token_dim": shape.dim,
        "prompt_tuning_init": "RANDOM",
    }
    return given, {"prompt_embeddings": trained["prompt"]}


def _virtual(kind: str, config: Config, shape: transformer.Config) -> dict[str, Any]:
    return {
        "peft_type": kind,
        "num_virtual_tokens": config.tokens,
        "num_layers": shape.num_layers,
        "num_transformer_submodules": 1,
    }


READERS: dict[str, Callable[..., tuple[Config, dict[str, Any]]]] = {
    "LORA": _read_lora,
    "IA3": _read_ia3,
    "PREFIX_TUNING": _read_prefix,
    "PROMPT_TUNING": _read_prompt,
}
WRITERS: dict[str, Callable[..., tuple[dict[str, Any], Tensors]]] = {
    "lora": _write_lora,
    "dora": _write_lora,
    "ia3": _write_ia3,
    "prefix": _write_prefix,
    "prompt": _write_prompt,
}
