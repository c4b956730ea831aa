"""What of a decoder is trained, by settings: all of it, or a little beside it.

    full                everything
    lora, dora, ia3     matrices, lengths or numbers beside its matrices (``jrl.numerics.lora``)
    prefix              keys and values of virtual tokens before the first, in each layer (Li and Liang 2021, 2101.00190)
    prompt              vectors of virtual tokens before the first (Lester et al. 2021, 2104.08691)
    houlsby, pfeiffer   small networks behind its sublayers (``jrl.nets.bottleneck``)

    adapter = make(Config("lora", rank=16), shape)
    trained = adapter.init(key, params)
    params = adapter.beside(params, trained, transformer.low_rank(shape))

All but a prefix and a prompt leave the decoder as it is at the start; these two start as tokens that are drawn from the vocabulary (2101.00190,
section 7.4), and need dense attention.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jrl.nets import decoding, transformer
from jrl.nets.bottleneck import PLACES
from jrl.numerics import lora
from jrl.numerics.lora import Adapter
from jrl.numerics.settings import BelowOne, NonNegative, Positive, Settings
from jrl.numerics.types import Params

Array = jax.Array
Kind = Literal["full", "lora", "dora", "ia3", "prefix", "prompt", "houlsby", "pfeiffer"]
BESIDE_MATRICES = ("full", "lora", "dora", "ia3")  # which any network can have


@dataclass(frozen=True)
class Config(Settings, prefix="adapter"):
    """What is trained."""

    # full (all parameters), lora, dora, ia3, prefix, prompt, houlsby or pfeiffer.
    kind: Kind = "full"
    rank: Positive = 16  # Rank of lora and dora, and width of houlsby and pfeiffer.
    alpha: NonNegative = 0.0  # lora and dora add alpha / rank A B; twice the rank if 0.
    root: bool = False  # They add alpha / sqrt(rank) A B instead (rank-stabilized LoRA).
    targets: str = lora.MATRICES  # Regular expression for the matrices that lora and dora adapt, as layers/q.
    dropout: BelowOne = 0.0  # Share of the inputs of A that supervised learning drops.
    tokens: Positive = 16  # Virtual tokens of prefix and prompt.
    whole: str = ""  # Regular expression for parameters that are trained themselves beside lora, dora and ia3.

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("targets", "whole"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ValueError(f"adapter.{name} must be a regular expression: {error}") from None

    @property
    def trains_all(self) -> bool:
        """Whether all parameters are trained, and none is kept as it was."""
        return self.kind == "full"


def make(config: Config, shape: transformer.Config | None) -> Adapter:
    """The adapter of a decoder of that shape, or of another network.

    Raises ``ValueError`` for an adapter that the network cannot have.
    """
    if shape is None and config.kind not in BESIDE_MATRICES:
        raise ValueError(f"adapter.kind = {config.kind} needs a decoder of jrl.nets.transformer")
    match config.kind:
        case "full":
            return lora.full()
        case "lora":
            return lora.lora(config.rank, alpha_of(config), config.targets, **_more(config))
        case "dora":
            return lora.dora(config.rank, alpha_of(config), config.targets, **_more(config))
        case "ia3":
            return lora.ia3(whole=config.whole or None)
    assert shape is not None
    if config.kind in PLACES:
        return _bottleneck(shape, config.rank, PLACES[config.kind])
    if shape.attention != "dense" or shape.dense_layers:
        raise ValueError(
            f"adapter.kind = {config.kind} needs transformer.attention=dense and layers that are all alike"
        )
    return prefix(shape, config.tokens) if config.kind == "prefix" else prompt(shape, config.tokens)


def alpha_of(config: Config) -> float:
    """Alpha of lora and dora."""
    return config.alpha or 2.0 * config.rank


def _more(config: Config) -> dict[str, Any]:
    return {"root": config.root, "dropout": config.dropout, "whole": config.whole or None}


def prefix(shape: transformer.Config, tokens: int) -> Adapter:
    """Keys and values ``[layers, tokens, K, D]`` that every token sees, the keys without rotary positions; the first token stands at
    position ``tokens``."""

    def init(key: Array, params: Params) -> dict[str, Any]:
        k, v = _virtual(params, _some_tokens(key, params, tokens), shape)
        return {"layers": {"prefix_k": k.astype(jnp.float32), "prefix_v": v.astype(jnp.float32)}}

    return Adapter(init, _no_merge("a prefix"), _with_more)


def prompt(shape: transformer.Config, tokens: int) -> Adapter:
    """Vectors ``[tokens, dim]`` in the place of embeddings. What the others see of them are their keys and values in each layer, which
    nothing behind them changes: they are a prefix."""

    def init(key: Array, params: Params) -> dict[str, Array]:
        return {"prompt": _some_tokens(key, params, tokens).astype(jnp.float32)}

    def beside(params: Params, trained: dict[str, Array], pattern: str, key: Array | None = None) -> Any:
        k, v = _virtual(params, trained["prompt"], shape)
        return _with_more(params, {"layers": {"prefix_k": k, "prefix_v": v}}, pattern)

    return Adapter(init, _no_merge("a prompt"), beside)


def _some_tokens(key: Array, params: Params, tokens: int) -> Array:
    """Embeddings of tokens drawn at random."""
    table = params["embedding"]
    return table[jax.random.randint(key, (tokens,), 0, len(table))]


def _virtual(params: Params, embeddings: Array, shape: transformer.Config) -> tuple[Array, Array]:
    """Keys and values ``[layers, N, K, D]`` of a sequence of vectors ``[N, dim]``."""
    number = len(embeddings)
    with_them = params | {"embedding": embeddings.astype(params["embedding"].dtype)}
    cache = decoding.init_cache(shape, 1, number, embeddings.dtype)
    _, cache = decoding.prefill(with_them, jnp.arange(number)[None], cache, shape)
    return cache["layers"].k[:, 0], cache["layers"].v[:, 0]


def _bottleneck(shape: transformer.Config, width: int, places: tuple[str, ...]) -> Adapter:
    """Small networks ``[layers, ...]`` in the places named; what goes up starts at 0."""

    def init(key: Array, params: Params) -> dict[str, Any]:
        trained: dict[str, Any] = {}
        for name, stack in transformer.stacks(shape).items():
            layers, d = stack.num_layers, shape.dim
            for place in places:
                key, key_down = jax.random.split(key)
                trained.setdefault(name, {})[place] = {
                    "down": jax.random.normal(key_down, (layers, d, width)) * d**-0.5,
                    "down_bias": jnp.zeros((layers, width)),
                    "up": jnp.zeros((layers, width, d)),
                    "up_bias": jnp.zeros((layers, d)),
                }
        return trained

    return Adapter(init, _no_merge("a bottleneck"), _with_more)


def _with_more(params: Params, trained: dict[str, Any], pattern: str, key: Array | None = None) -> Any:
    """The parameters with those that the layers of each stack have besides."""
    return params | {name: params[name] | layers for name, layers in trained.items()}


def _no_merge(what: str) -> Any:
    def merge(params: Params, trained: Any) -> Any:
        raise ValueError(
            f"{what} stands beside the decoder's parameters, and has no place in them: save it as an adapter"
        )

    return merge
