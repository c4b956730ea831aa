"""A published language model, whole."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jrl.lm import gguf, hf, tokenizer
from jrl.lm.tokenizer import Tokenizer
from jrl.nets.transformer import Config


def load(path: str | Path, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[Config, dict[str, Any], Tokenizer]:
    """Configuration, parameters of ``dtype`` and tokenizer, of a folder in Hugging Face's layout or of a ``.gguf`` file.

    Raises ``ValueError`` for anything about them that is missing, damaged or cannot be done, with its name.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        reader = gguf.read(path)
        words = tokenizer.from_gguf(reader)
        return *gguf.load(reader, dtype), words
    if not path.is_dir():
        raise ValueError(f"{path} must be a folder, or a .gguf file")
    words = tokenizer.from_folder(path)
    return *hf.load(path, dtype), words
