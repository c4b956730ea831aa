"""Callbacks of the run loop and loggers besides the folder: what they are told, and that they change nothing."""

import csv
import importlib.util

import bits
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import envs, nets, run
from jrl.algos import ppo
from jrl.run import cli, loggers, loop, stats

RANK_PROMOTION = "allow"  # gymnax promotes ranks

TINY = ppo.Config(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=2, network=nets.Config(hidden=(8,)))


@pytest.fixture(scope="module")
def algo():
    return ppo.make(envs.make("Probe-action"), TINY)


@pytest.fixture(scope="module")
def plain(algo):
    return train(algo)


def train(algo, **more):
    kwargs = {"num_seeds": 3, "eval_episodes": 0, "progress": False} | more
    return run.train(algo, jax.random.key(0), 20 * 16, **kwargs)


def test_a_callback_sees_every_row_once_and_changes_nothing(algo, plain):
    chunks, states = [], []

    def on_chunk(chunk):
        chunks.append(chunk)
        states.append(chunk.state())

    result = train(algo, on_chunk=on_chunk)
    bits.assert_same(result.state, plain.state)
    assert np.concatenate([c.env_steps for c in chunks]).tolist() == result.metrics["env_steps"].tolist()
    loss = np.concatenate([c.metrics["loss"] for c in chunks], axis=-1)
    np.testing.assert_array_equal(loss, result.metrics["loss"])
    assert loss.shape == (3, 20)
    bits.assert_same(states[-1], result.state)
    jax.tree.map(lambda x: algo.act(x, jnp.zeros(1)), jax.tree.map(lambda x: x[1], states[0]), is_leaf=lambda x: True)


def test_a_callback_of_a_sweep_has_cells(algo):
    shapes = []
    grid = run.sweep.grid(algo.hyper, {"learning_rate": [1e-3, 1e-2]})
    train(algo, hypers=grid, on_chunk=lambda c: shapes.append((c.metrics["loss"].shape[:2], c.state().updates.shape)))
    assert set(shapes) == {((2, 3), (2, 3))}


def test_a_callback_stops_a_run_which_goes_on_bit_for_bit(algo, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHUNK_SECONDS", 0)  # an update a chunk
    stopped = train(algo, run_dir=tmp_path / "run", on_chunk=lambda chunk: True)
    assert not stopped.finished and stopped.summary["env_steps"] < 320
    finished = train(algo, run_dir=tmp_path / "run", resume=True)
    assert finished.finished
    bits.assert_same(finished.state, plain.state)


def test_what_a_callback_raises_ends_the_run(algo):
    def on_chunk(chunk):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train(algo, on_chunk=on_chunk)


def test_a_logger_of_one_s_own_is_told_the_aggregates(algo, tmp_path):
    told, seen = [], {}

    def logger(settings, folder):
        seen.update(settings=settings, folder=folder, closed=0)

        def close():
            seen["closed"] += 1

        return loggers.Sink(lambda steps, values: told.append((steps, values)), close)

    train(algo, run_dir=tmp_path / "run", eval_episodes=2, loggers=[logger, logger])
    assert seen["closed"] == 2 and seen["folder"] == tmp_path / "run" and seen["settings"]["config.num_steps"] == 8
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").open()))
    losses = {steps: values["training/loss"] for steps, values in told if "training/loss" in values}
    for steps in (16, 320):
        wanted = stats.iqm([float(r["loss"]) for r in rows if int(r["env_steps"]) == steps])
        np.testing.assert_allclose(losses[steps], wanted, rtol=1e-5)
    assert told[-1][0] == 320 and set(told[-1][1]) == {"evaluation/return"}
    assert [steps for steps, _ in told[::2]] == sorted(steps for steps, _ in told[::2])


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"loggers": [print]}, "loggers needs a run_dir"),
        ({"on_chunk": 3}, "on_chunk must be a function; got 3"),
        ({"loggers": ["wandb"], "run_dir": "runs/never"}, "loggers must be a function; got 'wandb'"),
    ],
)
def test_wrong_callbacks_are_refused_before_anything_compiles(kwargs, message, algo):
    with pytest.raises(ValueError, match=message):
        train(algo, **kwargs)


@pytest.mark.parametrize("name", loggers.NAMED)
def test_a_logger_that_is_not_installed_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"needs the package {name}, which is an extra: pip install 'jrl\[{name}\]'"):
        loggers.NAMED[name]()


def test_the_command_line_knows_loggers_by_name():
    assert cli.parse(cli.Options, ["--log", "wandb"]).log == ("wandb",)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_weights_and_biases_offline(algo, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(loop, "CHUNK_SECONDS", 0)
    folder = tmp_path / "run"
    half = train(algo, run_dir=folder, loggers=[loggers.wandb("tests", mode="offline")], on_chunk=lambda chunk: True)
    assert not half.finished
    train(algo, run_dir=folder, resume=True, loggers=[loggers.wandb("tests", mode="offline")])
    written = list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 2 and all(path.stat().st_size > 1000 for path in written)
    assert len({path.name for path in written}) == 1  # one id: the run goes on
    assert b"training/loss" in written[0].read_bytes()
