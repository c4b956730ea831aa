"""Tokens a second of a language model of a published shape, with random weights: sampling, training, and GRPO end to end.

    bash scripts/bench --algo grpo --model-shape smollm2-135m
    bash scripts/run scripts/bench_language.py --shape qwen3-0.6b --train-rows 4 --train-length 4096
    bash scripts/gpu_check --language qwen3-0.6b          the same programs compiled for an H100 that is not there

Sampling answers prompts, none of which ends before the longest answer. Training is a step of supervised learning on full rows. GRPO is an update: sampling, and
one gradient step on all answers; its tokens are those of the answers, and what sampling and training alone would give is beside it. Where the card is known, a
step of decoding is compared with the time in which its memory could be read (parameters, and the cache half full), and training with the peak of its products.
With torch and transformers installed, their training step and their ``generate`` are measured on the same card.
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jrl.algos import grpo, sft
from jrl.lm.model import decoder
from jrl.lm.texts import Texts
from jrl.nets import transformer
from jrl.numerics import checks, optim, precision
from jrl.run import cli, report
from jrl.run.timing import fastest

Array = jax.Array
SHAPES = {
    "smollm2-135m": transformer.Config(
        49152, dim=576, num_layers=30, num_heads=9, num_kv_heads=3, ffn_dim=1536, rope_theta=100_000.0
    ),
    "qwen3-0.6b": transformer.Config(
        151936, dim=1024, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, ffn_dim=3072, rope_theta=1e6, norm_eps=1e-6, qk_norm=True
    ),
    "tiny": transformer.Config(256, dim=32, num_layers=2, num_heads=4, num_kv_heads=2),
}  # fmt: skip
# Bytes a second of memory and products in bfloat16 a second (dense), as their maker gives them.
CARDS = {"H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12), "A100": (2.0e12, 312e12)}
Shape = Literal["smollm2-135m", "qwen3-0.6b", "tiny"]


@dataclass(frozen=True)
class Args:
    """Measure a language model of a published shape."""

    shape: Shape = "smollm2-135m"  # smollm2-135m, qwen3-0.6b, or tiny, which tries the command.
    rows: int = 64  # Answers that are sampled at once.
    group_size: int = 8  # Answers to each prompt.
    prompt: int = 64  # Tokens of a prompt.
    answer: int = 256  # Tokens of an answer.
    train_rows: int = 64  # Rows of a training step.
    train_length: int = 256  # Tokens of a row.
    micro_batches: int = 1  # Parts in which a training step is computed.
    precision: str = (
        "bfloat16"  # float32, bfloat16, pure_bfloat16, or like params=float32,compute=bfloat16,output=float32.
    )
    remat: bool = True  # Compute layers again in the backward pass instead of keeping them.
    repeats: int = 3  # Measurements, of which the best counts.
    folder: Path = Path("runs/bench")  # Folder for the table.


class Program(NamedTuple):
    """What is timed: a function of a state, which it may write over, and of data; and the tokens that a call is worth."""

    function: Callable[..., Any]
    init: Callable[[Array], Any]
    data: Callable[[Array], Any]
    tokens: int
    donates: bool


def model_of(args: Args) -> transformer.Config:
    return replace(SHAPES[args.shape], remat=args.remat)


def programs(args: Args) -> dict[str, Program]:
    """The programs. Raises ``ValueError`` for sizes that do not fit each other."""
    for name in ("rows", "group_size", "prompt", "answer", "train_rows", "train_length", "micro_batches", "repeats"):
        checks.positive_int(name, getattr(args, name))
    for name, of in (("group_size", "rows"), ("micro_batches", "rows"), ("micro_batches", "train_rows")):
        if getattr(args, of) % getattr(args, name):
            raise ValueError(f"{name} must divide {of} = {getattr(args, of)}; got {getattr(args, name)}")
    policy, shape = precision.parse(args.precision), model_of(args)
    model = decoder(shape, policy.compute)
    config = grpo.Config(
        num_prompts=args.rows // args.group_size, group_size=args.group_size, num_minibatches=1, micro_batches=args.micro_batches,
        kl="none", precision=args.precision, optimizer=optim.OptimizerConfig("adamw", schedule="constant"),
    )  # fmt: skip
    taught = sft.Config(
        batch_size=args.train_rows,
        micro_batches=args.micro_batches,
        precision=args.precision,
        optimizer=config.optimizer,
    )
    answering = grpo.learner(model, config, length=args.answer, end=-1, pad=0)
    teaching = sft.learner(model, taught, packed=False)

    def params(key: Array) -> Any:
        return precision.cast_params(transformer.init(key, shape), policy.params)

    def asked(key: Array) -> tuple[Array, Array]:
        prompts = jax.random.randint(key, (config.num_prompts, args.prompt), 0, shape.vocab_size)
        return jnp.repeat(prompts, args.group_size, axis=0), jnp.ones((args.rows, args.prompt), bool)

    def texts(key: Array) -> Texts:
        size = (args.train_rows, args.train_length)
        return Texts(
            jax.random.randint(key, size, 0, shape.vocab_size), jnp.ones(size, bool), jnp.ones(size, jnp.int32)
        )

    def learn(state: Any, data: Texts) -> Any:
        return teaching.learn(state, state.key, data)

    def say(state: Any, data: tuple[Array, Array]) -> Any:
        return answering.sample(state, state.key, *data)

    def update(state: Any, data: tuple[Array, Array]) -> Any:
        key = jax.random.split(state.key)[0]
        said = answering.sample(state, key, *data)
        return answering.learn(state, key, *data, said, jax.random.uniform(key, (args.rows,)))

    def init(learner: Any, hyper: Any) -> Callable[[Array], Any]:
        return lambda key: learner.init(key, params(key), hyper)

    answers = args.rows * args.answer
    return {
        "sampling": Program(say, init(answering, grpo.Hyper()), asked, answers, False),
        "training": Program(learn, init(teaching, sft.Hyper()), texts, args.train_rows * args.train_length, True),
        "GRPO, an update": Program(update, init(answering, grpo.Hyper()), asked, answers, True),
    }


def compiled(program: Program, place: Any = None) -> Any:
    """A program for the device that there is, or for ``place``."""
    key = jax.random.key(0)
    shapes = jax.eval_shape(program.init, key), jax.eval_shape(program.data, key)
    if place is not None:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    placed = {} if place is None else {"out_shardings": place}
    return jax.jit(program.function, donate_argnums=(0,) if program.donates else (), **placed).lower(*shapes).compile()


def gib(program: Any) -> float:
    """Memory of a compiled program."""
    used = program.memory_analysis()
    return (used.temp_size_in_bytes + used.argument_size_in_bytes) / 2**30


def measured(program: Program, repeats: int) -> tuple[float, float, float]:
    """Seconds of a call, the best of several; seconds of compiling; GiB."""
    begin = time.perf_counter()
    run = compiled(program)
    compiling = time.perf_counter() - begin
    state, data = jax.jit(program.init)(jax.random.key(0)), jax.jit(program.data)(jax.random.key(1))

    def call() -> Any:
        nonlocal state
        found = run(state, data)
        if program.donates:
            state = found[0]
        return found

    return fastest({"call": call}, repeats)["call"], compiling, gib(run)


# What the card could do


def card() -> tuple[float, float] | None:
    """Bytes and products a second of the device, where they are known."""
    kind = jax.devices()[0].device_kind
    return next((figures for name, figures in CARDS.items() if name in kind), None)


def size_of(shape: transformer.Config) -> int:
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: transformer.init(jax.random.key(0), shape))))


def floor_of_a_step(args: Args, bytes_a_second: float) -> float:
    """Seconds in which the parameters and the half-filled cache are read."""
    shape, width = model_of(args), jnp.dtype(precision.parse(args.precision).compute).itemsize
    cached = 2 * shape.num_layers * shape.num_kv_heads * shape.width * (args.prompt + args.answer / 2) * args.rows
    return width * (size_of(shape) + cached) / bytes_a_second


def products(args: Args) -> float:
    """Multiplications and additions of training on one token: 6 a parameter, and 12 a number of the heads for each of the tokens that causal attention sees, on
    the average half of a row (Chowdhery et al. 2022, 2204.02311, appendix B)."""
    shape = model_of(args)
    return 6 * size_of(shape) + 12 * shape.num_layers * shape.num_heads * shape.width * args.train_length / 2


def of_the_card(name: str, args: Args, tokens_a_second: float) -> str:
    """How near to what the card could do."""
    if (figures := card()) is None:
        return ""
    if name == "sampling":
        step = args.rows / tokens_a_second
        return f"a step takes {step / floor_of_a_step(args, figures[0]):.1f} times its reading"
    if name == "training":
        return f"MFU {100 * tokens_a_second * products(args) / figures[1]:.0f}%"
    return ""


# The same with torch


def of_transformers(args: Args) -> dict[str, float]:
    """Tokens a second of the library transformers, sampling and training, in the dtype of the products; nothing where it is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return {}
    import torch
    import transformers

    shape = model_of(args)
    family = transformers.Qwen3Config if shape.qk_norm else transformers.LlamaConfig
    config = family(
        vocab_size=shape.vocab_size, hidden_size=shape.dim, intermediate_size=shape.inner, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads, head_dim=shape.width, tie_word_embeddings=True,
        max_position_embeddings=max(args.train_length, args.prompt + args.answer), eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, jnp.dtype(precision.parse(args.precision).compute).name)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rows = torch.randint(shape.vocab_size, (args.train_rows, args.train_length), device=device)
    prompts = torch.randint(shape.vocab_size, (args.rows, args.prompt), device=device)

    def learn() -> float:
        for part in rows.chunk(args.micro_batches):
            (model(input_ids=part, labels=part).loss / args.micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(next(model.parameters()).detach().sum())  # until it is done

    def say() -> float:
        with torch.inference_mode():
            said = model.generate(prompts, do_sample=True, min_new_tokens=args.answer, max_new_tokens=args.answer)
        return float(said.sum())

    taken = fastest({"sampling": say, "training": learn}, args.repeats)
    return {"sampling": args.rows * args.answer / taken["sampling"], "training": rows.numel() / taken["training"]}


def main(args: Args) -> None:
    shape = model_of(args)
    print(
        f"{args.shape}: {size_of(shape):,} parameters, {args.precision}, on {jax.devices()[0].device_kind}", flush=True
    )
    rows: list[dict[str, str]] = []
    speeds: dict[str, float] = {}
    for name, program in programs(args).items():
        taken, compiling, memory = measured(program, args.repeats)
        speeds[name] = program.tokens / taken
        rows.append({
            "what": name, "tokens/s": f"{speeds[name]:,.0f}", "of the card": of_the_card(name, args, speeds[name]), "GiB": f"{memory:.2f}",
            "compile s": f"{compiling:.0f}",
        })  # fmt: skip
        print(f"{name}: {rows[-1]['tokens/s']} tokens/s", flush=True)
    read = args.rows * (args.prompt + args.answer) / speeds["training"]
    alone = args.rows * args.answer / (args.rows * args.answer / speeds["sampling"] + read)
    rows[-1]["of the card"] = f"{100 * speeds['GRPO, an update'] / alone:.0f}% of sampling and training alone"
    for name, speed in of_transformers(args).items():
        rows.append(
            {
                "what": f"{name}, transformers",
                "tokens/s": f"{speed:,.0f}",
                "of the card": "",
                "GiB": "",
                "compile s": "",
            }
        )
    report.print_table(args.folder / "language.csv", rows)


if __name__ == "__main__":
    cli.main(lambda argv: main(cli.parse(Args, argv, doc=__doc__)))
