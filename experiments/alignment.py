"""From demonstrations to an aligned policy: best of n, DPO, IPO, RLHF by PPO and GRPO side by side, on a reward that is known exactly.

python experiments/alignment.py
python experiments/alignment.py --num-seeds 2 --share 0.1 --methods dpo grpo
python experiments/alignment.py --resume --run-dir runs/mine      goes on; what is finished is not repeated

The task asks for digits whose sum is a given number: the gold reward is how near it comes. The demonstrators stop too soon. A policy that was
fine-tuned on them answers in pairs, which are labelled by the gold reward as people would label them (Bradley and Terry), and a reward model learns
from these labels, in which larger sums are nearly always better. What is optimized for the learned reward for too long overshoots.

Leaves alignment.csv and alignment.png: gold and learned reward over the KL to the fine-tuned policy (Gao et al. 2022, arXiv 2210.10760), every method
over all seeds in one program.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl import algorithm, run
from jrl.algorithm import Algorithm
from jrl.algos import dpo, grpo, ppo_lm, reward_model, sft
from jrl.equations import token_losses
from jrl.lm import pairs as pairs_of
from jrl.lm.pairs import Pairs
from jrl.lm.policy import Answers, answer, language_model
from jrl.lm.sampling import Support
from jrl.lm.scoring import score
from jrl.lm.tasks import MARKS, Problem, Task, parts
from jrl.nets import transformer
from jrl.numerics import checks
from jrl.run import cli, folders, plot, report, stats

Array = jax.Array
DIGITS = 8  # of an answer, at most
ZERO = len(MARKS)
SHAPE = transformer.Config(dim=96, num_layers=2, num_heads=4, num_kv_heads=2)
CERTAINTY = 8.0  # of labels: how surely the better answer is preferred
POINTS = 8  # of a curve
MEASURED = 128  # answers of a point
MOST = 64  # answers of best of n


def sum_to(digits: int = DIGITS) -> Task:
    """``27:`` asks for up to ``digits`` digits from 1 to 9 whose sum is 27. "correct" is 1 for that sum, and falls to 0 at a distance of half of it."""

    def draw(key: Array) -> Problem:
        key_target, key_length, key_digits = jax.random.split(key, 3)
        target = jax.random.randint(key_target, (), 20, 45)
        length = jax.random.randint(key_length, (), 3, digits - 1)  # the demonstrator stops too soon
        shown = parts.answer(ZERO + jax.random.randint(key_digits, (digits,), 2, 9), jnp.arange(digits) < length)
        prompt = jnp.stack([ZERO + target // 10, ZERO + target % 10, jnp.int32(ZERO + 10)]).astype(jnp.int32)
        return Problem(prompt, jnp.ones(3, bool), (target, shown))

    def verify(problem: Problem, tokens: Array, mask: Array) -> dict[str, Array]:
        target, _ = problem.answer
        said, _, _ = parts.read(tokens, mask)
        total = jnp.sum(jnp.where((said >= ZERO) & (said < ZERO + 10), said - ZERO, 0))
        form = parts.consists_of(tokens, mask, ZERO + 1, ZERO + 10)
        gold = jnp.clip(1 - jnp.abs(total - target) / (0.5 * target), 0, 1)
        return {"correct": form * gold.astype(jnp.float32), "format": form}

    symbols = (*MARKS, *map(str, range(10)), ":")
    return Task(f"sum_to-{digits}", symbols, 3, digits + 1, draw, verify, lambda problem: problem.answer[1])


TASK = sum_to()
MODEL = language_model(TASK, SHAPE, "float32")
Reward = Callable[[Answers], Array]


def gold(answers: Answers) -> Array:
    """The exact reward."""
    return answers.parts["correct"]


class Lesson(NamedTuple):
    """What all methods of a seed begin with: the fine-tuned policy, labelled pairs of its answers, and the reward model."""

    policy: Any
    pairs: Pairs
    judge: reward_model.State


class Method(NamedTuple):
    """An algorithm of a lesson, the parameters of its policy, and its number of updates."""

    make: Callable[[Lesson], Algorithm]
    policy: Callable[[Any], Any]
    updates: int
    drawn: int  # tokens that an update draws


def by_pairs(loss: Any, beta: float) -> Method:
    """DPO and its kin, on the pairs that the reward model learned from."""
    config, hyper = dpo.Config(SHAPE, loss=loss), dpo.Hyper(learning_rate=1e-3, beta=beta)
    return Method(
        lambda lesson: dpo.make(TASK, config, hyper, pairs=lesson.pairs, start=lesson.policy),
        lambda state: state.params,
        70,
        0,
    )


def by_ppo(lesson: Lesson) -> Algorithm:
    """RLHF with four models: actor, critic, reward model and reference."""
    config, hyper = ppo_lm.Config(SHAPE, num_answers=128), ppo_lm.Hyper(learning_rate=1e-3, kl_weight=0.02)
    return ppo_lm.make(TASK, config, hyper, start=lesson.policy, reward=learned(lesson))


def by_grpo(reward_from: Callable[[Lesson], Reward]) -> Callable[[Lesson], Algorithm]:
    """GRPO on a reward."""
    config = grpo.Config(SHAPE, num_prompts=16, group_size=8, kl="k3", reduction="token_mean")
    hyper = grpo.Hyper(learning_rate=1e-3, kl_weight=0.02)
    return lambda lesson: grpo.make(TASK, config, hyper, start=lesson.policy, reward=reward_from(lesson))


ROWS = 128 * TASK.answer_length
METHODS: dict[str, Method] = {
    "dpo": by_pairs("sigmoid", 0.1),
    "ipo": by_pairs("ipo", 0.3),
    "ppo": Method(by_ppo, lambda state: state.params["actor"], 70, ROWS),
    "grpo": Method(by_grpo(lambda lesson: learned(lesson)), lambda state: state.params, 70, ROWS),
    "grpo-gold": Method(by_grpo(lambda lesson: gold), lambda state: state.params, 70, ROWS),
}
NAMES = ("best-of-n", *METHODS)


@dataclass(frozen=True)
class Args:
    """Compare ways of aligning a small language model."""

    methods: tuple[str, ...] = NAMES  # Methods, as the first column of the table names them.
    num_seeds: int = 8  # Seeds, each with demonstrations, labels and a reward model of its own.
    num_pairs: int = 1024  # Labelled pairs.
    share: float = 1.0  # Share of the updates of every stage.
    seed: int = 0  # Seed from whose key every seed's key is split.
    run_dir: cli.RunDir = None  # Folder of the results; default: a new one in runs/.
    resume: bool = False  # Continue in run_dir; methods that are finished are not repeated.


def lesson_of(key: Array, args: Args) -> Lesson:
    """Fine-tune, draw and label pairs, learn the reward. Pure: vmap it over keys."""
    key_policy, key_pairs, key_judge = jax.random.split(key, 3)
    begin = sft.make(TASK, sft.Config(SHAPE))
    policy, _ = run.train_fn(begin, steps(begin, 300, args.share))(key_policy)
    given, _ = pairs_of.draw(key_pairs, TASK, MODEL, policy.params, args.num_pairs, gold, certainty=CERTAINTY)
    judge = judge_of(given, policy.params)
    trained, _ = run.train_fn(judge, steps(judge, 200, args.share))(key_judge)
    return Lesson(policy.params, given, trained)


def steps(algo: Algorithm, updates: int, share: float) -> int:
    return max(1, int(updates * share)) * algo.env_steps_per_update


def judge_of(pairs: Pairs, policy: Any) -> Algorithm:
    """The reward model, which begins as the policy."""
    return reward_model.make(
        TASK, pairs, reward_model.Config(SHAPE), reward_model.Hyper(learning_rate=3e-4), start=policy
    )


def learned(lesson: Lesson) -> Reward:
    """The reward of the reward model."""
    return reward_model.reward_of(judge_of(lesson.pairs, lesson.policy), lesson.judge, TASK)


def measure(lesson: Lesson, policy: Any, key: Array) -> dict[str, Array]:
    """Gold and learned reward of a policy's answers, their KL to the fine-tuned policy and their length."""
    answers = answer(key, TASK, MODEL, policy, MEASURED, 1, Support())
    said, problems = answers.rollout, answers.problems
    begin = score(MODEL, lesson.policy, problems.prompt, said, valid=problems.valid).log_prob
    kl = jnp.sum(token_losses.masked(said.log_prob - begin, said.mask), axis=-1)
    return {
        "gold": gold(answers).mean(),
        "learned": learned(lesson)(answers).mean(),
        "kl": kl.mean(),
        "length": said.mask.sum(-1).mean(dtype=jnp.float32),
    }


def curve(key: Array, lesson: Lesson, args: Args, method: Method) -> dict[str, Array]:
    """Measures ``[points + 1]`` before training and along it. Pure: vmap it over keys and lessons."""
    algo = method.make(lesson)
    updates = max(1, int(method.updates * args.share))
    seen = algorithm.with_evaluation(
        algo,
        lambda state, key: measure(lesson, method.policy(state), key),
        max(1, updates // POINTS),
        jax.random.key(1),
    )
    _, metrics = run.train_fn(seen, updates * algo.env_steps_per_update)(key)
    first = measure(lesson, lesson.policy, jax.random.key(1))
    return {name: jnp.append(first[name], metrics[f"eval_{name}"]) for name in first}


def best_of_n(key: Array, lesson: Lesson) -> dict[str, Array]:
    """The same of the best of 1, 2, 4, ... answers by the learned reward, whose KL is ``log n - (n - 1) / n`` (Stiennon et al. 2020)."""
    answers = answer(key, TASK, MODEL, lesson.policy, MEASURED // 2, MOST, Support())
    by = {"gold": gold(answers), "learned": learned(lesson)(answers)}
    by["length"] = answers.rollout.mask.sum(-1).astype(jnp.float32)
    groups = {name: x.reshape(-1, MOST) for name, x in by.items()}
    found: dict[str, list[Array]] = {name: [] for name in (*groups, "kl")}
    for n in 2 ** np.arange(int(np.log2(MOST)) + 1):
        best = (
            jnp.argmax(groups["learned"][:, :n], axis=-1, keepdims=True)
            if n > 1
            else jnp.zeros((len(groups["gold"]), 1), int)
        )
        for name, x in groups.items():
            found[name].append(jnp.take_along_axis(x, best, axis=-1).mean())
        found["kl"].append(jnp.float32(np.log(n) - (n - 1) / n))
    return {name: jnp.stack(x) for name, x in found.items()}


def measured(args: Args, name: str, keys: Array, lessons: Lesson, folder: Path) -> dict[str, np.ndarray]:
    """Measures ``[seeds, points]`` of a method, trained unless the folder has them."""
    settings = {"num_seeds": args.num_seeds, "num_pairs": args.num_pairs, "share": args.share, "seed": args.seed}

    def train() -> dict[str, Any]:
        method = METHODS.get(name)
        program = jax.vmap(lambda key, lesson: curve(key, lesson, args, method) if method else best_of_n(key, lesson))
        return {"measures": {x: np.asarray(y).tolist() for x, y in jax.jit(program)(keys, lessons).items()}}

    found = folders.remembered(folder / f"{name}.json", settings, train)
    return {x: np.array(y, float) for x, y in found["measures"].items()}


def agreement(key: Array, lesson: Lesson) -> Array:
    """Share of new pairs of the policy's answers that the reward model ranks as the gold reward does."""
    pairs, _ = pairs_of.draw(key, TASK, MODEL, lesson.policy, MEASURED, gold)
    chosen, rejected = (
        reward_model.scores(MODEL, lesson.judge.params, pairs.prompt, pairs.valid, pairs_of.as_rollout(x))[0]
        for x in (pairs.chosen, pairs.rejected)
    )
    return jnp.sum(pairs.weight * (chosen > rejected)) / pairs.weight.sum()


def row_of(name: str, found: dict[str, np.ndarray], drawn: float) -> dict[str, Any]:
    """A line of the table: the best point by gold reward, which nobody would know, and the last one."""
    best = int(found["gold"].mean(0).argmax())
    return {
        "method": name,
        "gold, start": stats.brief(found["gold"][:, 0], ".2f"),
        "gold, best": stats.brief(found["gold"][:, best], ".2f"),
        "gold, end": stats.brief(found["gold"][:, -1], ".2f"),
        "learned, end": stats.brief(found["learned"][:, -1], ".2f"),
        "KL, end": stats.brief(found["kl"][:, -1], ".2f"),
        "length, end": stats.brief(found["length"][:, -1], ".2f"),
        "tokens drawn": f"{drawn:,.0f}",
    }


def main(argv: list[str]) -> None:
    args = cli.parse(Args, argv, doc=__doc__)
    checks.not_empty(methods=args.methods)
    for name in args.methods:
        checks.one_of("methods", name, NAMES)
    checks.positive_int("num_seeds", args.num_seeds)
    checks.positive_int("num_pairs", args.num_pairs, at_least=128)
    checks.above_zero("share", args.share)
    folder = cli.folder_of_runs(args.run_dir, args.resume, "alignment")
    folder.mkdir(parents=True, exist_ok=True)
    key_lessons, key_methods = jax.random.split(jax.random.key(args.seed))
    print("demonstrations, labels and reward models", file=sys.stderr, flush=True)
    lessons = jax.jit(jax.vmap(lambda key: lesson_of(key, args)))(jax.random.split(key_lessons, args.num_seeds))
    keys, rows = jax.random.split(key_methods, args.num_seeds), []
    labelling = 2 * args.num_pairs * TASK.answer_length
    panels = [plot.Panel(f"{x} reward", "KL to the fine-tuned policy, nats", "reward", []) for x in ("gold", "learned")]
    for i, name in enumerate(args.methods, start=1):
        print(f"{i} of {len(args.methods)}: {name}", file=sys.stderr, flush=True)
        found = measured(args, name, keys, lessons, folder)
        method = METHODS.get(name)
        drawn = method.drawn * method.updates * args.share if method else MOST * TASK.answer_length
        rows.append(row_of(name, found, labelling + drawn))
        for panel in panels:
            panel.lines.append((name, found["kl"].mean(0), found[panel.title.split()[0]]))
        plot.draw(folder / "alignment.png", panels)
    accuracy = jax.jit(jax.vmap(agreement))(keys, lessons)
    print(
        f"the reward model ranks {stats.brief(100 * np.asarray(accuracy), '.2f')} % of new pairs as the gold reward does"
    )
    report.print_table(folder / "alignment.csv", rows)
    print(f"{folder}/alignment.png")


if __name__ == "__main__":
    cli.main(main)
