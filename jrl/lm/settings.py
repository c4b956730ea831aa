"""``config.json`` of Hugging Face's models as the decoder's configuration, and back.

Read are the keys that ``transformers`` reads for the family; of those, whatever the decoder cannot do is refused by name. Both
ways of writing are read: ``rope_parameters`` (since version 5), and ``rope_theta`` with ``rope_scaling``, which is written.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jrl.attention import mla, nsa
from jrl.attention.rotary import Scaling
from jrl.nets import moe
from jrl.nets.transformer import Config
from jrl.numerics import checks

Settings = Mapping[str, Any]

MOST = float(np.finfo(np.float32).max)
MOST_LAYERS = 10_000  # of a file; far more than any has, and few enough to be listed

# Of rope_parameters, by type; each may say its base as well.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


# Reading


def read(found: Settings) -> Config:
    """The decoder's configuration. Raises ``ValueError`` for a family or a setting that it cannot do."""
    checks.one_of("model_type", found.get("model_type"), ARCHITECTURES)
    family = found["model_type"]
    _only(found, "hidden_act", "silu", "swish")
    _only(found, "quantization_config", None)
    _only(found, "partial_rotary_factor", None, 1)
    if family != "llama":
        _only(found, "mlp_bias", None, False)
    if family in ("mixtral", "deepseek_v3"):
        _only(found, "attention_bias", None, False)
    shared = {
        "vocab_size": _size(found, "vocab_size"),
        "dim": _size(found, "hidden_size"),
        "num_layers": _layers(found),
        "num_heads": _size(found, "num_attention_heads"),
        "norm_eps": _number(found, "rms_norm_eps", 1e-5 if family == "mixtral" else 1e-6),
        "tie_embeddings": _flag(found, "tie_word_embeddings"),
        "ffn_dim": _size(found, "intermediate_size"),
    }
    return (_deepseek if family == "deepseek_v3" else _ordinary)(found, family, shared)


def _ordinary(found: Settings, family: str, shared: dict[str, Any]) -> Config:
    heads = shared["num_heads"]
    theta, scaling = _rope(found, 1e6 if family == "mixtral" else 1e4)
    biased = family == "qwen2" or _flag(found, "attention_bias")
    experts = moe.Config()
    if family == "mixtral":
        chosen = _size(found, "num_experts_per_tok", 2)
        experts = moe.Config(_size(found, "num_local_experts", 8), chosen, shared["ffn_dim"])
    return Config(
        **shared | _window(found, family, shared["num_layers"]),
        num_kv_heads=_size(found, "num_key_value_heads", {"mixtral": 8, "llama": heads}.get(family, 32), null=heads),
        head_dim=_size(found, "head_dim", 128 if family == "qwen3" else 0, null=0),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=biased,
        out_bias=biased and family != "qwen2",
        ffn_bias=family == "llama" and _flag(found, "mlp_bias"),
        qk_norm=family == "qwen3",
        experts=experts,
    )


def _window(found: Settings, family: str, layers: int) -> dict[str, Any]:
    """All layers' kind of attention, which has to be one."""
    if family in ("llama", "deepseek_v3"):
        _only(found, "sliding_window", None)
        _only(found, "use_sliding_window", None, False)
        return {}
    if family == "mixtral":
        window = _size(found, "sliding_window", 0, null=0)
        return {"attention": "window", "window": window} if window else {}
    window = _size(found, "sliding_window", 4096, null=0) if _flag(found, "use_sliding_window") else 0
    kinds = found.get("layer_types")
    if kinds is None:
        full = _size(found, "max_window_layers", 28, at_least=0) if window else layers
        kinds = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"layer_types must be a list of texts; got {kinds!r}")
    if len(kinds) != layers:
        raise ValueError(f"layer_types must name num_hidden_layers = {layers} layers; got {len(kinds)}")
    if set(kinds) == {"full_attention"}:
        return {}
    if set(kinds) == {"sliding_attention"} and window:
        return {"attention": "window", "window": window}
    raise ValueError(
        "layer_types (by use_sliding_window, sliding_window and max_window_layers where not given) must be full_attention "
        f"for all layers, or sliding_attention with a window for all; got {', '.join(map(str, kinds))}"
    )


def _deepseek(found: Settings, family: str, shared: dict[str, Any]) -> Config:
    heads, layers = shared["num_heads"], shared["num_layers"]
    _only(found, "num_key_value_heads", None, heads)
    _only(found, "scoring_func", None, "sigmoid")
    _only(found, "topk_method", None, "noaux_tc")
    _only(found, "moe_layer_freq", None, 1)
    _flag(found, "rope_interleave", True)
    _window(found, family, layers)
    theta, scaling = _rope(found, 1e4)
    latent = mla.Config(
        latent=_size(found, "kv_lora_rank", 512),
        query_latent=_size(found, "q_lora_rank", 1536, null=0),
        nope_dim=_size(found, "qk_nope_head_dim", 128),
        rope_dim=_size(found, "qk_rope_head_dim", 64),
        value_dim=_size(found, "v_head_dim", 128),
        rope_theta=theta,
        rope_scaling=scaling,
    )
    dense = min(_size(found, "first_k_dense_replace", 3, null=0, at_least=0), layers)
    experts = moe.Config() if dense == layers else _experts(found)
    return Config(
        **shared,
        num_kv_heads=heads,
        head_dim=latent.rope_dim,
        attention="mla",
        latent=latent,
        experts=experts,
        dense_layers=dense if experts.experts else 0,
        ahead=_size(found, "num_nextn_predict_layers", 0, null=0, at_least=0),
    )


def _experts(found: Settings) -> moe.Config:
    return moe.Config(
        experts=_size(found, "n_routed_experts", 256),
        chosen=_size(found, "num_experts_per_tok", 8),
        expert_dim=_size(found, "moe_intermediate_size", 2048),
        shared=_size(found, "n_shared_experts", 1, null=0, at_least=0),
        scores="sigmoid",
        groups=_size(found, "n_group", 8, null=1),
        chosen_groups=_size(found, "topk_group", 4, null=1),
        normalize=_flag(found, "norm_topk_prob", True),
        scale=_number(found, "routed_scaling_factor", 2.5),
    )


def _rope(found: Settings, default: float) -> tuple[float, Scaling]:
    """Base and stretching of rotary positions."""
    name = "rope_scaling" if found.get("rope_scaling") else "rope_parameters"
    rope = found.get(name) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{name} must be an object; got {rope!r}")
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    checks.one_of(f"{name}.rope_type", kind, ROPE_KEYS)
    _only(rope, "partial_rotary_factor", None, 1)
    usual = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    for key in rope.keys() - usual - set(ROPE_KEYS[kind]):
        raise ValueError(f"{name}.{key} is not a setting of rope_type={kind}, which has {', '.join(ROPE_KEYS[kind])}")
    theta = _number(rope, "rope_theta", _number(found, "rope_theta", default))
    checks.above_zero("rope_theta", theta)
    if kind == "default":
        return theta, Scaling()
    longest = _size(found, "max_position_embeddings", 0, null=0)
    context = _size(found, "original_max_position_embeddings", 0, null=0)
    context = context or _size(rope, "original_max_position_embeddings", 0) or longest
    if kind == "linear":
        return theta, Scaling(kind, _number(rope, "factor"))
    if not context:
        raise ValueError(f"{name}.original_max_position_embeddings is missing")
    if kind == "llama3":
        slow, fast = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
        return theta, Scaling(kind, _number(rope, "factor"), context, slow, fast)
    return theta, Scaling(
        kind,
        _number(rope, "factor", longest / context if longest else None),
        context,
        _number(rope, "beta_slow", 1.0) or 1.0,
        _number(rope, "beta_fast", 32.0) or 32.0,
        whole=_flag(rope, "truncate", True),
        amplitude=_number(rope, "attention_factor", 0.0),
        mscale=_number(rope, "mscale", 0.0),
        mscale_all=_number(rope, "mscale_all_dim", 0.0),
    )


def _only(found: Settings, name: str, *allowed: Any) -> None:
    if name in found and found[name] not in allowed:
        said = ", ".join("null" if x is None else str(x).lower() for x in allowed)
        raise ValueError(f"{name} must be {said}: nothing else is done here; got {found[name]!r}")


MISSING: Any = object()


def _size(found: Settings, name: str, default: int = MISSING, null: int = MISSING, at_least: int = 1) -> int:
    """An integer; ``default`` where it is missing, as in ``transformers``, and ``null`` where it is null."""
    value = found.get(name, default)
    if value is MISSING:
        raise ValueError(f"{name} is missing")
    if value is None and null is not MISSING:
        return null
    if name in found:
        checks.positive_int(name, value, at_least)
    return value


def _layers(found: Settings) -> int:
    layers = _size(found, "num_hidden_layers")
    checks.within("num_hidden_layers", layers, 1, MOST_LAYERS)
    return layers


def _number(found: Settings, name: str, default: float | None = None) -> float:
    value = found.get(name)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{name} is missing")
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MOST:
        raise ValueError(f"{name} must be a number, finite in float32; got {value!r}")
    return float(value)


def _flag(found: Settings, name: str, default: bool = False) -> bool:
    value = found.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false; got {value!r}")
    return default if value is None else value


# Writing


def write(config: Config) -> dict[str, Any]:
    """``config.json`` of the family that has these settings. Raises ``ValueError`` where none has."""
    family = _family(config)
    found = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.experts.expert_dim if family == "mixtral" else config.inner,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **WRITERS[family](config),
    }
    rope = config.latent if family == "deepseek_v3" else config
    found |= _write_rope(rope.rope_theta, rope.rope_scaling)
    try:
        same = _essence(read(found)) == _essence(config)
    except ValueError as error:
        raise ValueError(f"this decoder is not one of {family}: {error}") from None
    if not same:
        raise ValueError(f"no family of {', '.join(ARCHITECTURES)} has all settings of this decoder: {config}")
    return found


def _family(config: Config) -> str:
    if config.attention == "mla":
        return "deepseek_v3"
    if config.experts.experts:
        return "mixtral"
    if config.qk_norm:
        return "qwen3"
    windowed = config.attention == "window"
    return "qwen2" if (config.qkv_bias and not config.out_bias) or windowed else "llama"


def _head_dim(config: Config) -> dict[str, Any]:
    return {"head_dim": config.head_dim} if config.head_dim else {}


def _write_window(config: Config) -> dict[str, Any]:
    windowed = config.attention == "window"
    kind = "sliding_attention" if windowed else "full_attention"
    return {
        **_head_dim(config),
        "use_sliding_window": windowed,
        "sliding_window": config.window if windowed else None,
        "max_window_layers": 0 if windowed else config.num_layers,
        "layer_types": [kind] * config.num_layers,
    }


def _write_mixtral(config: Config) -> dict[str, Any]:
    return {
        **_head_dim(config),
        "sliding_window": config.window if config.attention == "window" else None,
        "num_local_experts": config.experts.experts,
        "num_experts_per_tok": config.experts.chosen,
    }


def _write_deepseek(config: Config) -> dict[str, Any]:
    latent, experts = config.latent, config.experts
    found: dict[str, Any] = {
        "num_key_value_heads": config.num_heads,
        "kv_lora_rank": latent.latent,
        "q_lora_rank": latent.query_latent or None,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "rope_interleave": True,
        "num_nextn_predict_layers": config.ahead,
        "first_k_dense_replace": config.dense_layers if experts.experts else config.num_layers,
    }
    if experts.experts:
        found |= {
            "n_routed_experts": experts.experts,
            "num_experts_per_tok": experts.chosen,
            "moe_intermediate_size": experts.expert_dim,
            "n_shared_experts": experts.shared,
            "n_group": experts.groups,
            "topk_group": experts.chosen_groups,
            "norm_topk_prob": experts.normalize,
            "routed_scaling_factor": experts.scale,
        }
    return found


WRITERS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "llama": lambda c: _head_dim(c) | {"attention_bias": c.qkv_bias, "mlp_bias": c.ffn_bias},
    "qwen2": _write_window,
    "qwen3": lambda c: _write_window(c) | {"head_dim": c.width, "attention_bias": c.qkv_bias},
    "mixtral": _write_mixtral,
    "deepseek_v3": _write_deepseek,
}


def _write_rope(theta: float, scaling: Scaling) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    longest = 32_768
    if scaling.kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = scaling.context
        longest = int(scaling.context * scaling.factor)
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.slow, "high_freq_factor": scaling.fast}
    if scaling.kind == "yarn":
        rope |= {"beta_slow": scaling.slow, "beta_fast": scaling.fast, "truncate": scaling.whole}
        some = {"attention_factor": scaling.amplitude, "mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all}
        rope |= {name: value for name, value in some.items() if value}
    scaled = {"rope_scaling": None if scaling.kind == "none" else rope}
    return {"rope_theta": theta, "max_position_embeddings": longest, **scaled}


def _essence(config: Config) -> Config:
    """With what has no effect at its default."""
    plain, latent = Config(), config.attention == "mla"
    experts = config.experts if config.experts.experts else moe.Config()
    config = replace(
        config,
        head_dim=config.width,
        ffn_dim=0 if experts.experts and not config.dense_layers else config.inner,
        window=config.window if config.attention == "window" else plain.window,
        sparse=nsa.Config(),
        shared_kv=False,
        latent=config.latent if latent else plain.latent,
        experts=experts,
        implementation=None,
        remat=False,
    )
    if not latent:
        return config
    width = config.latent.rope_dim
    return replace(
        config, num_kv_heads=config.num_heads, head_dim=width, rope_theta=plain.rope_theta, rope_scaling=Scaling()
    )
