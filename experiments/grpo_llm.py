"""GRPO on a published language model, with a verifier in Python between sampling and learning.

python experiments/grpo_llm.py --model SmolLM2-135M-Instruct.Q4_1.gguf          sums of reasoning-gym (chain_sum)
python experiments/grpo_llm.py --model FOLDER --dataset countdown               a folder in Hugging Face's layout
python experiments/grpo_llm.py --model FOLDER --dataset mine.py                 problems of your own: make(seed) -> verifiers.Source
python experiments/grpo_llm.py --model MODEL --run-dir runs/mine                 and, after Ctrl-C, the same again: it goes on

It trains matrices beside the frozen model (LoRA), which is the reference of the KL at no cost; --config.adapter.kind full trains the
model itself. Answers lie over the devices; --model-devices 4 cuts the model over four of them. Leaves metrics.csv, answers.txt,
curve.png and checkpoints in the folder. Datasets by name need the package reasoning-gym.
"""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jrl import lm
from jrl.algos import grpo
from jrl.lm import groups, verifiers
from jrl.lm.model import decoder
from jrl.lm.sampling import Rollout
from jrl.nets import adapters, transformer
from jrl.numerics import checks, precision, sharding
from jrl.run import cli, disk, folders, interrupt, log, memory, plot
from jrl.run.checkpoint import Checkpoints, RunError, disk_errors
from jrl.run.interrupt import StopOnSignal

CONFIG = grpo.Config(num_prompts=4, group_size=4, adapter=adapters.Config("lora"), micro_batches=4, kl="none")
BLOCK = 100  # updates whose problems are drawn at once

# What of a completion is judged, what is asked for it, and the tokens of the longest answer.
FORMS: dict[str, tuple[verifiers.Extract, str, int]] = {
    "number": (verifiers.last_number, "\n\nAnswer with the number alone.", 16),
    "whole": (verifiers.whole, "\n\nWrite the answer and nothing else.", 64),
    "boxed": (verifiers.boxed, "\n\nThink step by step, and put the final answer in \\boxed{}.", 256),
    "tagged": (verifiers.tagged, verifiers.INSTRUCTION, 256),
}


@dataclass(frozen=True)
class Args:
    """Train a published language model on problems with a verifier."""

    model: Path  # A .gguf file, or a folder with config.json, safetensors and tokenizer.json.
    dataset: str = "chain_sum"  # Data set of reasoning-gym, or a Python file.
    # Settings of the data set, as NAME=NUMBER ...; by default chain_sum has two terms of one digit.
    setting: tuple[str, ...] = ()
    # Form of an answer to reasoning-gym: number (the last one in the text), whole (all of it), boxed or tagged; default: number for
    # chain_sum, whole for others.
    form: Literal["number", "whole", "boxed", "tagged"] | None = None
    instruction: str | None = None  # Text behind each problem of reasoning-gym; default: by form.
    steps: int = 100  # Number of updates.
    # Tokens of the longest prompt. Problems with longer ones are skipped, and counted in metrics.csv. Default: with room to spare for
    # the first hundred problems.
    prompt_length: int | None = None
    # Tokens of the longest answer; default: 16 for numbers, 64 for whole answers and files, else 256.
    answer_length: int | None = None
    save_every: int = 10  # Updates between checkpoints.
    # Number of devices to use; default: all, but only one of a CPU's, which share its cores.
    devices: int | None = None
    # Number of devices that hold one copy of the model together; the answers are shared among the copies.
    model_devices: int = 1
    seed: int = 0  # Seed of all random numbers.
    # Folder of the run. If it has a checkpoint, the run continues with its settings: only prompt_length, save_every, the devices and
    # config.micro_batches may differ, which change no mathematics.
    run_dir: cli.NamedFolder = Path("runs/grpo-llm")
    config: grpo.Config = field(default_factory=lambda: CONFIG)  # Static settings; the model is that of the file.
    hyper: grpo.Hyper = grpo.Hyper(learning_rate=1e-4)  # Hyperparameters.


def checked(args: Args) -> Args:
    """The arguments with the defaults that depend on others. Raises ``ValueError`` for what cannot be trained."""
    form = args.form or ("number" if args.dataset == "chain_sum" else "whole")
    _, instruction, length = FORMS[form]
    answer_length = length if args.answer_length is None else args.answer_length
    for name in ("steps", "save_every", "model_devices"):
        checks.positive_int(name, getattr(args, name))
    checks.positive_int("answer_length", answer_length)
    if args.prompt_length is not None:
        checks.positive_int("prompt_length", args.prompt_length)
    if args.config.supervised:
        raise ValueError("config.supervised must be 0: a published model needs no supervised start here")
    grpo.check(args.config)
    grpo.check_hyper(args.hyper)
    tokens = answer_length + (args.prompt_length or 0)
    answers = jax.ShapeDtypeStruct((args.config.oversample * args.config.rows, tokens, 3), jnp.float32)
    memory.refuse_if_too_large("num_prompts, group_size, prompt_length and answer_length", answers)
    instruction = instruction if args.instruction is None else args.instruction
    return replace(args, form=form, instruction=instruction, answer_length=answer_length)


def source_of(args: Args) -> verifiers.Source:
    """Problems of a file or of reasoning-gym."""
    settings = cli.parse_params(args.setting)
    if taken := {"seed", "threshold", "extract", "instruction", "seconds"} & settings.keys():
        raise ValueError(
            f"setting: {', '.join(sorted(taken))} is not the dataset's; see --seed, --form and --instruction"
        )
    if args.dataset.endswith(".py"):
        return verifiers.from_file(args.dataset, args.seed, **settings)
    easy = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1} if args.dataset == "chain_sum" else {}
    extract = FORMS[args.form or "whole"][0]
    asked: dict[str, Any] = {"extract": extract, "instruction": args.instruction or ""}
    return verifiers.reasoning_gym(args.dataset, args.seed, **asked | easy | settings)


def problems(
    source: verifiers.Source, words: lm.Tokenizer, args: Args, step: int
) -> tuple[list[verifiers.Item], list[list[int]], int]:
    """Of one update, with the tokens of their prompts, and how many were passed over since theirs are more than ``prompt_length``.

    So many updates draw together, so that a source that shuffles shows all before it shows one again.
    """
    count, longest = args.config.num_prompts * args.config.oversample, args.prompt_length or 0
    block, place = divmod(step, BLOCK)
    drawn = _block(source, args.seed * 1_000_003 + block, count * BLOCK)
    items, prompts, passed = [], [], 0
    for item in drawn[place * count :] + drawn[: place * count]:
        tokens = tokens_of(words, item.prompt)
        if len(tokens) > longest:
            passed += 1
            continue
        items.append(item)
        prompts.append(tokens)
        if len(items) == count:
            return items, prompts, passed
    raise ValueError(
        f"prompt_length = {longest} fits {len(items)} of {len(drawn)} prompts, and an update takes {count}"
    )


@lru_cache(maxsize=1)
def _block(source: verifiers.Source, seed: int, count: int) -> list[verifiers.Item]:
    return source.draw(seed, count)


def room_for(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens for prompts like these: a quarter more than the longest, in steps of 32."""
    return -(-5 * max(map(len, prompts)) // 4 // 32) * 32


def mesh_of(args: Args) -> jax.sharding.Mesh:
    """The devices, among which an update's answers, and those of its parts, are to divide evenly."""
    there, config = jax.devices(), args.config
    count = (1 if jax.default_backend() == "cpu" else len(there)) if args.devices is None else args.devices
    checks.within("devices", count, 1, len(there))
    if count % args.model_devices:
        raise ValueError(f"model_devices must divide the {count} devices; got {args.model_devices}")
    data = count // args.model_devices
    part = config.rows // (config.num_minibatches * config.micro_batches)
    if part % data:
        raise ValueError(
            f"num_prompts * group_size / (num_minibatches * micro_batches) must be a multiple of the {data} devices that share "
            f"them; got {part}"
        )
    return sharding.make_mesh(data, args.model_devices, there[:count])


def padded(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[jax.Array, jax.Array]:
    """Token ids and which of them are valid, ``[N, length]``, padded on the left."""
    tokens, valid = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :], valid[i, length - len(row) :] = row, True
    return jnp.asarray(tokens), jnp.asarray(valid)


def tokens_of(words: lm.Tokenizer, prompt: str) -> list[int]:
    """As a user's message, or as it stands where the model knows no conversations."""
    if words.template is None:
        return words.encode(prompt, begin=True)
    return words.encode(words.chat([{"role": "user", "content": prompt}]))


def texts_of(words: lm.Tokenizer, rollout: Rollout) -> list[str]:
    tokens = np.asarray(rollout.tokens)
    mask = np.asarray(rollout.mask) & ~np.isin(tokens, words.ends)
    return [words.decode(row[kept].tolist(), special=False) for row, kept in zip(tokens, mask, strict=True)]


def without_the_model(state: grpo.State) -> Any:
    """What a checkpoint holds: all but the frozen model and the key, which the step's number gives."""
    kept: Any = state
    return jax.tree.map(np.asarray, kept._replace(frozen=(), key=()))


def main(argv: list[str]) -> None:
    args = checked(cli.parse(Args, argv, doc=__doc__))
    mesh, source, policy = mesh_of(args), source_of(args), precision.parse(args.config.precision)
    shape, params, words = lm.load(args.model, policy.params)
    if not words.ends:
        raise ValueError(f"{args.model} names no end token")
    pad = words.ends[0] if words.pad is None else words.pad
    if args.prompt_length is None:
        shown = _block(source, args.seed * 1_000_003, args.config.num_prompts * BLOCK)[:100]
        args = replace(args, prompt_length=room_for([tokens_of(words, item.prompt) for item in shown]))
    config = replace(args.config, model=replace(shape, remat=True))
    model = decoder(config.model, policy.compute, words.vocab_size)
    learner = grpo.learner(model, config, length=args.answer_length or 0, end=words.ends, pad=pad)
    key_init, key_run = jax.random.split(jax.random.key(args.seed))
    start = (key_init, params, args.hyper, args.steps)
    of_params = sharding.shardings(mesh, transformer.axes(config.model), params)
    shapes = jax.eval_shape(learner.init, *start)
    memory.refuse_states(shapes, 1, mesh.size)
    where = sharding.like(mesh, params, of_params, shapes)
    state = jax.jit(learner.init, out_shardings=where)(*start)
    del params, start
    sample = jax.jit(learner.sample)
    learn = jax.jit(learner.learn, donate_argnums=0, out_shardings=(where, None))

    def step(state: grpo.State, done: int) -> tuple[grpo.State, dict[str, float], list[str]]:
        with jax.set_mesh(mesh):
            return one_step(args, source, words, sample, learn, state, key_run, done, pad)

    interrupt.on_leaving(f"interrupted; the same command goes on in {args.run_dir}")
    settings = settings_of(args, config)
    with folders.opened(args.run_dir, True, settings) as folder:
        done, rows = train(folder, args, settings, step, state, where)
    if passed := sum(row.get("overlong_prompts", 0) for row in rows):
        print(f"{passed:.0f} problems with prompts of over {args.prompt_length} tokens were passed over")
    lines = [(name, *_smooth(rows, name)) for name in ("correct", "reward") if rows]
    plot.draw(args.run_dir / "curve.png", [plot.Panel(source.name, "update", "mean of ten updates", lines)])
    print(f"{args.run_dir}/curve.png  metrics.csv  answers.txt")
    if done < args.steps:
        raise KeyboardInterrupt


Row = dict[str, float]
Step = Callable[[grpo.State, int], tuple[grpo.State, Row, list[str]]]


def train(
    folder: Path, args: Args, settings: dict[str, Any], step: Step, state: grpo.State, where: Any
) -> tuple[int, list[Row]]:
    """Updates from the newest checkpoint to the last, or until a signal comes: how many are done, and all their metrics.

    ``step(state, done)`` gives the state after one more update, its metrics, and what was said.
    """
    per_update, labels = args.config.rows, [{"seed": args.seed}]
    checkpoints = Checkpoints(folder / "checkpoints", settings, log.TABLES)
    done = checkpoints.latest() or 0
    rows: list[Row] = []
    if done:
        saved, _ = checkpoints.restore(done, without_the_model(state))
        state = jax.device_put(saved._replace(frozen=state.frozen, key=state.key), where)
        print(f"{folder}: resumed at step {done}", flush=True)
    record = log.Log(folder, labels, done, per_update)
    if done:
        rows = _rows(log.read_whole(log.table(folder, labels), done, 1, per_update)[1])
    _cut_back(folder / "answers.txt", done)

    def save() -> None:
        record.sync()
        checkpoints.save(done, without_the_model(state))

    pool = ThreadPoolExecutor(1)  # for the main thread hears signals, and may leave a long step
    with StopOnSignal() as stop:
        try:
            while done < args.steps and not stop.requested:
                after, row, said = stop.result(pool.submit(step, state, done))
                refuse_nan(row, done)
                state, done = after, done + 1
                rows.append(row)
                print(f"step {done}  " + "  ".join(f"{x} {row[x]:.3g}" for x in SHOWN if x in row), flush=True)
                _write(folder, record, done, per_update, row, said)
                if done % args.save_every == 0:
                    save()
        finally:  # a verifier that raises costs no update
            if done:
                save()
            checkpoints.wait()
            record.close()
            pool.shutdown(wait=False)
            print(f"{folder}: saved at step {done}" if done else f"{folder}: nothing to save", flush=True)
    return done, rows


def settings_of(args: Args, config: grpo.Config) -> dict[str, Any]:
    """What a run must share with the one that it goes on from, as flat JSON values."""
    names = ("dataset", "setting", "form", "instruction", "answer_length", "seed")
    length = {"steps": args.steps} if config.optimizer.uses_length else {}
    fixed = {f"config.{name}": value for name, value in asdict(config).items()}
    numbers = {f"hyper.{name}": value for name, value in args.hyper._asdict().items()}
    given = {"model": str(args.model)} | {name: getattr(args, name) for name in names}
    return folders.plain(given | length | fixed | numbers)


SHOWN = (
    "correct", "reward", "episode_length", "no_signal", "overlong_prompts", "abstained", "sampled_tokens_per_s",
    "trained_tokens_per_s",
)  # fmt: skip


def one_step(args, source, words, sample, learn, state, key_run, done, pad) -> tuple[grpo.State, Row, list[str]]:
    """Sample, verify, learn: ``(state, metrics, answers)``."""
    key_sample, key_learn = jax.random.split(jax.random.fold_in(key_run, done))
    config, group = args.config, args.config.group_size
    items, prompts, passed = problems(source, words, args, done)
    tokens, valid = padded([p for p in prompts for _ in range(group)], args.prompt_length, pad)
    begin = time.monotonic()
    rollout = jax.block_until_ready(sample(state, key_sample, tokens, valid))
    sampled, count = time.monotonic() - begin, int(rollout.mask.sum())
    texts = texts_of(words, rollout)
    parts = verifiers.judge(source, [item for item in items for _ in range(group)], texts)
    _check_weights(args.hyper, parts, source.name)
    judged = np.isfinite(np.stack(list(parts.values()))).all(0)
    reward = grpo.rewards(config, args.hyper, jax.tree.map(jnp.asarray, parts), rollout.mask)
    reward = jnp.where(judged, reward, 0)
    rollout = rollout._replace(mask=rollout.mask & judged[:, None])  # who was not judged takes no part
    row = groups.drawn(reward, rollout.mask, group) | {"overlong_prompts": passed, "abstained": np.sum(~judged)}
    row |= {"sampled_tokens_per_s": count / sampled}
    if config.oversample > 1:
        chosen = groups.informative(jnp.asarray(parts["correct"]), rollout.mask, group, config.num_prompts)
        tokens, valid, rollout, reward = jax.tree.map(lambda x: x[chosen], (tokens, valid, rollout, reward))
    begin = time.monotonic()
    state, metrics = jax.block_until_ready(learn(state, key_learn, tokens, valid, rollout, reward))
    trained = (int(rollout.mask.sum()) + int(valid.sum())) / (time.monotonic() - begin)
    row = {name: float(x) for name, x in (metrics | row).items()} | {"trained_tokens_per_s": trained}
    checks.apart(f"{source.name}: the verifier's parts", parts, [*row, "update", "env_steps", "seed"])
    row |= {name: float(x[judged].mean()) if judged.any() else math.nan for name, x in parts.items()}
    said = [f"{item.prompt!r} -> {texts[i * group]!r}" for i, item in enumerate(items)]
    return state, row, said


def refuse_nan(row: dict[str, Any], done: int) -> None:
    """Raise ``RunError`` after an update that broke the model: the one before it is kept."""
    broken = [name for name in ("loss", "grad_norm") if not math.isfinite(row[name])]
    if broken:
        raise RunError(f"{' and '.join(broken)} turned NaN at update {done + 1}; the model of update {done} is kept")


def _check_weights(hyper: grpo.Hyper, parts: dict[str, np.ndarray], name: str) -> None:
    """Raise for a weight of a part that the verifier does not give."""
    for part in ("format", "close"):
        weight = getattr(hyper, f"{part}_weight")
        if weight and part not in parts:
            raise verifiers.VerifierError(
                f"{name}: hyper.{part}_weight = {weight:g} weighs a part that the verifier does not give; it gives {', '.join(parts)}"
            )


def _rows(metrics: dict[str, np.ndarray]) -> list[Row]:
    """Metrics ``{name: [1, rows]}``, row by row."""
    return [dict(zip(metrics, row, strict=True)) for row in np.concatenate(list(metrics.values())).T.tolist()]


def _write(folder: Path, record: log.Log, done: int, per_update: int, row: Row, said: list[str]) -> None:
    record.write(np.array([done]), np.array([done * per_update]), {k: np.array([[x]]) for k, x in row.items()}, ())
    with disk_errors(folder), (folder / "answers.txt").open("a") as file:
        file.write("\n".join([f"step {done}", *said, ""]))


def _cut_back(path: Path, done: int) -> None:
    """Leave what was said up to step ``done``."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        disk.replace(path, b"".join(takewhile(lambda line: line != f"step {done + 1}\n".encode(), lines)))


def _smooth(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    values = np.array([row[name] for row in rows])
    width = min(10, len(values))
    return np.arange(width, len(values) + 1), np.convolve(values, np.ones(width) / width, "valid")[None]


if __name__ == "__main__":
    cli.main(main)
