"""The command line and the scripts as a user meets them."""

import csv
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import processes
import pytest
from processes import ROOT

from jrl.algos import grpo
from jrl.lm import tasks
from jrl.lm.policy import language_model
from jrl.lm.sampling import sample
from jrl.nets import transformer

TINY = [
    "--config.num-envs",
    "2",
    "--config.num-steps",
    "8",
    "--config.num-minibatches",
    "2",
    "--config.network.hidden",
    "8",
]


def experiment(*args, name="ppo", cwd=None):
    return processes.experiment(name, *args, cwd=cwd)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the command line: its folder, its words, and the process that ended."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = (*TINY, "--env-steps", 320, "--num-seeds", 2, "--eval-episodes", 2, "--run-dir", folder)
    return folder, words, experiment(*words)


def test_the_experiment_trains(trained):
    folder, _, done = trained
    assert done.returncode == 0, done.stderr
    assert "return, greedy: IQM" in done.stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["env_steps"] == 320 and summary["num_seeds"] == 2


def test_a_folder_with_a_run_is_refused_without_resume(trained, monkeypatch, capsys):
    code, said = processes.refused("ppo", trained[1], monkeypatch, capsys)
    assert code == 1 and "error:" in said and "already contains a run" in said


@pytest.mark.slow
def test_the_experiment_resumes(trained):
    resumed = experiment(*trained[1], "--resume")
    assert resumed.returncode == 0 and "resumed at 320 steps" in resumed.stderr


@pytest.mark.slow
def test_a_sweep_with_an_environment_of_one_s_own_and_a_picture(tmp_path):
    source = (
        "import jax.numpy as jnp\nfrom jrl.envs import Discrete\naction_space = Discrete(2)\ntime_limit = 3\n"
        "def reset(key):\n    return jnp.zeros(1), 0\n"
        "def step(key, state, action):\n    return jnp.zeros(1), state + 1, action, False, state + 1 >= 3\n"
    )
    (tmp_path / "mine.py").write_text(source)
    args = (*TINY, "--env", "mine.py", "--env-steps", 64, "--num-seeds", 2, "--run-dir", "run", "--eval-episodes", 2)
    done = experiment(*args, "--sweep", "hyper.learning_rate=1e-3,1e-2", "hyper.clip_eps=0.1,0.2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "run/summary.json").read_text())["cells"]) == 4
    assert done.stdout.count("greedy") == 4


@pytest.mark.slow
def test_a_gif(tmp_path):
    args = (*TINY, "--env", "Catch-bsuite", "--env-steps", 32, "--num-seeds", 1, "--eval-episodes", 1, "--gif")
    done = experiment(*args, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/policy.gif").read_bytes()[:3] == b"GIF"


@pytest.mark.parametrize(
    "args, message",
    [
        (["--env", "CartPol-v1"], "unknown environment 'CartPol-v1'; did you mean CartPole-v1"),
        (["--precision", "float8"], "precision must be one of float32, bfloat16"),
        (["--preset", "Doom"], "unknown preset 'Doom'; there are: auto, none, CartPole-v1"),
        (["--sweep", "hyper.lr=1,2"], "unknown hyperparameter 'lr'; there are: learning_rate"),
        (["--sweep", "hyper.gamma=a"], "a sweep is written hyper.NAME=NUMBER"),
        (["--sweep", "config.num_envs=1,2"], "cannot sweep config.num_envs: config fields are compiled in"),
        (["--hyper.gamma", "1.5"], "hyper.gamma must be between 0 and 1; got 1.5"),
        (["--sweep", "hyper.gamma=0.9,1.5"], "hyper.gamma must be between 0 and 1; got 1.5"),
        (["--resume"], "--resume needs --run-dir"),
        (["--num-seeds", "0"], "num_seeds must be an integer of at least 1; got 0"),
        (["--config.num-minibatches", "7"], "config.num_minibatches must divide num_envs * num_steps = 512; got 7"),
        (["--config.loss", "foo"], "'penalty'"),
        (["--num-seeds", "many"], "many is not a whole number"),
        (["--bogus"], "--bogus"),
        (["--env-params", "x=1"], "CartPole-v1 has no parameter 'x'; it has:"),
        (["--env", "MNISTBandit-bsuite"], "unknown environment"),
    ],
)
def test_wrong_words_say_what_is_allowed(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    code, said = processes.refused("ppo", args, monkeypatch, capsys)
    assert code != 0 and message in said
    assert not list(tmp_path.iterdir())


def test_a_refusal_is_one_line_and_an_exit_status(tmp_path):
    done = experiment("--hyper.gamma", "1.5", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: hyper.gamma must be between 0 and 1; got 1.5\n" and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_optimizers_are_compared(tmp_path):
    args = ("--optimizers", "sgd", "adam", "--learning-rates", "0.01", "0.1", "--num-seeds", 2, "--env", "Catch-bsuite")
    args = (*args, "--env-steps", 1024, "--toy-steps", 100, "--run-dir", tmp_path)
    done = experiment(*args, name="optimizers")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "optimizers.csv").open()))
    assert [(r["optimizer"], r["learning rate"]) for r in rows] == [
        (name, rate) for name in ("sgd", "adam") for rate in ("0.01", "0.1")
    ]
    assert (tmp_path / "optimizers.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "name, words, message",
    [
        ("optimizers", ["--optimizers", "adagrad"], "optimizers must be one of sgd, adam, adamw"),
        ("optimizers", ["--toy-steps", "20"], "toy_steps must be a multiple of 50; got 20"),
        ("optimizers", ["--learning-rates", "-1"], "learning_rates must be at least 0; got -1"),
        ("precision", ["--variants", "float8"], "variants must be one of float32, bfloat16"),
        ("precision", ["--variants"], "variants must name at least one"),
        ("q_learning", ["--methods", "q-learning"], "methods must be one of sarsa, expected_sarsa"),
        ("memory", ["--kinds", "lstm"], "kinds must be one of none, gru, window, dense, nsa; got 'lstm'"),
        ("memory", ["--lengths", "0"], "lengths must be an integer of at least 1; got 0"),
        ("memory", ["--env-steps", "0"], "env_steps must be an integer of at least 1; got 0"),
        ("language", ["--kinds", "gru"], "kinds must be one of dense, window, nsa, mla, dsa, rwkv; got 'gru'"),
        ("language", ["--steps", "0"], "steps must be an integer of at least 2; got 0"),
        ("language", ["--length", "10000000"], "length must be below "),
        ("language", ["--dim", "30"], "transformer.dim must be a multiple of num_heads = 4"),
        # The first method could be trained; the model would only be missed after the settings.
        (
            "grpo",
            ["--methods", "reinforce++", "grpo", "--config.group-size", "1"],
            "config.group_size must be an integer",
        ),
        (
            "lm",
            ["grpo", "--model", "none", "--config.num-minibatches", "7"],
            "config.num_minibatches * micro_batches must",
        ),
    ],
)
def test_comparisons_refuse_wrong_words(name, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, said = processes.refused(name, words, monkeypatch, capsys)
    assert code == 1 and f"error: {message}" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_precisions_are_compared(tmp_path):
    args = ("--variants", "float32", "all bfloat16 stochastic", "--num-seeds", 2, "--env", "Catch-bsuite")
    args = (*args, "--memory-width", 0, "--run-dir")
    done = experiment(*args, tmp_path, "--env-steps", 1024, name="precision")
    assert done.returncode == 0, done.stderr
    wide, narrow = csv.DictReader((tmp_path / "precision.csv").open())
    assert int(narrow["state KiB"]) <= 0.51 * int(wide["state KiB"])
    assert narrow["overlaps float32"] in ("yes", "no") and (tmp_path / "precision.png").exists()
    done = experiment(*args, tmp_path / "speed", "--speed-widths", 16, name="precision")
    assert done.returncode == 0, done.stderr
    assert [r["width"] for r in csv.DictReader((tmp_path / "speed/speed.csv").open())] == ["16", "16"]


@pytest.mark.slow
def test_the_random_walk_s_figures(tmp_path):
    done = experiment("--runs", 8, "--run-dir", tmp_path, name="td_random_walk")
    assert done.returncode == 0, done.stderr
    rows = {
        (r["method"], r["setting"]): float(r["RMS error"])
        for r in csv.DictReader((tmp_path / "td_random_walk.csv").open())
    }
    for method, setting, error in (  # read off the book's plots
        ("n-step TD", "n = 4", 0.26),
        ("n-step TD", "n = 1", 0.35),
        ("TD(lambda)", "lambda = 0.8", 0.26),
        ("offline lambda-return", "lambda = 0.8", 0.25),
    ):
        assert abs(rows[method, setting] - error) < 0.05
    assert (tmp_path / "td_random_walk.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_cliff_s_figures(tmp_path):
    args = ("--runs", 20, "--episodes", 100, "--methods", "sarsa", "q_learning", "--run-dir", tmp_path)
    done = experiment(*args, name="q_learning")
    assert done.returncode == 0, done.stderr
    assert "the best possible: -13" in done.stdout and (tmp_path / "q_learning.png").exists()


@pytest.mark.slow
def test_memories_are_compared(tmp_path):
    args = ("--lengths", 3, "--kinds", "none", "--env-steps", 1024, "--num-seeds", 2, "--run-dir", tmp_path)
    done = experiment(*args, name="memory")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "memory.csv").open()))
    assert [(r["steps back"], r["memory"]) for r in rows] == [("3", "none")] and float(
        rows[0]["return"].split()[0]
    ) <= 1
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    refused = experiment(*args, name="memory")
    assert refused.returncode == 1 and "already contains runs or other files: resume it (--resume)" in refused.stderr
    again = experiment(*args, "--resume", name="memory")  # nothing is trained twice
    assert again.returncode == 0 and list(csv.DictReader((tmp_path / "memory.csv").open())) == rows
    assert "resumed at 1,024 steps" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, length, kind, name", [("text", 16, "window", "language"), ("needle", 256, "rwkv", "needle")]
)
def test_language_models_are_compared(task, length, kind, name, tmp_path):
    args = ("--task", task, "--kinds", kind, "--length", length, "--steps", 4, "--batch-size", 1)
    done = experiment(*args, "--dim", 8, "--num-layers", 1, "--run-dir", tmp_path, name="language")
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader((tmp_path / f"{name}.csv").open())
    assert (row["kind"], row["tokens"]) == (kind, str(length))
    guess = {"text": 256, "needle": 65}[task]  # four steps have learnt little: the loss is about that of a guess
    assert abs(float(row["test loss"]) - math.log(guess)) < 0.5
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_help_reads_well():
    done = experiment("--help", "--env", "Breakout-MinAtar")
    assert done.returncode == 0
    for text in ("--env", "--hyper.learning-rate FLOAT", "--config.network.hidden", "--sweep", "10000000)"):
        assert text in done.stdout


# Shell scripts


def shell(script, *args, **environment):
    command = ["bash", str(ROOT / "scripts" / script), *args]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def test_scripts_refuse_an_old_python(tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\ncase "$2" in *version_info*) exit 1;; *) echo 3.10.13;; esac\n')
    old.chmod(0o755)
    for script in ("run", "test"):
        done = shell(script, "x.py", JRL_PYTHON=str(old))
        assert done.returncode == 1
        assert done.stderr == "error: jrl needs Python 3.11 or newer; JRL_PYTHON is 3.10.13\n"


def test_scripts_refuse_a_wrong_accelerator_or_interpreter():
    done = shell("run", "x.py", JRL_ACCEL="gpu")
    assert done.returncode == 1 and done.stderr == "error: JRL_ACCEL must be cpu, tpu, cuda12 or cuda13; got 'gpu'\n"
    done = shell("run", "x.py", JRL_PYTHON="/nonexistent/python")
    assert done.returncode == 1 and "not a Python interpreter" in done.stderr
    done = shell("run")
    assert done.returncode == 1 and "usage: bash scripts/run" in done.stderr


def test_run_uses_the_interpreter_it_is_given(tmp_path):
    script = tmp_path / "hello.py"
    script.write_text("import jrl, sys; print(jrl.__version__, *sys.argv[1:])")
    done = shell("run", str(script), "a b", JRL_PYTHON=sys.executable)
    assert done.stdout == "0.2.0 a b\n"


# TPU, by the compiler alone


@pytest.mark.slow
def test_the_update_compiles_for_tpus():
    pytest.importorskip("libtpu")
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts/tpu_check.py"),
            "--seeds",
            "16",
            "--algos",
            "ppo",
            "dqn",
            "--chips",
            "v5e",
        ],
        capture_output=True,
        text=True,
        env=processes.ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| v5e")]
    assert len(rows) == 2 and all(0 < float(row.split("|")[2]) < 1 for row in rows)


# Scripts as modules


def module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def test_registers_are_read_from_what_the_assembler_prints():
    printed = """ptxas info    : Compiling entry function 'flash_forward_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
ptxas warning : Registers are spilled to local memory in function 'nsa_choose_mosaic_gpu_kernel', 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Compiling entry function 'nsa_choose_mosaic_gpu_kernel' for 'sm_90a'
    8 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 8 bytes cumulative stack size, 1 bytes smem
"""
    found = module("gpu_check").registers(printed)
    assert found == {"flash_forward": ("168", "0"), "nsa_choose": ("255", "8")}


@pytest.mark.slow
def test_attention_is_measured_side_by_side(tmp_path, capsys):
    bench = module("bench_attention")
    bench.main(bench.Args(lengths=(64,), decode=(128,), repeats=1, heads=2, head_dim=8, folder=tmp_path))
    out = capsys.readouterr().out
    for kind in ("dense", "jax", "blocks", "nsa"):
        (row,) = [line for line in out.splitlines() if line.startswith(f"| 64 | forward | {kind} |")]
        assert float(row.split("|")[4]) > 0
    assert (tmp_path / "attention.png").stat().st_size > 1000
    rows = {r["kind"]: r for r in csv.DictReader((tmp_path / "caches.csv").open())}
    size = {kind: int(r["bytes of cache"]) for kind, r in rows.items()}
    assert list(size) == ["dense", "dense, 2 key heads", "window", "nsa", "mla", "rwkv"]
    assert size["dense"] == 128 * 2 * 8 * 4 and size["dense, 2 key heads"] == 2 * size["dense"]
    assert size["mla"] == 128 * (4 * 8 + 4) * 4 and size["rwkv"] == (2 * 8 * 8 + 2 * 8) * 4
    assert all(float(r["seconds of a step"]) > 0 for r in rows.values()) and rows["dense"]["dense over it"] == "1.00"
    assert int(rows["nsa"]["bytes read a step"]) == size["nsa"]  # two blocks there are, which are both read
    assert (tmp_path / "caches.png").stat().st_size > 1000


@pytest.mark.slow
def test_attention_is_compared_with_float64(tmp_path):
    bench = module("bench_attention")
    kinds = ("blocks", "nsa", "nsa compression", "nsa selection", "nsa window")
    bench.main(bench.Args(kinds=kinds, lengths=(80,), heads=2, head_dim=8, errors=True, folder=tmp_path))
    rows = {r["kind"]: r for r in csv.DictReader((tmp_path / "errors.csv").open())}
    assert tuple(rows) == kinds
    for kind, row in rows.items():
        found = [float(row[name]) for name in ("output", "queries", "keys", "values", "gates") if row[name]]
        assert len(found) == 4 + (kind == "nsa") and 0 < max(found) < 2e-6


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            {"kinds": ("flash",)},
            "kinds must be one of dense, jax, blocks, cudnn, splash, nsa, nsa xla, nsa kernels, nsa compression, "
            "nsa selection, nsa window; got 'flash'",
        ),
        ({"kinds": ("nsa kernels",)}, f"kinds: 'nsa kernels' needs a TPU; this is a {jax.default_backend().upper()}"),
        ({"chips": ("v4",)}, "chips must be one of v5e, v6e, v5p; got 'v4'"),
        ({"heads": 6, "kv_heads": 4}, "heads must be a multiple of kv_heads = 4; got 6"),
        ({"decode": (8,)}, "decode must be an integer of at least 16; got 8"),
        ({"head_dim": 6}, "head_dim must be a multiple of 4; got 6"),
    ],
)
def test_attention_cannot_be_measured(wrong, message, tmp_path):
    bench = module("bench_attention")
    with pytest.raises(SystemExit, match=f"^error: {message}$"):
        bench.main(bench.Args(**wrong, folder=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_sampling_and_training_are_measured(tmp_path):
    bench = module("bench_grpo")
    shape = transformer.Config(dim=8, num_layers=1, num_heads=2, num_kv_heads=2)
    config = grpo.Config(model=shape, num_prompts=2, group_size=2)
    bench.main(bench.Args(task_params=("length=3",), seeds=(1, 2), repeats=1, config=config, folder=tmp_path))
    rows = list(csv.DictReader((tmp_path / "grpo.csv").open()))
    assert [r["seeds"] for r in rows] == 5 * ["1"] + 5 * ["2"]
    assert all(float(r["tokens/s"].replace(",", "")) > 0 for r in rows)
    assert rows[0][""].endswith("x sampling, no cache") and rows[3][""].endswith("x update, one by one")

    task = tasks.make("reverse", length=3)
    model = language_model(task, shape, "float32")
    params, problem = model.init(jax.random.key(0)), task.draw(jax.random.key(1))
    given = problem.prompt[None], {"length": 4, "end": -1, "valid": problem.valid[None]}
    with_cache, without = (
        sample(jax.random.key(2), m, params, given[0], **given[1]) for m in (model, bench.without_cache(model))
    )
    assert (with_cache.tokens == without.tokens).all()


@pytest.mark.slow
def test_a_language_model_of_a_published_shape_is_measured(tmp_path):
    bench = module("bench_language")
    small = {"rows": 4, "group_size": 2, "prompt": 4, "answer": 4, "train_rows": 4, "train_length": 8, "repeats": 1}
    bench.main(bench.Args("tiny", folder=tmp_path, micro_batches=2, **small))
    rows = list(csv.DictReader((tmp_path / "language.csv").open()))
    assert [row["what"] for row in rows][:3] == ["sampling", "training", "GRPO, an update"]
    assert all(float(row["tokens/s"].replace(",", "")) > 0 for row in rows)
    assert rows[2]["of the card"].endswith("% of sampling and training alone")
    with pytest.raises(ValueError, match="group_size must divide rows = 4; got 3"):
        bench.programs(bench.Args("tiny", **small | {"group_size": 3}))


@pytest.mark.parametrize("name, millions", [("smollm2-135m", 134.5), ("qwen3-0.6b", 596.0)])
def test_published_shapes_have_their_numbers_of_parameters(name, millions):
    bench = module("bench_language")
    assert bench.size_of(bench.SHAPES[name]) / 1e6 == pytest.approx(millions, abs=0.05)


def test_results_are_chosen_by_algorithm_and_by_name():
    results = module("results")
    assert list(results.chosen(results.Args(only=("dqn/CartPole-v1, 100k",)))) == ["dqn/CartPole-v1, 100k"]
    assert all(name.startswith("pqn/") for name in results.chosen(results.Args(algos=("pqn",))))
    with pytest.raises(ValueError, match="only must be one of ppo/CartPole-v1, "):
        results.main(["--only", "ppo/Nothing"])
