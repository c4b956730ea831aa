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

MODEL, ADAPTER = "model", "adapter"  # what a run leaves in its folder


def load(path: str | Path, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[Config, dict[str, Any], Tokenizer]:
    """Configuration, parameters of ``dtype`` (``precision.FLOAT32`` apart) and tokenizer, of a folder in Hugging Face's layout or of a ``.gguf`` file.

    The folder of a run of ``experiments/lm.py`` will do, too: its model, or the model that it began with under its adapter, which is merged where it
    has a place in the parameters and else stands beside them. Raises ``ValueError`` for anything about them that is missing, damaged or cannot be
    done, with its name.
    """
    path = Path(path)
    if (path / MODEL).is_dir():
        path = path / MODEL
    elif (path / ADAPTER).is_dir():
        return _adapted(path / ADAPTER, dtype)
    if path.suffix == ".gguf":
        reader = gguf.read(path)
        words = tokenizer.from_gguf(reader)
        config, params = gguf.load(reader, dtype)
        return _fitting(path, config, words), params, words
    if not path.is_dir():
        raise ValueError(f"{path} must be a folder, or a .gguf file")
    words = tokenizer.from_folder(path)
    config, params = hf.load(path, dtype)
    return _fitting(path, config, words), params, words


def _adapted(folder: Path, dtype: jax.typing.DTypeLike) -> tuple[Config, dict[str, Any], Tokenizer]:
    """The model that an adapter's folder names, under the adapter."""
    base = hf.read_json(folder / peft.CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not Path(base).exists():
        raise ValueError(
            f"{folder}: base_model_name_or_path must be the model that the adapter belongs to; there is no {base!r}"
        )
    config, params, words = load(base, dtype)
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
