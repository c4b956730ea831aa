"""experiments/lm.py: supervised learning, reward models, DPO and PPO on a tiny model in Hugging Face's layout, with data from files."""

import csv
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from attacks import language_model

from jrl import lm
from jrl.algos import process_reward
from jrl.lm import data, examples, hf, peft, verifiers
from jrl.lm.pairs import as_rollout
from jrl.nets import adapters, transformer
from jrl.run import RunError, compare, folders, language, show

sys.path.insert(0, str(processes.ROOT / "experiments"))
import lm_answers
import lm_judged
import lm_problems
import lm_texts

COMMANDS = {
    "sft": lm_texts.sft,
    "reward": lm_texts.reward,
    "process": lm_texts.process,
    "dpo": lm_texts.dpo,
    "ppo": lm_answers.ppo,
}
SMALL = (
    "--save-every",
    "2",
    "--config.adapter.rank",
    "2",
    "--config.micro-batches",
    "1",
    "--hyper.learning-rate",
    "0.01",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    language_model.make(folder)
    rows = {
        "texts": [{"prompt": f"say {i % 10}", "completion": f"{i % 10}"} for i in range(40)],
        "pairs": [{"prompt": f"say {i % 10}", "chosen": f"{i % 10}", "rejected": f"{(i + 3) % 10}"} for i in range(40)],
        "steps": [
            {
                "prompt": f"say {i % 10}",
                "completions": [f"{i % 10}", f"{i * 7 % 10}"],
                "labels": [True, i * 7 % 10 == i % 10],
            }
            for i in range(40)
        ],
        "prompts": [{"prompt": f"say {i}"} for i in range(10)],
    }
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def words_of(command, folder, run_dir, *more):
    data = {"sft": "texts", "reward": "pairs", "process": "steps", "dpo": "pairs"}.get(command)
    given = ("--data", folder / f"{data}.jsonl", "--config.batch-size", 4) if data else ("--answer-length", 3)
    return [str(x) for x in ("--model", folder, "--run-dir", run_dir, *SMALL, *given, *more)]


def train(command, folder, run_dir, *more):
    COMMANDS[command](words_of(command, folder, run_dir, *more))
    with (run_dir / "metrics.csv").open() as file:
        return [{k: x for k, x in row.items() if "per_s" not in k} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def judge(folder, tmp_path_factory):
    """A reward model that was trained on the pairs."""
    run_dir = tmp_path_factory.mktemp("judge") / "run"
    rows = train("reward", folder, run_dir, "--steps", 40, "--eval-every", 20)
    return run_dir, rows


@pytest.mark.slow
def test_a_reward_model_ranks_pairs_that_it_did_not_see_and_is_left_for_transformers(folder, judge):
    run_dir, rows = judge
    assert float(rows[-1]["eval_accuracy"]) > 0.9 and float(rows[-1]["loss"]) < 0.5
    shape, params = hf.load_scorer(run_dir / "model")
    assert params["head"].shape == (shape.dim,) and np.abs(params["head"]).max() > 0
    config = json.loads((run_dir / "model/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["id2label"] == {"0": "LABEL_0"}


@pytest.mark.slow
def test_steps_are_judged(folder, tmp_path):
    rows = train("process", folder, tmp_path / "run", "--steps", 40, "--eval-every", 20, "--separator", "<end>")
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) and 0 <= float(rows[-1]["eval_calibration_error"]) < 0.5
    assert hf.load_scorer(tmp_path / "run/model")[1]["head"].any()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_run_goes_on_in_the_middle_of_an_epoch_to_the_same_numbers(command, folder, tmp_path, capsys):
    more = ("--eval-every", 1, "--config.optimizer.schedule", "constant")  # which does not go by the length
    whole = train(command, folder, tmp_path / "whole", "--steps", 5, *more)
    train(command, folder, tmp_path / "parts", "--steps", 2, *more)
    parts = train(command, folder, tmp_path / "parts", "--steps", 5, *more)
    assert "resumed at step 2" in capsys.readouterr().out
    assert parts == whole and len(parts) == 5
    a, b = (peft.load(tmp_path / name / "adapter", language_model.SHAPE)[1] for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_what_was_learned_is_left_and_loaded_by_the_folder_of_the_run(folder, tmp_path):
    rows = train("sft", folder, tmp_path / "run", "--steps", 30, "--eval-every", 10, "--packing", "none")
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    shape, params, words = lm.load(tmp_path / "run")
    base = lm.load(folder)[1]
    assert np.abs(params["layers"]["q"] - base["layers"]["q"]).max() > 1e-3
    tokens = np.array([words.encode("say 3")])
    assert np.isfinite(transformer.forward(params, tokens, shape)).all()
    full = ("--config.adapter.kind", "full", "--steps", 2)
    train("sft", folder, tmp_path / "full", *full)
    assert (tmp_path / "full/model/tokenizer.json").is_file()
    again = train("sft", tmp_path / "full", tmp_path / "more", "--steps", 1, "--data", folder / "texts.jsonl")
    assert len(again) == 1


@pytest.mark.slow
def test_ppo_learns_from_a_learned_reward_and_shows_its_answers(folder, judge, tmp_path):
    given = ("--dataset", folder / "prompts.jsonl", "--reward", judge[0], "--config.num-answers", 8, "--stop", "3 3")
    rows = train("ppo", folder, tmp_path / "run", "--steps", 2, *given, "--eval-every", 1, "--eval-prompts", 8)
    assert all(np.isfinite(float(row[name])) for row in rows for name in ("learned", "kl", "loss", "eval_reward"))
    with (tmp_path / "run/samples.csv").open() as file:
        said = list(csv.DictReader(file))
    assert len(said) == 16 and set(said[0]) == {"update", "prompt", "answer", "reward", "learned"}
    assert all(row["prompt"].startswith("say ") for row in said)


@pytest.mark.thorough(2)
@pytest.mark.parametrize("command, more, message", [
    ("sft", ("--data", "none.jsonl"), "none.jsonl: No such file"),
    ("sft", ("--packing", "tight"), "packing"),
    ("sft", ("--epochs", 0), "epochs must be above 0"),
    ("sft", ("--eval-share", 1), "eval_share = 1 leaves none of the 40 rows"),
    ("sft", ("--config.adapter.kind", "prefix"), "config.adapter.kind = prefix is of one text a row: packing must be none"),
    ("sft", ("--config.model.dim", 8), "Unrecognized options: --config.model.dim"),
    ("sft", ("--model", "some/model"), "some/model must be a folder, or a .gguf file; a model of Hugging Face's hub is fetched by"),
    ("reward", ("--config.adapter.kind", "prefix"), "config.adapter.kind of a reward model must be one of full, lora"),
    ("dpo", ("--prompt-length", 1), "no pair has a prompt of up to 1"),
    ("dpo", ("--config.micro-batches", 3), "config.micro_batches must divide batch_size = 4"),
    ("ppo", ("--dataset", "prompts.jsonl"), "prompts.jsonl has prompts alone"),
    ("ppo", ("--dataset", "say.py", "--weight", "nope=1"), "weight: there is no part 'nope'; there are correct"),
    ("ppo", ("--dataset", "say.py", "--weight", "correct"), "weight must be NAME=NUMBER; got 'correct'"),
    ("ppo", ("--dataset", "say.py", "--reward", "."), "tensor score.weight is missing: this is no reward model"),
    ("ppo", ("--dataset", "say.py", "--system", "Be brief."), "system: this model has no chat template"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(command, more, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises((ValueError, SystemExit)) as error:
        COMMANDS[command](words_of(command, folder, tmp_path / "run", *more))
    said = f"{error.value}{''.join(capsys.readouterr())}"
    assert message in said
    with folders.opened(tmp_path / "run", True, {"others": 1}):  # nothing is left in its way
        pass


@pytest.mark.slow
def test_judged_answers_are_data_for_the_other_commands(folder, judge, tmp_path, capsys):
    given = (
        "--model",
        folder,
        "--dataset",
        folder / "say.py",
        "--answer-length",
        3,
        "--number",
        6,
        "--copies",
        4,
        "--together",
        4,
        "--reward",
        judge[0],
    )
    lm_judged.answer([str(x) for x in (*given, "--continuations", 4, "--separator", " ", "--run-dir", tmp_path)])
    said = capsys.readouterr().out
    for how in (
        "one answer",
        "any of 4",
        "majority of 4",
        "best of 4 by the reward model",
        "majority of 4 weighed by the reward model",
    ):
        assert f"correct, {how}: " in said
    judged, steps = (data.read(tmp_path / f"{name}.jsonl", name) for name in ("judged", "steps"))
    assert len(judged) == 24 and all(row["prompt"].startswith("say ") for row in judged)
    right = {row["prompt"]: {x["completion"] for x in judged if x["label"]} for row in judged}
    for row in steps:
        if row["labels"][-1]:
            assert " ".join(row["completions"]) in right[row["prompt"]]
    text = (tmp_path / "pairs.jsonl").read_text()
    for row in map(json.loads, text.splitlines()):
        assert row["prompt"][4] in row["chosen"] and row["prompt"][4] not in row["rejected"]


@pytest.mark.slow
def test_an_update_that_breaks_the_model_leaves_the_one_before(folder, tmp_path, capsys):
    huge = ("--hyper.learning-rate", "1e30", "--config.adapter.kind", "full", "--save-every", 100)
    with pytest.raises(RunError, match=r"turned NaN at update \d; the model of update \d is kept"):
        train("sft", folder, tmp_path / "run", "--steps", 6, *huge)
    assert "saved at step" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_goes_on_where_its_files_hold_what_they_held_and_by_no_other_command(
    folder, judge, tmp_path, monkeypatch
):
    texts = tmp_path / "texts.jsonl"
    texts.write_bytes((folder / "texts.jsonl").read_bytes())
    given = ("--steps", 2, "--config.optimizer.schedule", "constant")
    train("sft", folder, tmp_path / "run", *given, "--data", texts)
    monkeypatch.chdir(tmp_path)  # a path may be written in another way
    assert len(train("sft", folder, tmp_path / "run", *given, "--data", "texts.jsonl", "--steps", 3)) == 3
    texts.write_text(texts.read_text().replace("say 3", "say 4"))
    with pytest.raises(RunError, match=r"data was \[\"texts.jsonl \(1,560 bytes, .*\], is "):
        train("sft", folder, tmp_path / "run", *given, "--data", texts)
    with pytest.raises(RunError, match="run is a run of sft, not of dpo"):
        train("dpo", folder, tmp_path / "run", *given)
    said = show.show(tmp_path / "run")
    assert "sft on texts.jsonl: 1 seed" in said and "finished after 12 steps" in said and "config.model" not in said
    assert compare.read(tmp_path / "run", metric="loss")[0].curves.shape == (1, 3)


@pytest.mark.slow
def test_an_adapter_on_an_adapter_leaves_the_whole_model_that_it_belongs_to(folder, tmp_path):
    one = ("--steps", 2, "--data", folder / "texts.jsonl", "--eval-share", 0)
    train("sft", folder, tmp_path / "first", *one)
    train("sft", tmp_path / "first", tmp_path / "second", *one)
    base = json.loads((tmp_path / "second/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    merged, plain = lm.load(tmp_path / "first")[1], lm.load(base)[1]
    jax.tree.map(np.testing.assert_array_equal, merged, plain)
    assert (tmp_path / "second/adapter/tokenizer.json").is_file()
    shape, params, _ = lm.load(tmp_path / "second/adapter")
    assert shape == language_model.SHAPE and np.abs(params["layers"]["q"] - plain["layers"]["q"]).max() > 0
    with pytest.raises(ValueError, match=r"checkpoints holds no model; name the folder of its run, .*first$"):
        lm.load(tmp_path / "first/checkpoints")


@pytest.mark.slow
def test_a_model_of_steps_scores_an_answer_by_its_weakest_step(folder, tmp_path):
    train("process", folder, tmp_path / "run", "--steps", 20, "--separator", "<end>")
    assert hf.read_json(tmp_path / "run/model/config.json")["step_separator"] == "<end>"
    it = language.opened(folder, "float32", jax.make_mesh((1,), ("data",)))
    judge = lm_problems.scorer(tmp_path / "run", "float32", it)
    prompt, valid = examples.left_padded([it.words.encode("say 3")] * 2, 4, it.pad)
    said = ["3 <end> 7", "3"]
    found = lm_problems.learned_by(judge, it)(jnp.asarray(prompt), jnp.asarray(valid), None, said)
    alone = []
    for steps in (["3"], ["3", "7"]):
        tokens = [t for step in steps for t in it.words.encode(f"{step} <end>")]
        rollout = as_rollout(jnp.array([tokens]), jnp.ones((1, len(tokens)), bool))
        logits, _ = process_reward.logits(judge.model, judge.params, prompt[:1], valid[:1], rollout)
        alone.append(logits[0, -1])
    np.testing.assert_allclose(found, [min(alone), alone[0]], atol=1e-5)


def test_the_majority_is_that_of_answers_not_of_texts():
    texts = ["so 3", "it is 3.", "7", "7", "3", "none"]
    one = lm_judged.Judged("?", texts, {"learned": [0.0, 0.0, 9.0, 9.0, 0.0, 0.0]})
    ways = lm_judged.chosen([one], verifiers.last_number)
    assert ways == {
        "majority of 6": [0],
        "best of 6 by the reward model": [2],
        "majority of 6 weighed by the reward model": [2],
    }
    assert lm_judged.most_frequent([None, None], [1.0, 1.0]) == 0


def test_an_answer_is_right_step_by_step_if_one_of_its_continuations_is():
    one = lm_judged.Judged("?", ["a b c", "d"], {"correct": [0.0, 1.0]})
    shares = {"a ": 0.25, "a b ": 0.0}
    (row,) = lm_judged.labelled(" ", jax.random.key(0), one, lambda key, begun: shares[begun])
    assert row == {"prompt": "?", "completions": ["a", "b", "c"], "labels": [True, False, False]}


def test_problems_of_a_list_are_held_out():
    source = verifiers.from_prompts([f"say {i}" for i in range(30)], "list")
    rest, some = source.split(64, 0)
    seen = [{item.prompt for item in part.draw(0, 100)} for part in (rest, some)]
    assert len(seen[0]) == 27 and len(seen[1]) == 3 and not seen[0] & seen[1]
    with pytest.raises(ValueError, match="one problem cannot be held out of one"):
        verifiers.from_prompts(["a"], "list").split(64, 0)


@pytest.mark.slow
def test_answers_go_on_where_they_were_interrupted(folder, tmp_path, capsys):
    given = ("--model", folder, "--dataset", folder / "say.py", "--answer-length", 3, "--copies", 2, "--together", 4)
    for number, name in ((12, "whole"), (8, "parts")):
        lm_judged.answer([str(x) for x in (*given, "--number", number, "--run-dir", tmp_path / name)])
    with (tmp_path / "parts/answers.jsonl").open("a") as file:
        file.write('{"judged": [["say')  # killed in the middle of a line
    capsys.readouterr()
    lm_judged.answer([str(x) for x in (*given, "--number", 12, "--run-dir", tmp_path / "parts")])
    assert "8 problems were answered before" in capsys.readouterr().out
    for name in ("answers", "judged", "pairs"):
        assert (tmp_path / f"parts/{name}.jsonl").read_text() == (tmp_path / f"whole/{name}.jsonl").read_text()
    with pytest.raises(RunError, match="copies was 2, is 3"):
        lm_judged.answer([str(x) for x in (*given, "--copies", 3, "--run-dir", tmp_path / "parts")])


def test_settings_that_leave_nothing_to_learn_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="length = 2 cuts off all tokens that are learned from"):
        train("sft", folder, tmp_path / "run", "--length", 2, "--packing", "none")
    with pytest.raises(ValueError, match=r"adapter.targets must be a regular expression"):
        adapters.Config("lora", targets="[")
