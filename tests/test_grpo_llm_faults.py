"""experiments/lm.py grpo where problems, verifiers or settings give trouble: no update is lost, and the run goes on."""

import csv
import math
import sys

import processes
import pytest
from test_grpo_llm import model  # noqa: F401  (a tiny model in Hugging Face's layout)

from jrl.lm import verifiers
from jrl.run import RunError, steps

sys.path.insert(0, str(processes.ROOT / "experiments"))
import lm_answers
import lm_problems

PROMPTS = ("say 0", "say 1", "say 2", "say 3")


def right(items, texts):
    return [float(item.data in text) for item, text in zip(items, texts, strict=True)]


@pytest.fixture
def train(model, tmp_path, monkeypatch):  # noqa: F811
    """The script with a verifier of the test's own; gives the rows of metrics.csv, as text."""

    def run(score, prompts, *more):
        source = verifiers.from_function([verifiers.Item(x, x[4]) for x in prompts], score, "say")
        monkeypatch.setattr(lm_problems, "source_of", lambda args: source)
        fixed = (
            "--model",
            model,
            "--run-dir",
            tmp_path / "run",
            "--prompt-length",
            4,
            "--answer-length",
            2,
            "--save-every",
            100,
        )
        sizes = (
            "--config.num-prompts",
            2,
            "--config.group-size",
            2,
            "--config.micro-batches",
            1,
            "--config.adapter.rank",
            2,
        )
        lm_answers.grpo([str(x) for x in (*fixed, *sizes, *more)])
        with (tmp_path / "run/metrics.csv").open() as file:
            return list(csv.DictReader(file))

    run.folder = tmp_path / "run"
    return run


def steps_of(path):
    with path.open() as file:
        return sorted({int(row["update"]) for row in csv.DictReader(file)})


@pytest.mark.slow
def test_a_verifier_that_raises_costs_no_update_and_the_run_goes_on(train, capsys):
    calls = []

    def breaks(items, texts):
        calls.append(items)
        if len(calls) >= 3:
            raise KeyError("lost")
        return right(items, texts)

    with pytest.raises(
        verifiers.VerifierError, match=r"say: the verifier raised KeyError: 'lost' \(problem 'say \d', answer '"
    ):
        train(breaks, PROMPTS, "--steps", 4)
    assert "saved at step 2" in capsys.readouterr().out
    with (train.folder / "samples.csv").open("a") as file:
        file.write("3,of an update that was not saved\n")
    rows = train(
        right, PROMPTS, "--steps", 4, "--prompt-length", 6, "--config.micro-batches", 2
    )  # which change no mathematics
    assert "resumed at step 2" in capsys.readouterr().out
    assert [row["update"] for row in rows] == ["1", "2", "3", "4"]
    assert steps_of(train.folder / "samples.csv") == [1, 2, 3, 4]
    assert "not saved" not in (train.folder / "samples.csv").read_text()


def test_long_prompts_are_passed_over_and_counted_and_unjudged_answers_take_no_part(train, capsys):
    prompts = ("say 1", "say 2", "say 3" + " 3" * 40)

    def abstains(items, texts):
        return {
            "correct": [
                None if item.data == "2" else score for item, score in zip(items, right(items, texts), strict=True)
            ]
        }

    rows = train(abstains, prompts, "--steps", 3)
    assert "3 3" not in (train.folder / "samples.csv").read_text()
    passed = sum(float(row["overlong_prompts"]) for row in rows)
    assert (
        passed >= 1
        and f"{passed:.0f} problems with prompts of over 4 tokens were passed over" in capsys.readouterr().out
    )
    assert all(float(row["abstained"]) + float(row["episodes"]) == 4 for row in rows)
    assert any(float(row["abstained"]) > 0 for row in rows)
    assert not any(math.isnan(float(row["loss"])) for row in rows)


@pytest.mark.parametrize(
    "score, prompts, more, message",
    [
        (lambda items, texts: {"correct": right(items, texts), "reward": right(items, texts)}, PROMPTS, (), "say: the verifier's parts may not have the name of a metric: reward"),
        (lambda items, texts: None, PROMPTS, (), "'correct' must be 4 finite numbers, or None to abstain; got None"),
        (right, PROMPTS, ("--hyper.format-weight", 0.5), "hyper.format_weight = 0.5 weighs a part that the verifier does not give; it gives correct"),
        (right, ("say 3" + " 3" * 40,), (), "prompt_length = 4 fits 0 of 200 prompts, and an update takes 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_one_line(score, prompts, more, message, train):
    with pytest.raises(ValueError, match=message):
        train(score, prompts, *more)


def test_an_update_that_breaks_the_model_is_refused():
    steps.refuse_nan({"loss": 0.5, "grad_norm": 1.0, "mine": math.nan}, 7)
    with pytest.raises(RunError, match="grad_norm turned NaN at update 8; the model of update 7 is kept"):
        steps.refuse_nan({"loss": 0.5, "grad_norm": math.inf}, 7)
