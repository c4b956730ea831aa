"""GGUF files, as llama.cpp writes them, of any quantization that the ``gguf`` package can undo: llama, qwen2 and qwen3.

    config, params = gguf.load("SmolLM2-135M-Instruct.Q4_1.gguf")

In llama's files, queries and keys are reordered so that rotary positions turn neighbouring numbers.
"""

from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from jrl.attention.rotary import Scaling, frequencies
from jrl.lm import layout
from jrl.lm.settings import MOST_LAYERS
from jrl.nets.transformer import Config
from jrl.numerics import checks

FAMILIES = ("llama", "qwen2", "qwen3")
# Hugging Face's names, part by part.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def load(
    path: str | Path | gguf.GGUFReader, dtype: jax.typing.DTypeLike = jnp.float32
) -> tuple[Config, dict[str, Any]]:
    """The decoder's configuration and parameters of ``dtype`` (float32, bfloat16 or float16), with quantization undone, of a file
    or of what ``read`` gave.

    Raises ``ValueError`` for a file that is missing or damaged, an architecture or setting that the decoder cannot do, and a
    tensor that is missing, extra or of another shape, with its name.
    """
    checks.one_of("dtype", jnp.dtype(dtype).name, ("float32", "bfloat16", "float16"))
    reader = read(path)
    held = {x.name: x for x in reader.tensors}
    try:
        config = _config(reader, held)
        layout.enough(config, len(held), "the file")
        wanted = layout.tensors(config, pairs=metadata(reader, "general.architecture") == "llama")
        wanted = [x._replace(name=_name(x.name)) for x in wanted]
        _check(wanted, held)
    except Exception as error:  # metadata of a damaged file may be of any kind
        raise ValueError(f"{reader.data.filename}: {error}") from None

    def get(name: str) -> np.ndarray:
        x = held[name]
        try:
            return gguf.dequantize(x.data, x.tensor_type).reshape(x.shape[::-1])
        except NotImplementedError:
            where = f"{reader.data.filename}: tensor {name}"
            raise ValueError(f"{where}: quantization {x.tensor_type.name} cannot be undone") from None

    return config, layout.gather(config, wanted, get, dtype)


def read(path: str | Path | gguf.GGUFReader) -> gguf.GGUFReader:
    """The file's metadata and tensors, as yet on disk. Raises ``ValueError`` if it is missing or damaged."""
    if isinstance(path, gguf.GGUFReader):
        return path
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader indexes what it finds: a damaged file raises anything
        raise ValueError(f"{path} is damaged, or no GGUF file: {error}") from None


MISSING: Any = object()


def metadata(reader: gguf.GGUFReader, name: str, default: Any = MISSING) -> Any:
    """A value of the file's metadata; ``ValueError`` if it is missing and has no default."""
    field = reader.get_field(name)
    if field is None and default is MISSING:
        raise ValueError(f"{name} is missing")
    return default if field is None else field.contents()


def _config(reader: gguf.GGUFReader, held: dict[str, Any]) -> Config:
    family = metadata(reader, "general.architecture")
    checks.one_of("general.architecture", family, FAMILIES)

    def get(name, *default):
        return metadata(reader, f"{family}.{name}", *default)

    for name, allowed in (("expert_count", 0), ("attention.sliding_window", 0)):
        if get(name, allowed) != allowed:
            raise ValueError(f"{family}.{name} must be {allowed}: nothing else is read; got {get(name)!r}")
    if "token_embd.weight" not in held:
        raise ValueError("tensor token_embd.weight is missing")
    dim, heads = get("embedding_length"), get("attention.head_count")
    layers = get("block_count")
    for name, value in (("embedding_length", dim), ("attention.head_count", heads), ("block_count", layers)):
        checks.positive_int(f"{family}.{name}", value)
    checks.within(f"{family}.block_count", layers, 1, MOST_LAYERS)
    width = get("attention.key_length", dim // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if get(name, width) != width:
            raise ValueError(f"{family}.{name} must be the width of a head, {width}; got {get(name)}")
    biased = "blk.0.attn_q.bias" in held
    return Config(
        vocab_size=int(held["token_embd.weight"].shape[1]),
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=width,
        ffn_dim=get("feed_forward_length"),
        rope_theta=float(get("rope.freq_base", 10_000.0)),
        rope_scaling=_scaling(get, held),
        norm_eps=float(get("attention.layer_norm_rms_epsilon")),
        qkv_bias=biased,
        out_bias="blk.0.attn_output.bias" in held,
        ffn_bias="blk.0.ffn_gate.bias" in held,
        qk_norm="blk.0.attn_q_norm.weight" in held,
        tie_embeddings="output.weight" not in held,
    )


def _scaling(get: Any, held: dict[str, Any]) -> Scaling:
    kind = get("rope.scaling.type", "none")
    checks.one_of("rope.scaling.type", kind, ("none", "linear"))
    if "rope_freqs.weight" not in held:
        return Scaling("linear", float(get("rope.scaling.factor"))) if kind == "linear" else Scaling()
    # Llama 3's stretching, of which the file has the outcome alone: what each frequency is divided by.
    divisors = np.array(held["rope_freqs.weight"].data)
    theta = float(get("rope.freq_base", 10_000.0))
    scaling = Scaling("llama3", float(divisors.max()), 8192, 1.0, 4.0)
    stretched = frequencies(len(divisors), theta, scaling, jnp.float32) * divisors
    if kind != "none" or not np.allclose(
        stretched, frequencies(len(divisors), theta, Scaling(), jnp.float32), rtol=1e-4
    ):
        raise ValueError("tensor rope_freqs.weight: only Llama 3's stretching of rotary frequencies is read")
    return scaling


def _name(name: str) -> str:
    """GGUF's name of Hugging Face's."""
    for theirs, ours in NAMES.items():
        name = name.replace(f"{theirs}.", f"{ours}.")
    return name


def _check(wanted: list[layout.Tensor], held: dict[str, Any]) -> None:
    for x in wanted:
        if x.name not in held:
            raise ValueError(f"tensor {x.name} {list(x.shape)} is missing")
        shape = tuple(int(n) for n in held[x.name].shape[::-1])
        if shape != x.shape:
            raise ValueError(f"tensor {x.name} must be {list(x.shape)}; got {list(shape)}")
    for name in held.keys() - {x.name for x in wanted} - {"rope_freqs.weight"}:
        raise ValueError(f"tensor {name} {list(held[name].shape[::-1])} is not of a decoder with these settings")
