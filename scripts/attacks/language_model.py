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
    *("--config.lora-rank", "4", "--hyper.learning-rate", "0.01"),
)


def make() -> None:
    """Write the model; in a process of its own, for it uses a device."""
    FOLDER.mkdir(exist_ok=True)
    config = transformer.Config(vocab_size=len(SYMBOLS), dim=16, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=32)
    hf.save(FOLDER, config, transformer.init(jax.random.key(0), config))
    write_words(FOLDER)


def write_words(folder: Path, **settings: Any) -> None:
    """The model's tokenizer, with more settings, and the problems."""
    words = tokenizers.Tokenizer(models.WordLevel({x: i for i, x in enumerate(SYMBOLS)}, "<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"} | settings))
    (folder / "say.py").write_text(PROBLEMS)
