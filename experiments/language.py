"""Small language models by kind of attention: do they reach the same loss, and do they find a needle in a haystack?

    bash scripts/run experiments/language.py                          this project's own text, byte by byte: loss by kind
    bash scripts/run experiments/language.py --task needle            one token among 4,096 is asked for at the end
    bash scripts/run experiments/language.py --task needle --length 16384

The needle is trained on short sequences first and then on longer ones, with as many tokens in each step; window attention cannot
reach it. Leaves language.csv and language.png in the folder, or needle.csv and needle.png. The text is what this project's files
are now: compare losses of one version of them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jrl.attention import dsa, nsa
from jrl.nets import transformer
from jrl.numerics import checks, optim
from jrl.run import cli, memory, plot, report

Array = jax.Array
Draw = Callable[[Array], tuple[Array, Array]]  # key -> tokens [B, T + 1], weight of each prediction [B, T]
ROOT = Path(__file__).parents[1]
SHORT = 128  # tokens of the first sequences with a needle
FILLER, VALUES = 48, 16  # tokens of the haystack, needles; one more asks


@dataclass(frozen=True)
class Args:
    """Train small decoders that differ in their attention alone."""

    task: Literal["text", "needle"] = "text"  # Language modelling of text, or finding a needle in random tokens.
    kinds: tuple[str, ...] = ("dense", "nsa")  # Kinds of attention: dense, window, nsa, mla, dsa, rwkv.
    length: int | None = None  # Tokens of a sequence; default: 256 for text and 4096 for needle.
    # Gradient steps; default: 400 for text, 600 for needle (a third of them at the whole length).
    steps: int | None = None
    batch_size: int | None = None  # Sequences of a step; default: 8 for text and 2 for needle.
    dim: int | None = None  # Width of the decoder; default: 160 for text and 64 for needle.
    num_layers: int | None = None  # Number of layers; default: 4 for text and 2 for needle.
    learning_rate: float = 2e-3  # Learning rate of AdamW, with a warm-up and a cosine to a tenth.
    seed: int = 0  # Seed of all random numbers.
    run_dir: cli.RunDir = None  # Folder of the results; default: runs/language-TASK.


DEFAULTS = {
    "text": {"length": 256, "steps": 400, "batch_size": 8, "dim": 160, "num_layers": 4},
    "needle": {"length": 4096, "steps": 600, "batch_size": 2, "dim": 64, "num_layers": 2},
}


def checked(args: Args) -> Args:
    """The arguments with the task's defaults. Raises ``ValueError`` for what cannot be trained."""
    checks.not_empty(kinds=args.kinds)
    for kind in args.kinds:
        checks.one_of("kinds", kind, get_args(transformer.Kind))
    given = {name: value for name in DEFAULTS[args.task] if (value := getattr(args, name)) is not None}
    for name, value in given.items():
        checks.positive_int(name, value, at_least=2 if name in ("length", "steps") else 1)
    checks.above_zero("learning_rate", args.learning_rate)
    return replace(args, **DEFAULTS[args.task] | given)


def decoder(kind: Any, args: Any, vocab_size: int, sparse: nsa.Config) -> transformer.Config:
    return transformer.Config(
        vocab_size=vocab_size,
        dim=args.dim,
        num_layers=args.num_layers,
        num_heads=4,
        num_kv_heads=1,
        attention=kind,
        window=sparse.window,
        sparse=sparse,
        shared_kv=True,
        indexer=dsa.Config(heads=2, dim=16, rope_dim=8, top_k=sparse.window),
    )


def text() -> tuple[np.ndarray, np.ndarray]:
    """Bytes of this project's files, as tokens: to train on, and the last tenth of each file to test on."""
    files = [
        ROOT / "README.md",
        *(f for kind in ("docs/*.md", "jrl/**/*.py", "tests/*.py") for f in sorted(ROOT.glob(kind))),
    ]
    parts = [np.frombuffer(f.read_bytes(), np.uint8) for f in files]
    cut = [len(p) * 9 // 10 for p in parts]
    return (
        np.concatenate([p[:c] for p, c in zip(parts, cut, strict=True)]),
        np.concatenate([p[c:] for p, c in zip(parts, cut, strict=True)]),
    )


def pieces(data: np.ndarray, batch_size: int, length: int) -> Draw:
    """Draws sequences from anywhere in the data. Raises ``ValueError`` if it is shorter."""
    if length >= len(data):
        raise ValueError(f"length must be below {len(data)}, the bytes there are; got {length}")
    tokens = jnp.asarray(data)

    def draw(key: Array) -> tuple[Array, Array]:
        begin = jax.random.randint(key, (batch_size, 1), 0, len(data) - length)
        return tokens[begin + jnp.arange(length + 1)[None]].astype(jnp.int32), jnp.ones((batch_size, length))

    return draw


def haystack(batch_size: int, length: int) -> Draw:
    """Filler, one needle anywhere in the first seven eighths, and at the end a question whose answer is the needle."""

    def draw(key: Array) -> tuple[Array, Array]:
        key_filler, key_value, key_place = jax.random.split(key, 3)
        tokens = jax.random.randint(key_filler, (batch_size, length + 1), 0, FILLER)
        needle = FILLER + jax.random.randint(key_value, (batch_size,), 0, VALUES)
        place = jax.random.randint(key_place, (batch_size,), 0, length * 7 // 8)
        tokens = tokens.at[jnp.arange(batch_size), place].set(needle)
        tokens = tokens.at[:, length - 1].set(FILLER + VALUES).at[:, length].set(needle)
        return tokens, jnp.zeros((batch_size, length)).at[:, -1].set(1.0)

    return draw


def growing(steps: int, length: int) -> list[tuple[int, int]]:
    """Stages of (steps, tokens of a sequence): a third of the steps at 128 tokens, a third at the last length, and as many as are
    left in stages between, each of four times the length of the one before."""
    lengths = [length]
    while lengths[0] > 4 * SHORT:
        lengths.insert(0, lengths[0] // 4)
    between, third = lengths[:-1], steps // 3
    each = third // max(1, len(between))
    return [(steps - third - each * len(between), min(SHORT, length)), *((each, n) for n in between), (third, length)]


def refuse_if_too_large(config: transformer.Config, draw: Draw) -> None:
    """Raise ``ValueError`` for a decoder, or a batch of it, that the memory cannot hold."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(lambda key: transformer.init(key, config), key)
    memory.refuse_if_too_large("dim and num_layers", (params,) * 4)  # with gradients and two moments
    tokens, _ = jax.eval_shape(draw, key)
    read = jax.ShapeDtypeStruct((*tokens.shape, config.dim), jnp.float32)
    memory.refuse_if_too_large("batch_size, length and dim", read)


def losses(params: Any, tokens: Array, weight: Array, config: transformer.Config) -> tuple[Array, Array]:
    """Mean cross-entropy in nats, and accuracy, of the predictions that count."""
    logits = transformer.forward(params, tokens[:, :-1], config)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    right = jnp.argmax(logits, -1) == tokens[:, 1:]
    return jnp.sum(each * weight) / weight.sum(), jnp.sum(right * weight) / weight.sum()


def of_indexers(params: Any, tokens: Array, config: transformer.Config) -> Array | float:
    """What the indexers of dsa learn from, and nothing else learns from; 0 for other kinds."""
    if config.attention != "dsa":
        return 0.0
    return transformer.index_loss(params, params["embedding"][tokens[:, :-1]], config)


def train(config: transformer.Config, stages: list[tuple[int, Draw]], args: Args) -> tuple[Any, np.ndarray]:
    """Parameters after all stages of (steps, draw), and the loss of each step."""
    params = transformer.init(jax.random.key(args.seed), config)
    chosen = optim.OptimizerConfig("adamw", schedule="cosine", warmup=0.05)
    total, done = sum(n for n, _ in stages), 0
    history: list[float] = []
    state = optim.make(chosen, optim.Hyper(), args.learning_rate, 1.0).init(params)
    for steps, draw in stages:

        @jax.jit
        def step(params: Any, state: Any, i: Array, draw: Draw = draw) -> tuple[Any, Any, Array]:
            factor = optim.schedule(chosen, optim.Hyper(), i / total, jnp.float32(1 / total))
            tx = optim.make(chosen, optim.Hyper(), args.learning_rate * factor, 1.0)
            tokens, weight = draw(jax.random.fold_in(jax.random.key(args.seed + 1), i))

            def both(p):
                loss = losses(p, tokens, weight, config)[0]
                return loss + of_indexers(p, tokens, config), loss

            now = optim.minimize(tx, both, params, state)
            return now.params, now.opt_state, now.extra

        said = time.monotonic()
        for _ in range(steps):
            params, state, loss = step(params, state, jnp.float32(done))
            history.append(float(loss))
            done += 1
            if time.monotonic() - said > 10:
                said = time.monotonic()
                print(f"  {config.attention}: step {done} of {total}, loss {history[-1]:.3f}", flush=True)
    return params, np.array(history)


def main(argv: list[str]) -> None:
    args: Any = checked(cli.parse(Args, argv, doc=__doc__))
    is_text, length, batch = args.task == "text", args.length, args.batch_size
    if is_text:
        data, held_out = text()
        stages, test, vocab = [(args.steps, pieces(data, batch, length))], pieces(held_out, batch, length), 256
        sparse = nsa.Config(16, 8, 16, 6, window=64)
    else:
        stages = [(n, haystack(batch * length // each, each)) for n, each in growing(args.steps, length)]
        test, vocab, sparse = haystack(batch, length), FILLER + VALUES + 1, nsa.Config(16, 8, 32, 8, window=64)
    folder = args.run_dir or Path("runs") / f"language-{args.task}"
    decoders = {kind: decoder(kind, args, vocab, sparse) for kind in args.kinds}
    for config in decoders.values():
        refuse_if_too_large(config, test)
    folder.mkdir(parents=True, exist_ok=True)
    rows, lines = [], []
    for kind, config in decoders.items():
        begin = time.monotonic()
        params, history = train(config, stages, args)
        score = jax.jit(lambda k, p=params, c=config: losses(p, *test(k), c))
        scores = np.array([score(k) for k in jax.random.split(jax.random.key(args.seed + 2), 16)])
        size = sum(x.size for x in jax.tree.leaves(params))
        rows.append(
            {
                "kind": kind,
                "parameters": f"{size:,}",
                "tokens": length,
                "test loss": f"{scores[:, 0].mean():.3f}",
                "right": f"{100 * scores[:, 1].mean():.0f}%",
                "seconds": f"{time.monotonic() - begin:.0f}",
            }
        )
        over = min(10, len(history))
        smooth = np.convolve(history, np.ones(over) / over, "valid")
        lines.append((kind, np.arange(len(smooth)) + over, smooth[None]))
    name = "language" if is_text else "needle"
    report.print_table(folder / f"{name}.csv", rows)
    plot.draw(folder / f"{name}.png", [plot.Panel(args.task, "gradient steps", "loss, nats", lines)])
    print(f"{folder}/{name}.png")


if __name__ == "__main__":
    cli.main(main)
