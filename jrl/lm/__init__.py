"""Language models: checkpoints that others published, and their tokenizers.

    config, params, tokenizer = lm.load("SmolLM2-135M-Instruct.Q4_1.gguf")       or a folder in Hugging Face's layout

    lm.save("mine", config, params, tokenizer)

``hf`` reads and writes Hugging Face's layout, ``gguf`` reads llama.cpp's. The model itself is ``jrl.nets.transformer``.
"""

from jrl.lm.models import load, save
from jrl.lm.tokenizer import Tokenizer

__all__ = ["Tokenizer", "load", "save"]
