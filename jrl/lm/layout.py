"""Where the tensors of a published checkpoint lie in the decoder's parameters, under the names that Hugging Face's files use.

A linear map is ``[out, in]`` in the file and ``[in, out]`` here, with heads and their width as axes of their own; layers, and
experts in them, are stacked. Rotary positions may turn neighbouring numbers in the file (0 with 1, 2 with 3); here, they turn halves.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.nets import transformer
from jrl.nets.mixers import Leaf
from jrl.nets.transformer import Config
from jrl.numerics import precision
from jrl.numerics.types import Params

Path = tuple[str, ...]


class Tensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        name: in the file.
        shape: in the file.
        leaves: the parameters that it holds, side by side in the last axis.
        at: which part of them: the layer, and the expert.
        pairs: so many of the last numbers of each row are pairs of neighbours, to be turned together.
        flipped: a linear map, with its input last.
    """

    name: str
    shape: tuple[int, ...]
    leaves: tuple[Path, ...]
    at: tuple[int, ...] = ()
    pairs: int = 0
    flipped: bool = True


def tensors(config: Config, *, pairs: bool = False) -> list[Tensor]:
    """All tensors of a decoder, under Hugging Face's names.

    ``pairs``: rotary positions turn neighbours in the file, as they do in llama's GGUF and always in DeepSeek-V3's files.
    """
    d, v = config.dim, config.vocab_size
    found = [Tensor("model.embed_tokens.weight", (v, d), (("embedding",),), flipped=False)]
    found.append(Tensor("model.norm.weight", (d,), (("norm",),)))
    if not config.tie_embeddings:
        found.append(Tensor("lm_head.weight", (v, d), (("head",),)))
    number = 0
    for stack, shape in transformer.stacks(config).items():
        layer = _attention(shape, pairs) + _feed_forward(shape)
        for i in range(shape.num_layers):
            for x in layer:
                leaves = tuple((stack, *path) for path in x.leaves)
                found.append(x._replace(name=f"model.layers.{number}.{x.name}", leaves=leaves, at=(i, *x.at)))
            number += 1
    for i in range(config.ahead):
        found += [x._replace(name=f"model.layers.{number + i}.{x.name}", at=(i, *x.at)) for x in _ahead(layer, d)]
    return found


def _ahead(layer: list[Tensor], d: int) -> list[Tensor]:
    """Of a module that predicts a token further ahead: its layer, and what joins and norms. Files have copies of embedding and head in it."""
    more = [
        Tensor("enorm.weight", (d,), (("token_norm",),)),
        Tensor("hnorm.weight", (d,), (("hidden_norm",),)),
        Tensor("eh_proj.weight", (d, 2 * d), (("join",),)),
        Tensor("shared_head.norm.weight", (d,), (("norm",),)),
    ]
    return [x._replace(leaves=tuple(("ahead", *path) for path in x.leaves)) for x in [*more, *layer]]


def enough(config: Config, held: int, where: str) -> None:
    """Raise ``ValueError`` where so many tensors cannot be those of so many layers and experts: they need not be listed."""
    experts = config.experts.experts
    if config.num_layers + (config.num_layers - config.dense_layers) * experts > held:
        raise ValueError(
            f"{where}: {held} tensors are too few for {config.num_layers} layers"
            + f" of {experts} experts" * bool(experts)
        )


def _attention(config: Config, pairs: bool) -> list[Tensor]:
    d, h, k, w = config.dim, config.num_heads, config.num_kv_heads, config.width
    out = h * config.value_width
    found = [
        Tensor("input_layernorm.weight", (d,), (("attention_norm",),)),
        Tensor("self_attn.o_proj.weight", (d, out), (("o",),)),
    ]
    if config.out_bias:
        found.append(Tensor("self_attn.o_proj.bias", (d,), (("o_bias",),)))
    if config.attention == "mla":
        return found + _latent(config)
    for x, heads in (("q", h), ("k", k), ("v", k)):
        turned = w if pairs and x != "v" else 0
        found.append(Tensor(f"self_attn.{x}_proj.weight", (heads * w, d), ((x,),), pairs=turned))
        if config.qkv_bias:
            found.append(Tensor(f"self_attn.{x}_proj.bias", (heads * w,), ((f"{x}_bias",),), pairs=turned))
        if config.qk_norm and x != "v":
            found.append(Tensor(f"self_attn.{x}_norm.weight", (w,), ((f"{x}_norm",),), pairs=turned))
    return found


def _latent(config: Config) -> list[Tensor]:
    d, h, c = config.dim, config.num_heads, config.latent
    rope, query = c.rope_dim, h * (c.nope_dim + c.rope_dim)
    kv = h * (c.nope_dim + c.value_dim)

    def at(*names):
        return tuple(("latent", name) for name in names)

    found = [
        Tensor("self_attn.kv_a_proj_with_mqa.weight", (c.latent + rope, d), at("down", "key"), pairs=rope),
        Tensor("self_attn.kv_a_layernorm.weight", (c.latent,), at("norm")),
        Tensor("self_attn.kv_b_proj.weight", (kv, c.latent), at("up_key", "up_value")),
    ]
    if not c.query_latent:
        return [*found, Tensor("self_attn.q_proj.weight", (query, d), at("query"), pairs=rope)]
    return [
        *found,
        Tensor("self_attn.q_a_proj.weight", (c.query_latent, d), at("query_down")),
        Tensor("self_attn.q_a_layernorm.weight", (c.query_latent,), at("query_norm")),
        Tensor("self_attn.q_b_proj.weight", (query, c.query_latent), at("query"), pairs=rope),
    ]


def _feed_forward(config: Config) -> list[Tensor]:
    d, moe = config.dim, config.experts
    found = [Tensor("post_attention_layernorm.weight", (d,), (("ffn_norm",),))]
    if not moe.experts:
        found += _swiglu("mlp.", d, config.inner)
        sizes = {"gate": config.inner, "up": config.inner, "down": d} if config.ffn_bias else {}
        return found + [Tensor(f"mlp.{x}_proj.bias", (n,), ((f"{x}_bias",),)) for x, n in sizes.items()]
    mixtral = moe.scores == "softmax"
    block = "block_sparse_moe" if mixtral else "mlp"
    found.append(Tensor(f"{block}.gate.weight", (moe.experts, d), (("router",),)))
    if not mixtral:
        found.append(Tensor("mlp.gate.e_score_correction_bias", (moe.experts,), (("bias",),)))
    for e in range(moe.experts):
        expert = _swiglu(f"{block}.experts.{e}.", d, moe.expert_dim, ("w1", "w3", "w2") if mixtral else PROJECTIONS)
        found += [x._replace(at=(e,)) for x in expert]
    if moe.shared:
        found += _swiglu("mlp.shared_experts.", d, moe.shared * moe.expert_dim, leaves="shared_")
    return found


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _swiglu(prefix: str, d: int, f: int, names: tuple[str, ...] = PROJECTIONS, leaves: str = "") -> list[Tensor]:
    shapes = {"gate": (f, d), "up": (f, d), "down": (d, f)}
    return [
        Tensor(f"{prefix}{name}.weight", shape, ((f"{leaves}{leaf}",),))
        for name, (leaf, shape) in zip(names, shapes.items(), strict=True)
    ]


# Numbers of a file into parameters, and back


def gather(
    config: Config, wanted: list[Tensor], get: Callable[[str], np.ndarray], dtype: jax.typing.DTypeLike
) -> dict[str, Any]:
    """Parameters of ``dtype`` (those of ``precision.FLOAT32`` are float32 in any case) from the file's arrays, ``get(name)``."""
    shapes = _by_path(transformer.leaves(config))
    groups: dict[tuple[Path, ...], list[Tensor]] = {}
    for x in wanted:
        groups.setdefault(x.leaves, []).append(x)
    params: dict[str, Any] = {}
    for leaves, group in groups.items():  # one after another, so that no second copy of all numbers is held
        kind = np.float32 if precision.stays_float32(leaves[0], shapes) else jnp.dtype(dtype)
        arrays = [np.empty(shapes[leaf].shape, kind) for leaf in leaves]
        for x in group:
            parts = [array[x.at] for array in arrays]
            cuts = np.cumsum([part.shape[-1] for part in parts])
            rows = _rows(get(x.name), x).reshape(*parts[0].shape[:-1], cuts[-1])
            for array, part in zip(arrays, np.split(_halves(rows, x.pairs), cuts[:-1], axis=-1), strict=True):
                array[x.at] = part
        for leaf, array in zip(leaves, arrays, strict=True):
            node = params
            for name in leaf[:-1]:
                node = node.setdefault(name, {})
            node[leaf[-1]] = jnp.asarray(array)
    return params


def scatter(params: Params, wanted: list[Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """The file's arrays, by name, of the parameters."""
    leaves = {path: np.asarray(x) for path, x in _by_path(params).items()}
    for x in wanted:
        parts = [leaves[leaf][x.at] for leaf in x.leaves]
        rows = _neighbours(np.concatenate(parts, axis=-1), x.pairs)
        linear = x.flipped and len(x.shape) == 2
        yield x.name, np.ascontiguousarray(rows.reshape(x.shape[::-1]).T if linear else rows.reshape(x.shape))


def dtype_of(params: Params, tensor: Tensor) -> np.dtype:
    """Of a tensor of the file."""
    for name in tensor.leaves[0]:
        params = params[name]
    return params.dtype


def _rows(x: np.ndarray, tensor: Tensor) -> np.ndarray:
    return x.T if tensor.flipped and x.ndim == 2 else x


def _halves(rows: np.ndarray, pairs: int) -> np.ndarray:
    """The last ``pairs`` numbers, neighbours, as two halves."""
    if not pairs:
        return rows
    turned = rows[..., -pairs:]
    return np.concatenate([rows[..., :-pairs], turned[..., 0::2], turned[..., 1::2]], axis=-1)


def _neighbours(rows: np.ndarray, pairs: int) -> np.ndarray:
    """Back from halves."""
    if not pairs:
        return rows
    turned = rows[..., -pairs:].reshape(*rows.shape[:-1], 2, pairs // 2)
    return np.concatenate([rows[..., :-pairs], np.swapaxes(turned, -1, -2).reshape(*rows.shape[:-1], pairs)], axis=-1)


def _by_path(tree: Any) -> dict[Path, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, Leaf))
    return {tuple(key.key for key in path): x for path, x in flat}


def check_shapes(params: Params, config: Config) -> None:
    """Raise ``ValueError`` unless the parameters are those of the decoder."""
    wanted = {path: x.shape for path, x in _by_path(transformer.leaves(config)).items()}
    given = {path: x.shape for path, x in _by_path(params).items()}
    for path in wanted | given:
        if wanted.get(path) != given.get(path):
            raise ValueError(f"params{list(path)}: wanted {say(wanted.get(path))}; got {say(given.get(path))}")


def say(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
