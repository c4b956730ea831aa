"""A published language model, whole."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jrl.lm import gguf, hf, peft, tokenizer
from jrl.lm.tokenizer import Tokenizer
from jrl.nets import adapters
from jrl.nets.transformer import Config
from jrl.numerics.types import Params

MODEL, ADAPTER, BASE = "model", "adapter", "base"  # what a run leaves in its folder


def load(path: str | Path, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[Config, dict[str, Any], Tokenizer]:
    """Configuration, parameters of ``dtype`` (``precision.FLOAT32`` apart) and tokenizer, of a folder in Hugging Face's layout or of a ``.gguf`` file.

    An adapter's folder will do, too, and the folder of a run of ``experiments/lm.py``: the model that it left, or the one that it began with under its
    adapter, which is merged where it has a place in the parameters and else stands beside them. Raises ``ValueError`` for anything about them that is
    missing, damaged or cannot be done, with its name.
    """
    path = place_of(Path(path))
    if _is_adapter(path):
        return _adapted(path, dtype)
    if path.suffix == ".gguf":
        reader = gguf.read(path)
        words = tokenizer.from_gguf(reader)
        config, params = gguf.load(reader, dtype)
        return _fitting(path, config, words), params, words
    words = tokenizer.from_folder(path)
    config, params = hf.load(path, dtype)
    return _fitting(path, config, words), params, words


def place_of(path: Path) -> Path:
    """The file or the folder that holds a model or an adapter: of the folder of a run, what the run left there. Raises ``ValueError`` where there is none."""
    for name in (MODEL, ADAPTER):
        if (path / name).is_dir():
            return path / name
    if _is_run(path):
        raise ValueError(f"{path} is a run that has left no model yet: it leaves one when it ends")
    if _is_run(path.parent) and path.name not in (MODEL, ADAPTER, BASE):
        raise ValueError(f"{path} holds no model; name the folder of its run, {path.parent}")
    if path.suffix != ".gguf" and not path.is_dir():
        name = str(path)
        hub = f"; a model of Hugging Face's hub is fetched by `hf download {name} --local-dir FOLDER`"
        raise ValueError(
            f"{path} must be a folder, or a .gguf file{hub if name.count('/') == 1 and name[0] not in './' else ''}"
        )
    return path


def base_of(path: Path) -> Path | None:
    """The folder or file of the whole model that is read from a path; None where that is a model under an adapter."""
    place = place_of(path)
    return None if _is_adapter(place) else place


def files_of(path: Path) -> list[Path]:
    """The files that a model is read from, the model under an adapter among them."""
    place = place_of(path)
    if place.is_file():
        return [place]
    found = sorted(file for file in place.iterdir() if file.suffix in (".json", ".jinja", ".safetensors"))
    return found + (files_of(_under(place)) if _is_adapter(place) else [])


def _is_run(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and "settings" in hf.read_json(config)


def _is_adapter(folder: Path) -> bool:
    return (folder / peft.CONFIG).is_file()


def _under(folder: Path) -> Path:
    """The model that an adapter's folder names."""
    base = hf.read_json(folder / peft.CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or not Path(base).exists():
        raise ValueError(
            f"{folder / peft.CONFIG}: base_model_name_or_path must be the folder or file of the model that the adapter belongs to; there is no {base!r}"
        )
    return Path(base)


def _adapted(folder: Path, dtype: jax.typing.DTypeLike) -> tuple[Config, dict[str, Any], Tokenizer]:
    """The model that an adapter's folder names, under the adapter."""
    config, params, words = load(_under(folder), dtype)
    what, trained = peft.load(folder, config)
    adapter = adapters.make(what, config)
    merges = what.kind in adapters.BESIDE_MATRICES
    return config, adapter.merge(params, trained) if merges else adapter.beside(params, trained, ""), words


def save(folder: str | Path, config: Config, params: Params, words: Tokenizer) -> None:
    """A folder in Hugging Face's layout that ``load`` reads, with the tokenizer's files as they were. Raises as ``hf.save`` does."""
    hf.save(folder, _fitting(folder, config, words), params, more={"eos_token_id": list(words.ends)})
    words.save(folder)


def _fitting(path: str | Path, config: Config, words: Tokenizer) -> Config:
    if words.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer's ids go up to {words.vocab_size - 1}, and the model's table has {config.vocab_size} rows"
        )
    return config
