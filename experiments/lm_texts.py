"""The commands of lm.py that learn from files: ``sft``, ``reward`` and ``dpo``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jrl.algos import dpo as dpo_
from jrl.algos import process_reward, reward_model
from jrl.algos import sft as sft_
from jrl.lm import data, examples, texts
from jrl.lm.pairs import Pairs, as_rollout
from jrl.lm.texts import Texts
from jrl.nets import adapters
from jrl.numerics import optim
from jrl.numerics.settings import check_hyper
from jrl.run import cli, files, folders, interrupt, language, loggers, steps
from jrl.run.files import Job
from jrl.run.language import Opened
from jrl.run.progress import Progress

LORA = adapters.Config("lora")


@dataclass(frozen=True)
class Files:
    """What commands that learn from files have in common."""

    model: Path  # A .gguf file, a folder with config.json, safetensors and tokenizer.json, or the folder of a run.
    data: tuple[Path, ...]  # JSON lines; several files are read as one.
    eval_data: tuple[Path, ...] = ()  # Held-out data; default: a share of the data.
    eval_share: float = 0.05  # Share of the rows, drawn by the seed, that are held out where there is no eval_data.
    eval_every: int = 20  # Updates between evaluations, of which the best one's checkpoint is kept.
    epochs: float = 1.0  # Passes over the data.
    steps: int | None = None  # Number of updates, in place of epochs.
    save_every: int = 20  # Updates between checkpoints.
    # Number of devices to use; default: all, but only one of a CPU's, which share its cores.
    devices: int | None = None
    model_devices: int = 1  # Number of devices that hold one copy of the model together.
    seed: int = 0  # Seed of all random numbers.
    log: tuple[Literal["wandb"], ...] = ()  # Loggers besides the folder's table and TensorBoard events.


@dataclass(frozen=True)
class SFT(Files):
    """Supervised learning from texts and chats, of which the assistant's answers are learned."""

    length: int | None = None  # Tokens of a row; default: the longest text's, at most 1,024. What is longer is cut.
    # How texts share rows: bfd (whole texts, longest first), bfd_split (long ones in pieces), wrapped (one stream), none.
    packing: texts.How = "bfd"
    # Folder of the run. If it has a checkpoint, the run goes on; its settings must be the same.
    run_dir: cli.NamedFolder = Path("runs/lm-sft")
    config: sft_.Config = field(default_factory=lambda: sft_.Config(batch_size=8, adapter=LORA))  # Static settings.
    hyper: sft_.Hyper = sft_.Hyper(learning_rate=2e-4)  # Hyperparameters.


@dataclass(frozen=True)
class Paired(Files):
    """What commands that learn from pairs have in common."""

    prompt_length: int | None = None  # Tokens of the longest prompt; default: all fit.
    answer_length: int | None = None  # Tokens of the longest answer; default: all fit.
    overlong: examples.Overlong = "drop"  # What becomes of longer rows: drop (they are counted) or cut.


@dataclass(frozen=True)
class Reward(Paired):
    """A reward model from preferences."""

    run_dir: cli.NamedFolder = Path("runs/lm-reward")  # Folder of the run, which continues if it has a checkpoint.
    # Static settings.
    config: reward_model.Config = field(default_factory=lambda: reward_model.Config(batch_size=16, adapter=LORA))
    hyper: reward_model.Hyper = reward_model.Hyper(learning_rate=2e-4)  # Hyperparameters.


@dataclass(frozen=True)
class Process(Paired):
    """A reward model from labels: of steps (process), or of whole answers (outcome)."""

    # steps (prompt, completions, labels), or judged (prompt, completion, label).
    format: Literal["steps", "judged"] = "steps"
    # Text behind each step, whose last token has the step's label; a line break is written as backslash and n.
    separator: str = "\\n"
    run_dir: cli.NamedFolder = Path("runs/lm-process")  # Folder of the run, which continues if it has a checkpoint.
    # Static settings.
    config: process_reward.Config = field(default_factory=lambda: process_reward.Config(batch_size=16, adapter=LORA))
    hyper: process_reward.Hyper = process_reward.Hyper(learning_rate=2e-4)  # Hyperparameters.


@dataclass(frozen=True)
class DPO(Paired):
    """Direct preference optimization and its kin."""

    run_dir: cli.NamedFolder = Path("runs/lm-dpo")  # Folder of the run, which continues if it has a checkpoint.
    config: dpo_.Config = field(default_factory=lambda: dpo_.Config(batch_size=16, adapter=LORA))  # Static settings.
    hyper: dpo_.Hyper = dpo_.Hyper(learning_rate=5e-5)  # Hyperparameters.


def sft(argv: list[str]) -> None:
    args = checked(cli.parse(cli.without(SFT, "config", "model"), argv, doc=SFT.__doc__))
    it, rows = opened(args), data.read(args.data, "texts")
    learning = sft_.learner(it.model, args.config, packed=args.packing != "none")
    held = files.held_out(len(rows), args.eval_share, bool(args.eval_data), args.seed)
    both = rows.kept(~held), data.read(args.eval_data, "texts") if args.eval_data else rows.kept(held)
    corpora = [examples.tokenized(it.words, x, shown("texts")) for x in both if len(x)]
    longest = max(int(corpus.lengths.max()) for corpus in corpora)
    room = min(longest, 1024) if args.length is None else args.length
    plans = [texts.pack(corpus.lengths, room, args.packing) for corpus in corpora]
    if not all(texts.rows_of(plan, x, room).learned.any() for plan, x in zip(plans, corpora, strict=True)):
        raise ValueError(f"length = {room} cuts off all tokens that are learned from")
    if (cut := sum(int((x.lengths > room).sum()) for x in corpora)) and args.packing in ("none", "bfd"):
        print(f"{cut} texts are longer than {room} tokens and are cut")
    held_out = len(plans[1]) if len(plans) > 1 else 0
    print(f"{len(both[0])} texts in {len(plans[0])} rows of {room} tokens; {held_out} rows are held out", flush=True)

    def batch(held: bool, rows: np.ndarray) -> Texts:
        plan = [plans[held][i] if i >= 0 else () for i in rows]
        return Texts(*map(jnp.asarray, texts.rows_of(plan, corpora[held], room, it.pad)))

    def counted(batch: Texts) -> float:
        return float(batch.learned.sum())

    sizes = len(plans[0]), held_out
    job = Job(learning.init, learning.learn, learning.evaluate, batch, counted, sizes, args.config.batch_size)
    state, plan = trained("sft", args, it, job, ("loss", "token_accuracy"), {"length": room})
    leave(plan.folder, it, args.config.adapter, state)


def reward(argv: list[str]) -> None:
    args = checked(cli.parse(cli.without(Reward, "config", "model", "held_out"), argv, doc=Reward.__doc__))
    refuse_unmergeable(args)
    it = opened(args)
    learning = reward_model.learner(it.model, args.config)
    pairs, sizes, lengths = paired(args, it)

    def batch(held: bool, rows: np.ndarray) -> Pairs:
        return picked(pairs[held], rows)

    def learn(state: Any, key: jax.Array, batch: Pairs) -> Any:
        return learning.learn(state, batch)

    job = Job(learning.init, learn, learning.evaluate, batch, weight_of, sizes, args.config.batch_size)
    state, plan = trained("reward_model", args, it, job, ("loss", "accuracy", "margin"), lengths)
    print(leave_scorer(args, plan.folder, it, state))


def process(argv: list[str]) -> None:
    args = checked(cli.parse(cli.without(Process, "config", "model"), argv, doc=Process.__doc__))
    refuse_unmergeable(args)
    it = opened(args)
    learning = process_reward.learner(it.model, args.config)
    separator = args.separator.replace("\\n", "\n")

    def rows_of(paths: Sequence[Path], fit: examples.Fit, what: str) -> tuple[examples.Stepped, int]:
        rows = data.read(paths, args.format)
        return examples.stepped(it.words, rows, separator, fit, it.pad, shown(what))

    found, sizes, lengths = halves(args, rows_of)

    def batch(held: bool, rows: np.ndarray) -> process_reward.Labelled:
        x = jax.tree.map(lambda x: jnp.asarray(x[rows]), found[held])
        weight = x.weight * jnp.asarray(rows >= 0)[:, None]
        return process_reward.Labelled(x.prompt, x.valid, as_rollout(x.tokens, x.mask), x.label, weight)

    def learn(state: Any, key: jax.Array, batch: process_reward.Labelled) -> Any:
        return learning.learn(state, batch)

    job = Job(
        learning.init, learn, learning.evaluate, batch, lambda x: float(x.weight.sum()), sizes, args.config.batch_size
    )
    names = ("loss", "accuracy", "calibration_error")
    state, plan = trained("process_reward", args, it, job, names, lengths)
    print(leave_scorer(args, plan.folder, it, state, separator if args.format == "steps" else None))


def dpo(argv: list[str]) -> None:
    args = checked(cli.parse(cli.without(DPO, "config", "model"), argv, doc=DPO.__doc__))
    it = opened(args)
    learning = dpo_.learner(it.model, args.config)
    pairs, sizes, lengths = paired(args, it)
    references = [referred(args, it, learning, x) for x in pairs]  # once, of all pairs

    def batch(held: bool, rows: np.ndarray) -> tuple[Pairs, Any]:
        return picked(pairs[held], rows), jax.tree.map(lambda x: x[rows], references[held])

    def learn(state: Any, key: jax.Array, batch: tuple[Pairs, Any]) -> Any:
        return learning.learn(state, *batch)

    def evaluate(state: Any, batch: tuple[Pairs, Any]) -> Any:
        return learning.evaluate(state, *batch)

    def counted(batch: tuple[Pairs, Any]) -> float:
        return weight_of(batch[0])

    job = Job(learning.init, learn, evaluate, batch, counted, sizes, args.config.batch_size)
    state, plan = trained("dpo", args, it, job, ("loss", "accuracy", "margin"), lengths)
    leave(plan.folder, it, args.config.adapter, state)


# What they share


def checked(args: Any) -> Any:
    files.check_files(args)
    check_hyper(args.hyper)
    return args


def opened(args: Any) -> Opened:
    rows = args.config.batch_size // args.config.micro_batches
    mesh = language.mesh_of(args.devices, args.model_devices, rows, "config.batch_size / micro_batches")
    return language.opened(args.model, args.config.precision, mesh)


def refuse_unmergeable(args: Any) -> None:
    """Raise ``ValueError`` for an adapter that a reward model's file has no place for."""
    if args.config.adapter.kind not in adapters.BESIDE_MATRICES:
        kinds = ", ".join(adapters.BESIDE_MATRICES)
        raise ValueError(
            f"config.adapter.kind of a reward model must be one of {kinds}; got {args.config.adapter.kind}"
        )


def leave_scorer(args: Any, folder: Path, it: Opened, state: Any, separator: str | None = None) -> str:
    """Write a reward model, its adapter merged, and say where."""
    now = optim.eval_params(state.opt_state, state.params)
    body = it.model.adapter(args.config.adapter).merge(state.frozen, now["body"])
    return language.leave_scorer(folder, it, now | {"body": body}, separator)


def paired(args: Any, it: Opened) -> tuple[list[Pairs], tuple[int, int], dict[str, int]]:
    """Pairs that are learned from and those that are held out, their numbers, and their lengths."""

    def rows_of(paths: Sequence[Path], fit: examples.Fit, what: str) -> tuple[Pairs, int]:
        rows = data.read(paths, "pairs")
        return examples.paired(it.words, rows, fit, it.pad, shown(what))

    return halves(args, rows_of)


def halves(args: Any, rows_of: Any) -> tuple[list[Any], tuple[int, int], dict[str, int]]:
    """Rows that are learned from and those that are held out, as ``rows_of(paths, fit, what)`` makes them with the number of those that it dropped;
    their numbers, and their lengths."""
    first, dropped = rows_of(args.data, examples.Fit(args.prompt_length, args.answer_length, args.overlong), "rows")
    lengths = {"prompt_length": first.prompt.shape[1], "answer_length": first[2].shape[1]}
    if args.eval_data:
        second, more = rows_of(
            args.eval_data,
            examples.Fit(lengths["prompt_length"], lengths["answer_length"], args.overlong),
            "held-out rows",
        )
        found, dropped = [first, second], dropped + more
    else:
        held = files.held_out(len(first.prompt), args.eval_share, False, args.seed)
        found = [jax.tree.map(lambda x: x[~held], first), jax.tree.map(lambda x: x[held], first)]
    sizes = len(found[0].prompt), len(found[1].prompt)
    print(f"{sizes[0]} rows, {sizes[1]} held out; {dropped} are too long and were dropped", flush=True)
    return found, sizes, lengths


def picked(pairs: Pairs, rows: np.ndarray) -> Pairs:
    """Some pairs, of which the row -1 does not count."""
    found = jax.tree.map(lambda x: jnp.asarray(x[rows]), pairs)
    return found._replace(weight=found.weight * jnp.asarray(rows >= 0))


def weight_of(pairs: Pairs) -> float:
    return float(pairs.weight.sum())


def referred(args: DPO, it: Opened, learning: dpo_.Learner, pairs: Pairs) -> Any:
    """Log-probabilities of all pairs under the model at the start, arrays of numpy."""
    if args.config.loss in dpo_.WITHOUT_REFERENCE:
        return ()
    size, number = args.config.batch_size, len(pairs.weight)
    reference, found = jax.jit(learning.reference), []
    for begin in shown("reference")(range(0, number, size)):
        rows = np.minimum(np.arange(begin, begin + size), number - 1)
        with jax.set_mesh(it.mesh):
            found.append(jax.tree.map(np.asarray, reference(it.params, picked(pairs, rows))))
    return jax.tree.map(lambda *x: np.concatenate(x)[:number], *found) if found else ()


def shown(what: str) -> Any:
    """``progress`` of a loop over a sequence."""

    def through(rows: Sequence[Any]) -> Iterator[Any]:
        bar = Progress(what, len(rows), 0, enabled=len(rows) > 1000)
        for i, row in enumerate(rows):
            yield row
            if i % 100 == 99:
                bar.advance(i + 1, float("nan"))
        bar.close()

    return through


def trained(
    algorithm: str, args: Any, it: Opened, job: Job, names: tuple[str, ...], more: dict[str, Any]
) -> tuple[Any, steps.Plan]:
    """The trained state, and the plan of its run, whose folder has all there is to see."""
    updates = job.updates(args.epochs) if args.steps is None else args.steps
    more = more | ({"steps": updates} if args.config.optimizer.uses_length else {})
    read = {"data": args.data, "eval_data": args.eval_data}
    env = ", ".join(path.name for path in args.data)
    settings = language.settings_of(algorithm, args, it, read, env=env, **more)
    interrupt.on_leaving(f"interrupted; the same command goes on in {args.run_dir}")
    with folders.opened(args.run_dir, True, settings) as folder:
        plan = steps.Plan(
            folder, settings, updates, job.batch_size, args.seed, args.save_every, evaluated=names,
            evaluate_every=args.eval_every, shown=("loss", *names[1:]), sinks=loggers.opened(args.log, settings, folder),
        )  # fmt: skip
        state, done, rows = files.learn(job, it, plan, args.hyper, args.seed)
    steps.draw_curve(folder / "curve.png", folder.name, rows, [*plan.shown, *(f"eval_{x}" for x in names)])
    if done < updates:
        raise KeyboardInterrupt
    print(f"{folder}/curve.png  metrics.csv")
    return state, plan


def leave(folder: Path, it: Opened, adapter: adapters.Config, state: Any) -> None:
    params = optim.eval_params(state.opt_state, state.params)
    print(language.leave(folder, it, adapter, params))
