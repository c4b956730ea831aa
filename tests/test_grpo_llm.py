"""experiments/lm.py grpo on a tiny model in Hugging Face's layout, with problems from a file."""

import csv
import importlib.util
import signal
import subprocess
import time

import numpy as np
import processes
import pytest
from attacks import language_model

from jrl.lm import verifiers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    language_model.make(folder)
    return folder


def arguments(model, folder, *more):
    fixed = ("--model", model, "--dataset", model / "say.py", "--run-dir", folder, "--prompt-length", 4)
    sizes = ("--answer-length", 3, "--config.adapter.rank", 4, "--hyper.learning-rate", 0.01, "--save-every", 2)
    return (*fixed, *sizes, *more)


def train(model, folder, *more):
    return processes.experiment("lm", "grpo", *arguments(model, folder, *more))


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if "per_s" not in k} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_numbers(model, tmp_path):
    whole = train(model, tmp_path / "whole", "--steps", 20)
    assert whole.returncode == 0, whole.stderr
    assert (tmp_path / "whole/curve.png").exists() and '\n20,"say' in (tmp_path / "whole/samples.csv").read_text()

    line = processes.command("lm", "grpo", *arguments(model, tmp_path / "killed", "--steps", 20))
    killed = subprocess.Popen(line, stdout=subprocess.PIPE, env=processes.ENVIRONMENT)
    while not any(path.name.isdigit() for path in (tmp_path / "killed/checkpoints").glob("*")):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    again = train(model, tmp_path / "killed", "--steps", 20)
    assert again.returncode == 0, again.stderr
    assert "resumed at step" in again.stdout
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_settings_it_had(model, tmp_path):
    assert train(model, tmp_path, "--steps", 1, "--config.oversample", 2).returncode == 0
    (row,) = rows_of(tmp_path)
    assert row["episodes"] == 32  # all that were drawn
    other = train(model, tmp_path, "--steps", 2, "--config.oversample", 2, "--hyper.kl-weight", 0.5)
    assert other.returncode == 1 and "another configuration: hyper.kl_weight was 0.04, is 0.5" in other.stderr


@pytest.mark.slow
def test_the_model_itself_over_two_devices_learns_as_on_one(model, tmp_path):
    full = ("--steps", 2, "--config.adapter.kind", "full", "--config.micro-batches", 2)
    for count in (1, 2):
        done = train(model, tmp_path / str(count), "--devices", count, "--model-devices", count, *full)
        assert done.returncode == 0, done.stderr
    for a, b in zip(rows_of(tmp_path / "1"), rows_of(tmp_path / "2"), strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_published_model_takes_steps_with_adapters(smollm2_file, tmp_path):
    (tmp_path / "say.py").write_text(language_model.PROBLEMS)
    problems = () if importlib.util.find_spec("reasoning_gym") else ("--dataset", tmp_path / "say.py")
    sizes = ("--config.num-prompts", 2, "--config.group-size", 2, "--config.micro-batches", 1, "--answer-length", 4)
    done = processes.experiment(
        "lm", "grpo", "--model", smollm2_file, "--run-dir", tmp_path / "run", "--steps", 2, *problems, *sizes
    )
    assert done.returncode == 0, done.stderr
    assert [row["update"] for row in rows_of(tmp_path / "run")] == [1, 2]


@pytest.mark.thorough(2)
@pytest.mark.parametrize(
    "more, message",
    [
        (("--devices", 3), "devices must be between 1 and 2; got 3"),
        (("--devices", 2, "--model-devices", 3), "model_devices must divide the 2 devices; got 3"),
        (("--devices", 2, "--config.micro-batches", 16), "must be a multiple of the 2 devices that share them; got 1"),
        (("--setting", "larger=2"), "say.py has no setting 'larger'; it has: seed, largest"),
        (("--dataset", "absent.py"), "no such file of problems: absent.py"),
        (("--model", "absent"), "absent must be a folder, or a .gguf file"),
        (("--prompt-length", 1), "prompt_length = 1 fits 0 of 400 prompts, and an update takes 4"),
        (("--setting", "seed=1"), "setting: seed is not the dataset's"),
        (("--config.supervised", 2), "Unrecognized options: --config.supervised, 2"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(more, message, model, tmp_path):
    done = train(model, tmp_path / "run", *more)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_file_of_problems_must_make_a_source(tmp_path):
    path = tmp_path / "mine.py"
    for text, message in [("", "must define make"), ("def make(seed): return 1", "must return a .*Source; got int")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            verifiers.from_file(path)
