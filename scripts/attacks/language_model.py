"""A tiny language model in Hugging Face's layout, and problems for it."""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import tokenizers
from tokenizers import models, pre_tokenizers

from jrl.lm import hf
from jrl.nets import transformer

FOLDER = Path(tempfile.gettempdir()) / "jrl-tiny-model"
SYMBOLS = ["<end>", "say", *"0123456789"]
PROBLEMS = """
from jrl.lm import verifiers


def make(seed, largest=3):
    items = [verifiers.Item(f"say {i}", str(i)) for i in range(largest + 1)]
    return verifiers.from_function(items, lambda items, texts: [float(i.data in t) for i, t in zip(items, texts)], "say")
"""
WORDS = (
    *("--model", str(FOLDER), "--dataset", str(FOLDER / "say.py"), "--prompt-length", "4", "--answer-length", "3"),
    *("--config.adapter.rank", "4", "--hyper.learning-rate", "0.01"),
)


SHAPE = transformer.Config(vocab_size=len(SYMBOLS), dim=16, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=32)


def make(folder: Path = FOLDER) -> None:
    """Write the model and the problems into a folder; this uses a device."""
    folder.mkdir(exist_ok=True)
    hf.save(folder, SHAPE, transformer.init(jax.random.key(0), SHAPE))
    write_words(folder)
    (folder / "say.py").write_text(PROBLEMS)


def write_words(folder: Path, **settings: Any) -> None:
    """Write the model's tokenizer, with more settings."""
    (folder / "tokenizer.json").write_text(words())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"} | settings))


def words() -> str:
    """The text of ``tokenizer.json``."""
    made = tokenizers.Tokenizer(models.WordLevel({x: i for i, x in enumerate(SYMBOLS)}, "<end>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made.to_str()
