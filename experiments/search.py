"""More answers to one question: majority, a reward model of outcomes, one of steps, and a search by steps, at equal samples.

python experiments/search.py
python experiments/search.py --num-seeds 2 --share 0.1
python experiments/search.py --resume --run-dir runs/mine

A policy that was fine-tuned on countdown (numbers that make another) is right in some of its answers. Two reward models learn from its answers: one whether they were right (outcome),
one how often they still end right behind each of their tokens, which continuations tell (process, Math-Shepherd, 2312.08935). Then 1, 2, 4, ... answers
are drawn to new questions, and one is chosen. Leaves search.csv and search.png.
"""

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl import run
from jrl.algos import process_reward, sft
from jrl.algos.process_reward import Labelled
from jrl.lm import rollouts, tasks
from jrl.lm.policy import answer, language_model
from jrl.lm.sampling import Rollout, Support
from jrl.lm.tasks import Problem
from jrl.nets import transformer
from jrl.numerics import checks
from jrl.run import cli, folders, plot, report, stats

Array = jax.Array
TASK = tasks.make("countdown")
SHAPE = transformer.Config(dim=64, num_layers=2, num_heads=4, num_kv_heads=2)
MODEL = language_model(TASK, SHAPE, "float32")
MOST = 16  # answers to a question
BEAMS, EXPANSIONS = 4, 4
COUNTS = (2, 4, 8, 16)
QUESTIONS = 256
COPIES = 4  # continuations behind a token


@dataclass(frozen=True)
class Args:
    """Compare ways of choosing one of several answers."""

    num_seeds: int = 8  # Seeds, each with a policy and reward models of its own.
    num_answers: int = 4096  # Answers that the reward models learn from.
    policy_updates: int = 400  # Updates of the policy's fine-tuning.
    updates: int = 200  # Updates of each reward model.
    share: float = 1.0  # Share of the updates of every stage.
    seed: int = 0  # Seed from whose key every seed's key is split.
    run_dir: cli.RunDir = None  # Folder of the results; default: a new one in runs/.
    resume: bool = False  # Continue in run_dir; what is finished is not repeated.


class Judge(NamedTuple):
    """A reward model and how good it is on answers that it did not see."""

    params: Any
    unseen: dict[str, Array]


def judged(key: Array, policy: Any, data: Labelled, unseen: Labelled, updates: int) -> Judge:
    """A reward model of labels, which begins as the policy."""
    config, hyper = process_reward.Config(SHAPE, batch_size=128), process_reward.Hyper()
    learning = process_reward.learner(MODEL, config)
    state = learning.init(key, policy, hyper, updates)

    def step(state: Any, key: Array) -> tuple[Any, None]:
        rows = jax.random.randint(key, (config.batch_size,), 0, len(data.prompt))
        return learning.learn(state, jax.tree.map(lambda x: x[rows], data))[0], None

    state, _ = jax.lax.scan(step, state, jax.random.split(key, updates))
    return Judge(learning.parameters(state), learning.evaluate(state, unseen))


def labelled(key: Array, policy: Any, number: int) -> tuple[Labelled, Labelled]:
    """Answers of the policy with labels of their outcome, and of their steps."""
    key_answer, key_value = jax.random.split(key)
    answers = answer(key_answer, TASK, MODEL, policy, number, 1, Support())
    said, problems = answers.rollout, answers.problems
    outcome = jnp.broadcast_to(answers.parts["correct"][:, None], said.mask.shape)
    values = rollouts.step_values(key_value, TASK, MODEL, policy, answers, COPIES)
    both = (outcome, process_reward.last_token(said.mask)), (values, said.mask.astype(jnp.float32))
    outcomes, steps = (Labelled(problems.prompt, problems.valid, said, *x) for x in both)
    return outcomes, steps


def score(judge: Judge, problems: Problem, said: Rollout, how: str) -> Array:
    """What answers are worth: the reward at their last token, or the least of their steps."""
    logit, _ = process_reward.logits(MODEL, judge.params, problems.prompt, problems.valid, said)
    if how == "least":
        return jnp.min(jnp.where(said.mask, logit, jnp.inf), axis=1)
    return jnp.sum(logit * process_reward.last_token(said.mask), axis=1)


def experiment(key: Array, args: Args) -> dict[str, Array]:
    """All numbers of one seed. Pure: vmap it."""
    keys = jax.random.split(key, 7)
    begin = sft.make(TASK, sft.Config(SHAPE), sft.Hyper(learning_rate=2e-3))
    updates = max(1, int(args.policy_updates * args.share))
    policy = run.train_fn(begin, updates * begin.env_steps_per_update)(keys[0])[0].params
    outcomes, steps = labelled(keys[1], policy, args.num_answers)
    unseen = labelled(keys[2], policy, 512)
    number = max(1, int(args.updates * args.share))
    outcome = judged(keys[3], policy, outcomes, unseen[0], number)
    process = judged(keys[4], policy, steps, unseen[1], number)
    found = {f"outcome {name}": x for name, x in outcome.unseen.items()}
    found |= {f"process {name}": x for name, x in process.unseen.items()}

    answers = answer(keys[5], TASK, MODEL, policy, QUESTIONS, MOST, Support())
    correct, said = answers.parts["correct"], answers.rollout
    scores = {
        "outcome": score(outcome, answers.problems, said, "last"),
        "process": score(process, answers.problems, said, "least"),
    }
    found["one"] = correct.mean()
    found["any"] = correct.reshape(-1, MOST).max(1).mean()
    for n in COUNTS:
        rows = (jnp.arange(QUESTIONS)[:, None] * MOST + jnp.arange(n)[None]).ravel()
        some = jax.tree.map(lambda x, rows=rows: x[rows], said)
        chosen = {"majority": rollouts.majority(some, n)}
        chosen |= {name: rollouts.best_of(x[rows], n) for name, x in scores.items()}
        weighed = {name: rollouts.majority(some, n, jax.nn.sigmoid(x[rows])) for name, x in scores.items()}
        chosen |= {f"{name} weighed": x for name, x in weighed.items()}
        found |= {f"{name} {n}": correct[rows][x].mean() for name, x in chosen.items()}
    problems = jax.tree.map(lambda x: x[::MOST], answers.problems)
    for name, judge in (("outcome", outcome), ("process", process)):

        def worth(problems: Problem, said: Rollout, judge: Judge = judge) -> Array:
            return score(judge, problems, said, "last")

        beam = rollouts.step_beam(keys[6], TASK, MODEL, policy, worth, problems, BEAMS, EXPANSIONS, 1)
        found[f"{name} beam"] = beam.answers.parts["correct"].mean()
        found[f"{name} beam tokens"] = beam.drawn.mean(dtype=jnp.float32)
    return found | {"tokens": said.mask.sum() / QUESTIONS}


def main(argv: list[str]) -> None:
    args = cli.parse(Args, argv, doc=__doc__)
    for name in ("num_seeds", "num_answers", "policy_updates", "updates"):
        checks.positive_int(name, getattr(args, name))
    checks.above_zero("share", args.share)
    folder = cli.folder_of_runs(args.run_dir, args.resume, "search")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: x for name, x in vars(args).items() if name not in ("run_dir", "resume")}

    def train() -> dict[str, Any]:
        print("policies, labels, reward models and answers of all seeds", file=sys.stderr, flush=True)
        keys = jax.random.split(jax.random.key(args.seed), args.num_seeds)
        found = jax.jit(jax.vmap(lambda key: experiment(key, args)))(keys)
        return {"found": {name: np.asarray(x).tolist() for name, x in found.items()}}

    found = {
        name: np.array(x) for name, x in folders.remembered(folder / "search.json", settings, train)["found"].items()
    }
    rows = [{"choice": "one answer", f"right of {MOST}": percent(found["one"])}]
    for name in ("majority", "outcome", "process"):
        rows.append({"choice": NAMES[name], f"right of {MOST}": percent(found[f"{name} {MOST}"])})
    for name in ("outcome", "process"):
        rows.append(
            {
                "choice": f"majority, weighed by the {NAMES[name]}",
                f"right of {MOST}": percent(found[f"{name} weighed {MOST}"]),
            }
        )
    for name in ("outcome", "process"):
        rows.append({"choice": f"{BEAMS} beams by {NAMES[name]}", f"right of {MOST}": percent(found[f"{name} beam"])})
    rows.append({"choice": "any of them", f"right of {MOST}": percent(found["any"])})
    report.print_table(folder / "search.csv", rows)
    for name in ("outcome", "process"):
        said = ", ".join(
            f"{x.replace('_', ' ')} {stats.brief(found[f'{name} {x}'], '.3f')}"
            for x in ("accuracy", "calibration_error")
        )
        print(f"{NAMES[name]}, on answers that it did not see: {said}")
    print(f"tokens drawn a question: {found['tokens'].mean():.0f}; by beams {found['process beam tokens'].mean():.0f}")
    lines = [
        (NAMES[x], np.array(COUNTS), np.stack([found[f"{x} {n}"] for n in COUNTS], axis=1))
        for x in ("majority", "outcome", "process")
    ]
    plot.draw(folder / "search.png", [plot.Panel("One of n answers", "n", "right", lines, log="x")])
    print(f"{folder}/search.png")


NAMES = {"majority": "majority", "outcome": "outcome reward model", "process": "process reward model"}


def percent(x: np.ndarray) -> str:
    return stats.brief(100 * x, ".1f") + " %"


if __name__ == "__main__":
    cli.main(main)
