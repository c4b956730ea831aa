"""The run loop: same numbers as the pure function, bit for bit resumable, and hard to break."""

import csv
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bits
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from scipy.stats import trim_mean

from jrl import envs, nets, run
from jrl.algos import ppo
from jrl.numerics import host, optim
from jrl.run import cli, compiled, folders, layout, log, loop, memory, program, progress, stats
from jrl.run.checkpoint import Checkpoints
from jrl.run.interrupt import StopOnSignal
from jrl.run.members import members_of

RANK_PROMOTION = "allow"  # gymnax promotes ranks

TINY = ppo.Config(
    num_envs=2,
    num_steps=8,
    num_epochs=1,
    num_minibatches=2,
    network=nets.Config(hidden=(8,)),
    optimizer=optim.OptimizerConfig(schedule="constant"),
)
PER_UPDATE = 16
ROOT = Path(__file__).parents[1]


@functools.cache
def make(env="CartPole-v1", **fields):
    return ppo.make(envs.make(env), dataclasses.replace(TINY, **fields))


@pytest.fixture(scope="module")
def kept():
    """What was compiled, until the end of this file."""
    return {}


@pytest.fixture(autouse=True)
def compiled_once(kept, monkeypatch):
    """Tests that train the same algorithm share what was traced and compiled for it."""
    check, chunk, compile_chunk = loop.check, program.chunk, compiled._compile_chunk

    def functions(algo):
        return algo.init, algo.update, algo.act, algo.losses, algo.learned, str(algo.hyper)

    def once(key, make, *args):
        if key not in kept:
            kept[key] = make(*args)
        return kept[key]

    def compile_once(run, states, *more):
        *options, scorer_of = more
        chosen, chunk, _ = once((run, str(states), *options), compile_chunk, run, states, *more)
        return chosen, chunk, scorer_of(chosen)

    monkeypatch.setattr(loop, "check", lambda algo: once(functions(algo), check, algo))
    monkeypatch.setattr(
        program, "chunk", lambda algo, names, *more: once((functions(algo), *names, *more), chunk, algo, names, *more)
    )
    monkeypatch.setattr(compiled, "_compile_chunk", compile_once)


def train(algo, updates, **kwargs):
    kwargs = {"num_seeds": 2, "eval_episodes": 0, "progress": False} | kwargs
    return run.train(algo, jax.random.key(0), updates * PER_UPDATE, **kwargs)


def assert_close(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=1e-4, atol=1e-5),
        bits.on_host(a),
        bits.on_host(b),
    )


@pytest.fixture(scope="module")
def trained():
    """A run of three seeds. What it compiles serves many of the tests below."""
    algo = make()
    return algo, train(algo, 4, num_seeds=3)


def test_train_is_train_fn(trained):
    algo, result = trained
    states, metrics = jax.jit(jax.vmap(run.train_fn(algo, 4 * PER_UPDATE)))(jax.random.split(jax.random.key(0), 3))
    assert_close(result.state, states)
    for name, values in metrics.items():
        np.testing.assert_allclose(result.metrics[name], values, rtol=1e-3, atol=1e-4, err_msg=name)
    assert result.metrics["env_steps"].tolist() == [16, 32, 48, 64] and result.finished


@pytest.mark.thorough(1)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "precision": "pure_bfloat16",
            "optimizer": optim.OptimizerConfig("adam", "constant", rounding="stochastic", moments="bfloat16", ema=True),
        },
        {"normalize_observations": True, "normalize_rewards": True},
        {"network": nets.Config(hidden=(8,), gru=4)},
        {"precision": "bfloat16"},
        {"precision": "float16", "optimizer": optim.OptimizerConfig("adamw", "constant", accumulate=2)},
    ],
    ids=["plain", "stochastic", "normalized", "gru", "bfloat16", "float16"],
)
def test_resume_is_bitwise(fields, tmp_path):
    algo = make(**fields)
    whole = train(algo, 6, num_seeds=3, run_dir=tmp_path / "whole")
    train(algo, 3, num_seeds=3, run_dir=tmp_path / "parts")
    parts = train(algo, 6, num_seeds=3, run_dir=tmp_path / "parts", resume=True)
    bits.assert_same(parts.state, whole.state)
    for name in whole.metrics:
        np.testing.assert_array_equal(parts.metrics[name], whole.metrics[name], err_msg=name)
    assert (tmp_path / "parts/metrics.csv").read_text() == (tmp_path / "whole/metrics.csv").read_text()


@pytest.mark.thorough(1)
@pytest.mark.parametrize(
    "laid_out",
    [
        pytest.param({"devices": 2, "seeds_at_once": 2}, marks=pytest.mark.two_devices),
        pytest.param({"devices": 2}, marks=pytest.mark.two_devices),
        {"devices": 1, "seeds_at_once": 2},
        {"devices": 1},
    ],
)
def test_grouping_and_devices_change_nothing(laid_out, trained):
    algo, whole = trained
    parts = train(algo, 4, num_seeds=3, **laid_out)
    assert_close(parts.state, whole.state)
    assert jax.tree.leaves(parts.state)[0].shape[0] == 3


@pytest.mark.slow
def test_seeds_that_do_not_fit_run_in_smaller_groups(monkeypatch):
    groups = []
    monkeypatch.setattr(
        "jrl.run.compiled.fits", lambda _, chosen: groups.append(chosen.group_size) or chosen.group_size <= 2
    )
    algo = make()
    result = train(algo, 3, num_seeds=5, devices=1)
    assert groups == [5, 2]
    monkeypatch.undo()
    assert_close(result.state, train(algo, 3, num_seeds=5, devices=1).state)


@pytest.mark.two_devices
def test_layouts():
    for members, devices, at_once, slots in (
        (16, 2, None, 16),
        (7, 2, None, 8),
        (100, 2, 16, 100),
        (128, 2, None, 128),
        (1, 2, None, 1),
    ):
        chosen = layout.choose(members, jax.devices()[:devices], at_once)
        assert chosen.num_slots == slots
        assert chosen.group_size <= max(1, (at_once or 16) // len(chosen.devices))


def test_sweep_cells_are_their_solo_runs(tmp_path):
    algo = make()
    grid = run.sweep.grid(algo.hyper, {"learning_rate": [1e-3, 1e-2], "optimizer.b1": [0.9]})
    assert list(grid) == ["learning_rate=0.001, optimizer.b1=0.9", "learning_rate=0.01, optimizer.b1=0.9"]
    result = train(algo, 3, hypers=grid, run_dir=tmp_path / "run", eval_episodes=2)
    alone = train(ppo.make(algo.env, algo.config, list(grid.values())[1]), 3)
    assert_close(jax.tree.map(lambda x: x[1], result.state), alone.state)
    assert result.metrics["loss"].shape == (2, 2, 3)
    assert set(result.summary["cells"]) == set(grid) and result.summary["best_cell"] in grid
    rows = list(csv.DictReader((tmp_path / "run/sweep.csv").open()))
    assert [r["cell"] for r in rows] == list(grid)
    assert {r["cell"] for r in csv.DictReader((tmp_path / "run/metrics.csv").open())} == set(grid)


def test_a_run_folder(tmp_path):
    result = train(make(), 5, run_dir=tmp_path / "a/run", eval_every=2 * PER_UPDATE, eval_episodes=4, log_every=2)
    folder = tmp_path / "a/run"
    summary = json.loads((folder / "summary.json").read_text())
    wanted = "algorithm env env_steps num_seeds eval compile_seconds run_seconds env_steps_per_second"
    assert set(wanted.split()) <= summary.keys()
    assert (summary["algorithm"], summary["env"], summary["env_steps"], summary["num_seeds"]) == (
        "ppo",
        "CartPole-v1",
        80,
        2,
    )
    assert {"iqm", "ci_low", "ci_high", "per_seed"} <= summary["eval"].keys() and len(summary["eval"]["per_seed"]) == 2
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["settings"]["config.num_envs"] == 2
        and config["versions"]["jax"] == jax.__version__
        and config["devices"]
    )
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG" and list((folder / "events").iterdir())
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [(r["update"], r["env_steps"], r["seed"]) for r in rows[::2]] == [
        ("2", "32", "0"),
        ("4", "64", "0"),
        ("5", "80", "0"),
    ]
    assert [e["env_steps"] for e in json.loads((folder / "evaluations.json").read_text())] == [32, 64, 80]
    assert result.metrics["loss"].shape == (2, 3)


@pytest.mark.slow
def test_a_run_of_many_members_keeps_its_rows_in_parquet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(log, "CSV_MEMBERS", 1)
    algo = ppo.make(envs.make("Probe-action"), TINY)
    args = {"num_seeds": 2, "run_dir": tmp_path / "run", "progress": False, "eval_episodes": 1}
    first = run.train(algo, jax.random.key(0), 10 * algo.env_steps_per_update, **args)
    again = run.train(algo, jax.random.key(0), 10 * algo.env_steps_per_update, resume=True, **args)
    assert not (tmp_path / "run/metrics.csv").exists() and list((tmp_path / "run/metrics").glob("*.parquet"))
    jax.tree.map(np.testing.assert_array_equal, again.metrics, first.metrics)
    cli.report(first)
    assert capsys.readouterr().out.rstrip().endswith("curve.png  summary.json  metrics")


def test_rows_are_means_of_updates():
    algo = make()
    fine, coarse = train(algo, 6, log_every=1).metrics, train(algo, 6, log_every=3).metrics
    np.testing.assert_allclose(coarse["loss"], fine["loss"].reshape(2, 2, 3).mean(-1), rtol=1e-3)
    episodes = fine["episodes"].reshape(2, 2, 3)
    np.testing.assert_allclose(coarse["episodes"], episodes.sum(-1))
    total = np.nansum(fine["episode_return"].reshape(2, 2, 3) * episodes, -1)
    ended = episodes.sum(-1) > 0
    np.testing.assert_allclose(
        coarse["episode_return"][ended], (total / np.maximum(episodes.sum(-1), 1))[ended], rtol=1e-4
    )
    assert np.isnan(coarse["episode_return"][~ended]).all()


def test_the_budget_is_never_exceeded():
    assert train(make(), 3).summary["env_steps"] == 48
    assert run.train(make(), jax.random.key(0), 63, progress=False, eval_episodes=0).summary["env_steps"] == 48
    with pytest.raises(ValueError, match="env_steps must be at least one update, 16; got 9"):
        run.train(make(), jax.random.key(0), 9)


def test_one_program_serves_every_chunk(monkeypatch):
    algo, traces = make(), []

    def counted(state):
        traces.append(1)
        return algo.update(state)

    monkeypatch.setattr("jrl.run.loop.CHUNK_SECONDS", 0.0)  # many chunks
    train(algo._replace(update=counted), 9)
    assert len(traces) <= 2  # once for the shapes of its metrics, once for the program


# Evaluation


def test_evaluation_counts_whole_episodes_once(key):
    """Half of the episodes last 1 step and half 9: a count by steps or by first-to-finish would not give 5."""

    def reset(key):
        length = jnp.where(jax.random.bernoulli(key), 9, 1)
        return jnp.zeros(1), (jnp.int32(0), length)

    def step(key, state, action):
        t, length = state
        return jnp.zeros(1), (t + 1, length), 1.0, t + 1 >= length, False

    env = envs.strict(envs.Environment("Lengths", reset, step, envs.Discrete(2)))
    algo = ppo.make(env, TINY)
    out = jax.jit(lambda s, k: run.evaluate(algo, s, k, 2000))(algo.init(key), key)
    assert set(np.unique(out.returns)) == {1.0, 9.0} and out.finished.all()
    np.testing.assert_allclose(out.returns.mean(), 5, atol=0.3)
    np.testing.assert_array_equal(out.returns, out.lengths)


def test_evaluation_keys_are_shared_over_seeds():
    algo = make("Probe-observation")
    states = jax.vmap(lambda k: algo.init(k))(jax.random.split(jax.random.key(0), 3))
    returns = jax.vmap(lambda s: run.evaluate(algo, s, jax.random.key(1), 16).returns)(states)
    assert (returns == returns[0]).all() and len(np.unique(returns[0])) == 2


def endless(key=None):
    """Episodes that end at step 3 where the first observation is positive, and never else; no time limit is known."""

    def reset(key):
        sign = jax.random.rademacher(key, (1,), jnp.float32)
        return sign, (sign, 0)

    def step(key, state, action):
        sign, t = state
        return sign, (sign, t + 1), 1.0, (sign[0] > 0) & (t + 1 >= 3), False

    return envs.Environment("Endless", reset, step, envs.Discrete(2))


@pytest.mark.slow
def test_episodes_that_evaluation_cuts_off_are_counted_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["jrl.run.evaluate"], "MAX_STEPS", 10)  # the name in jrl.run is the function
    algo = ppo.make(endless(), TINY)
    grid = run.sweep.grid(algo.hyper, {"gamma": [0.9, 0.95]})
    result = train(algo, 2, hypers=grid, run_dir=tmp_path / "run", eval_episodes=8)
    cut = {cell: s["unfinished"] for cell, s in result.summary["cells"].items()}
    returns = np.array(result.summary["cells"]["gamma=0.9"]["per_seed"])
    assert set(cut.values()) == {int((returns.sum() * 8 - 2 * 8 * 3) / 7)} and 0 < cut["gamma=0.9"] < 16
    (row, _) = csv.DictReader((tmp_path / "run/sweep.csv").open())
    assert int(row["unfinished"]) == 2 * cut["gamma=0.9"]  # greedy and sampled
    cli.report(result)
    assert f"{cut['gamma=0.9']} episodes were cut off at" in capsys.readouterr().out


@pytest.mark.slow
def test_one_seed_has_no_interval(capsys):
    assert stats.summarize([3.0]) == {"iqm": 3.0, "ci_low": None, "ci_high": None, "per_seed": [3.0]}
    assert stats.text(stats.summarize([3.0, float("nan")])) == "3.0 (one seed)"
    cli.report(train(make("Probe-action"), 1, num_seeds=1, eval_episodes=1))
    out = capsys.readouterr().out
    assert "1 seed x 16 steps" in out and "(one seed)" in out and "interval" not in out


@pytest.mark.slow
def test_the_best_of_a_sweep_is_scored_on_episodes_on_which_it_was_not_chosen(tmp_path):
    algo = make("Probe-observation")  # the return is chance alone: the sign of the observation
    grid = run.sweep.grid(algo.hyper, {"gamma": [0.9, 0.95]})
    summary = train(algo, 1, hypers=grid, eval_episodes=16).summary
    chosen_on, anew = summary["cells"][summary["best_cell"]]["per_seed"], summary["eval"]["per_seed"]
    assert chosen_on[0] == chosen_on[1] and anew[0] == anew[1] and anew != chosen_on


def test_iqm_and_interval():
    assert stats.iqm([0, 1, 2, 3, 4, 5, 6, 100]) == 3.5
    x = np.random.default_rng(0).normal(size=(9, 3))
    np.testing.assert_allclose(stats.iqm(x, axis=1), trim_mean(x, 0.25, axis=1))
    np.testing.assert_array_equal(np.isnan(stats.iqm(np.where(x == x.max(), np.nan, x))), (x == x.max()).any(0))
    low, high = stats.interval(np.arange(40.0))
    assert 10 < low < 19.5 < high < 29
    summary = stats.summarize([1.0, float("nan"), 3.0])
    assert summary["iqm"] == 2 and summary["per_seed"] == [1.0, None, 3.0]
    assert stats.summarize([float("nan")])["iqm"] is None


# What goes wrong


def bad_seed(algo, at=3):
    """Parameters of the second of three seeds turn NaN at update ``at``."""
    unlucky = algo.init(jax.random.split(jax.random.key(0), 3)[1]).actors.obs.sum()

    def init(key, hyper=None, num_updates=None):
        state = algo.init(key, hyper, num_updates)
        is_unlucky = jnp.abs(state.actors.obs.sum() - unlucky) < 1e-6
        return state._replace(kl_weight=jnp.where(is_unlucky, 777.0, state.kl_weight))

    def update(state):
        poison = jnp.where((state.kl_weight == 777.0) & (state.updates == at - 1), jnp.nan, 0.0)
        return algo.update(state._replace(params=jax.tree.map(lambda x: x + poison, state.params)))

    return algo._replace(init=init, update=update)


def test_a_nan_is_reported_and_the_others_go_on(tmp_path, capsys):
    result = train(bad_seed(make()), 6, num_seeds=3, run_dir=tmp_path / "run", eval_episodes=2, progress=True)
    assert "seed 1 turned NaN at update 3; it is left out" in capsys.readouterr().err
    assert result.summary["nan_seeds"] == [{"seed": 1, "update": 3}]
    per_seed = result.summary["eval"]["per_seed"]
    assert (
        per_seed[1] is None
        and per_seed[0] > 0
        and result.summary["eval"]["iqm"] == pytest.approx((per_seed[0] + per_seed[2]) / 2)
    )
    clean = train(make(), 6, num_seeds=3)
    for i in (0, 2):
        assert_close(
            jax.tree.map(lambda x, i=i: x[i], result.state.params),
            jax.tree.map(lambda x, i=i: x[i], clean.state.params),
        )


def with_metric(algo, name, value):
    def update(state):
        state, metrics = algo.update(state)
        return state, metrics | {name: jnp.asarray(value)}

    return algo._replace(update=update)


@pytest.mark.slow
def test_a_nan_that_means_nothing_costs_no_seed(tmp_path):
    """A metric of a user where there was nothing to count, and a number in an environment's state."""

    def step(key, state, action):
        return jnp.zeros(1), jnp.nan + state, 1.0, True, False

    env = envs.Environment("blank", lambda key: (jnp.zeros(1), jnp.nan), step, envs.Discrete(2), 1)
    algo = with_metric(ppo.make(env, TINY), "mine", jnp.nan)
    first = train(algo, 2, eval_episodes=2, run_dir=tmp_path / "run")
    again = train(algo, 3, eval_episodes=2, run_dir=tmp_path / "run", resume=True)
    for result in (first, again):
        assert result.summary["nan_seeds"] == [] and result.summary["eval"]["per_seed"] == [1.0, 1.0]
        assert np.isnan(result.metrics["mine"]).all()


@pytest.mark.slow
def test_a_seed_that_recovered_keeps_its_evaluation():
    """A loss of NaN at one update is reported; the parameters were numbers all the time."""
    algo = make("Probe-action")

    def update(state):
        after, metrics = algo.update(state)
        return after, metrics | {"loss": jnp.where(state.updates == 1, jnp.nan, metrics["loss"])}

    summary = train(algo._replace(update=update), 3, eval_episodes=2).summary
    assert [nan["update"] for nan in summary["nan_seeds"]] == [2, 2] and None not in summary["eval"]["per_seed"]


# What an algorithm must be


@pytest.mark.slow
def test_an_algorithm_may_report_no_episodes(tmp_path):
    algo = make()

    def update(state):
        state, metrics = algo.update(state)
        return state, {"loss": metrics["loss"], "count": jnp.int32(3)}

    result = train(algo._replace(update=update), 2, run_dir=tmp_path / "run", progress=True)
    assert set(result.metrics) == {"env_steps", "loss", "count"} and (result.metrics["count"] == 3).all()


@pytest.mark.parametrize(
    "broken, message",
    [
        (lambda algo: with_metric(algo, "q", np.zeros(3)), "ppo: the metric 'q' must be a scalar number; got"),
        (lambda algo: algo._replace(update=lambda state: state), r"ppo: update must return \(state, metrics\)"),
        (
            lambda algo: algo._replace(update=lambda state: 1 / 0),
            "ppo: update cannot be traced: ZeroDivisionError: division by zero",
        ),
        (
            lambda algo: algo._replace(update=lambda s: (s._replace(updates=s.updates + 0.5), {})),
            r"ppo: update returns updates as float32 \[\], init as int32 \[\]",
        ),
        (
            lambda algo: algo._replace(act=lambda s, o: o),
            r"ppo: act must return \(action, memory\), the action of shape \(\)",
        ),
        (lambda algo: algo._replace(hyper={"gamma": 0.9}), "ppo: hyper must be a NamedTuple of numbers"),
    ],
)
def test_an_algorithm_that_breaks_its_contract_is_refused_before_compiling(broken, message):
    with pytest.raises(ValueError, match=message):
        train(broken(make("Probe-action")), 1, eval_episodes=1)


def test_hypers_of_another_algorithm_are_refused():
    with pytest.raises(ValueError, match=r"hypers: a must be a jrl.algos.ppo_settings.Hyper; got \{\}"):
        train(make("Probe-action"), 1, hypers={"a": {}})


@pytest.mark.slow
def test_a_nan_seed_stays_out_after_resuming(tmp_path):
    algo = bad_seed(make())
    args = {"num_seeds": 3, "run_dir": tmp_path / "run", "log_every": 5}
    train(algo, 5, **args)  # rows tell only that it was among the first five updates
    result = train(algo, 6, resume=True, **args)
    assert result.summary["nan_seeds"] == [{"seed": 1, "update": 3}]


def test_a_run_that_failed_before_it_saved_anything_leaves_its_folder_free(tmp_path):
    folder = tmp_path / "run"
    with folders.opened(folder, True, {"config.size": 1}):
        (folder / "metrics.csv").write_text("update,seed,loss\n")
    for resume in (True, False):  # it has nothing to lose
        with folders.opened(folder, resume, {"config.size": 2}):
            assert folders.saved_settings(folder) == {"config.size": 2} and not (folder / "metrics.csv").exists()
    (folder / "checkpoints/3.orbax-checkpoint-tmp-1").mkdir(parents=True)  # which a kill left
    with folders.opened(folder, True, {"config.size": 3}):
        pass
    (folder / "checkpoints/3").mkdir()
    with (
        pytest.raises(run.RunError, match=r"config.size was 3, is 2"),
        folders.opened(folder, True, {"config.size": 2}),
    ):
        pass


def test_another_configuration_is_refused(tmp_path):
    folder = tmp_path / "run"
    train(make(), 2, run_dir=folder)
    with pytest.raises(run.RunError, match="already contains a run: resume it"):
        train(make(), 2, run_dir=folder)
    with pytest.raises(run.RunError, match=r"of another configuration: config.network.hidden was \[8\], is \[4\]"):
        train(make(network=nets.Config(hidden=(4,))), 2, run_dir=folder, resume=True)
    with pytest.raises(run.RunError, match="num_seeds was 2, is 3"):
        train(make(), 2, run_dir=folder, resume=True, num_seeds=3)
    with pytest.raises(run.RunError, match="has done 2 updates already, more than the 1"):
        train(make(), 1, run_dir=folder, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").touch()
    with pytest.raises(run.RunError, match="not the folder of a run"):
        train(make(), 2, run_dir=tmp_path / "other")


@pytest.mark.slow
def test_an_annealed_run_keeps_its_length(tmp_path):
    algo = make(optimizer=optim.OptimizerConfig(schedule="linear"))
    train(algo, 2, run_dir=tmp_path / "run")
    with pytest.raises(run.RunError, match="env_steps was 32, is 64"):
        train(algo, 4, run_dir=tmp_path / "run", resume=True)


def test_an_annealed_run_that_is_to_go_on_says_why_it_cannot(tmp_path):
    algo = make("Probe-action", optimizer=optim.OptimizerConfig(schedule="linear"))
    train(algo, 2, run_dir=tmp_path / "run")
    with pytest.raises(run.RunError, match=r"its schedules .* run over the whole of it; resume it with 32, or"):
        train(algo, 4, run_dir=tmp_path / "run", resume=True)


ENV_FILE = """
import jax.numpy as jnp
from jrl.envs import Discrete, Environment
def make(goal=1.0):
    return Environment("mine", lambda k: (jnp.zeros(1), 0), lambda k, s, a: (jnp.zeros(1), s, goal, True, False), Discrete(2))
"""


def test_what_an_environment_is_made_of_is_recorded():
    def recorded(env):
        settings = folders.settings(ppo.make(env, TINY), jax.random.key(0), 16, 1, {"": ppo.Hyper()}, 1)
        return {name.removeprefix("env_params."): x for name, x in settings.items() if name.startswith("env_params.")}

    garnet = {"seed": 3, "num_states": 10, "num_actions": 4, "branching": 3, "time_limit": 100, "one_hot": True}
    assert recorded(envs.make("Garnet", seed=3)) == garnet
    assert recorded(envs.make("Recall", delay=4)) == {"delay": 4, "queries": 16, "symbols": 4}
    assert recorded(envs.make("CartPole-v1", gravity=5.0))["gravity"] == 5
    limited = envs.wrappers.time_limit(envs.wrappers.sticky_actions(envs.make("Garnet", seed=3), 0.5), 7)
    assert recorded(limited) == garnet | {"wrappers": ["sticky_actions(probability=0.5)", "time_limit(steps=7)"]}


@pytest.mark.slow
def test_a_run_does_not_go_on_in_another_environment(tmp_path):
    path, folder = tmp_path / "mine.py", tmp_path / "run"
    path.write_text(ENV_FILE)
    train(ppo.make(envs.make(path), TINY), 1, run_dir=folder)
    assert json.loads((folder / "config.json").read_text())["settings"]["env_params.text"] == ENV_FILE
    with pytest.raises(run.RunError, match=r"env_params.goal was null, is 2.0"):
        train(ppo.make(envs.make(path, goal=2.0), TINY), 1, run_dir=folder, resume=True)
    path.write_text(ENV_FILE.replace("1.0", "3.0"))
    with pytest.raises(run.RunError, match=r"is a run of mine.py as it was: the file has changed since"):
        train(ppo.make(envs.make(path), TINY), 1, run_dir=folder, resume=True)


@pytest.mark.slow
def test_a_resume_without_evaluation_keeps_the_one_there_is(tmp_path):
    algo = make("Probe-action")
    first = train(algo, 2, run_dir=tmp_path / "run", eval_episodes=2).summary["eval"]
    later = train(algo, 3, run_dir=tmp_path / "run", resume=True).summary
    assert later["eval"] == first and first["env_steps"] == 32 and later["env_steps"] == 48
    assert train(algo, 3, run_dir=tmp_path / "run", resume=True, eval_episodes=2).summary["eval"]["env_steps"] == 48


@pytest.mark.thorough(1)
@pytest.mark.parametrize("csv_members, updates", [(256, 5), (256, 2), (1, 2)])
def test_a_run_stops_within_a_row_and_goes_on_bit_for_bit(csv_members, updates, tmp_path, monkeypatch):
    class StopAfter(StopOnSignal):
        """A signal that comes after so many updates, within the second row or the first one."""

        looks = 0

        @property
        def requested(self):
            self.looks += 1
            return self.looks > updates

    monkeypatch.setattr(log, "CSV_MEMBERS", csv_members)
    algo, args = make("CartPole-v1"), {"log_every": 4, "num_seeds": 3}
    whole = train(algo, 10, run_dir=tmp_path / "whole", **args)
    monkeypatch.setattr("jrl.run.loop.CHUNK_SECONDS", 0.0)  # one update a chunk
    with monkeypatch.context() as interrupted:
        interrupted.setattr("jrl.run.loop.StopOnSignal", StopAfter)
        assert not train(algo, 10, run_dir=tmp_path / "parts", **args).finished
    assert saved_steps(tmp_path / "parts") == [updates]
    parts = train(algo, 10, run_dir=tmp_path / "parts", resume=True, **args)
    bits.assert_same(parts.state, whole.state)
    jax.tree.map(np.testing.assert_array_equal, parts.metrics, whole.metrics)
    if csv_members == 256:
        assert final_rows(tmp_path / "parts") == final_rows(tmp_path / "whole")
        assert [r["update"] for r in csv.DictReader((tmp_path / "whole/metrics.csv").open())][::3] == ["4", "8", "10"]


def test_a_run_that_saves_at_every_moment_can_be_opened_again(tmp_path):
    args = {"run_dir": tmp_path / "run", "log_every": 2, "checkpoint_every": 0.0}
    first = train(make("Probe-action"), 3, **args)
    again = train(make("Probe-action"), 3, resume=True, **args)  # its last row is of one update
    np.testing.assert_array_equal(again.metrics["loss"], first.metrics["loss"])


def test_a_folder_is_held_against_another_process(tmp_path):
    settings = {"algorithm": "ppo"}
    with (
        folders.opened(tmp_path / "run", False, settings),
        pytest.raises(run.RunError, match="is in use by another process"),
        folders.opened(tmp_path / "run", True, settings),
    ):
        pass
    with folders.opened(tmp_path / "run", True, settings) as folder:
        assert folder == tmp_path / "run"


def test_a_run_that_ended_in_its_first_moment_can_begin_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.tmp").write_text('{"settings": ')
    with folders.opened(folder, False, {"algorithm": "ppo"}):
        assert [item.name for item in folder.iterdir()] == ["config.json"]


def test_what_a_killed_process_left_of_a_checkpoint_is_cleared_away(tmp_path):
    algo, folder = make("Probe-action"), tmp_path / "run"
    train(algo, 1, run_dir=folder)
    (folder / "checkpoints/7.orbax-checkpoint-tmp-3").mkdir()
    train(algo, 2, run_dir=folder, resume=True)
    assert {item.name for item in (folder / "checkpoints").iterdir()} == {"1", "2"}


def test_a_renamed_checkpoint_is_refused(tmp_path):
    algo, folder = make("Probe-action"), tmp_path / "run"
    train(algo, 2, run_dir=folder)
    (folder / "checkpoints/2").rename(folder / "checkpoints/3")
    with pytest.raises(run.RunError, match="3 is of update 2: its folder was renamed"):
        train(algo, 4, run_dir=folder, resume=True)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("members", [1, 256])
def test_metrics_that_are_not_those_of_the_checkpoint_are_refused(members, tmp_path, monkeypatch):
    monkeypatch.setattr(log, "CSV_MEMBERS", members)
    algo, folder = make("Probe-action"), tmp_path / "run"
    train(algo, 2, run_dir=folder, log_every=1)
    path = folder / "metrics.csv" if members == 256 else min((folder / "metrics").iterdir())
    whole = path.read_bytes()
    for left in (whole[:-1], whole.replace(b"1", b"2"), b""):
        path.write_bytes(left)
        with pytest.raises(run.RunError, match=f"{path.name} is damaged: it is not what it was at update 2"):
            train(algo, 2, run_dir=folder, log_every=1, resume=True)
    path.unlink()
    with pytest.raises(run.RunError, match=f"{path.name} is missing, which the checkpoint of update 2 was saved with"):
        train(algo, 2, run_dir=folder, log_every=1, resume=True)


@pytest.mark.thorough(1)
@pytest.mark.parametrize(
    "notes",
    [None, {"in_row": 1}, {"in_row": 1, "nan": {}}, {"in_row": 0, "nan": {"9": 1}}, {"in_row": 0, "nan": {"0": None}}],
)
def test_notes_that_are_not_of_the_run_are_refused(notes, tmp_path):
    from jrl.run.checkpoint import sealed

    algo, folder = make("Probe-action"), tmp_path / "run"
    train(algo, 1, run_dir=folder)
    path = folder / "checkpoints/1/manifest/metadata"
    manifest = {name: value for name, value in json.loads(path.read_text()).items() if name != "crc32"}
    path.write_text(json.dumps(sealed(manifest | {"notes": notes})))
    with pytest.raises(
        run.RunError, match=f"checkpoint {folder / 'checkpoints/1'} is damaged: its notes do not belong to this run"
    ):
        train(algo, 1, run_dir=folder, resume=True)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("name", ["summary.json", "evaluations.json"])
def test_a_damaged_record_is_refused_by_its_path(name, tmp_path):
    algo = make("Probe-action")
    train(algo, 1, run_dir=tmp_path / "run", eval_episodes=1)
    (tmp_path / "run" / name).write_text('{"eval": ')
    with pytest.raises(run.RunError, match=f"{name} is damaged: it is no JSON"):
        train(algo, 1, run_dir=tmp_path / "run", resume=True)


def test_tensorboard_has_the_settings_and_the_final_evaluation(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    result = train(make("Probe-action"), 2, run_dir=tmp_path / "run", eval_episodes=2)
    found, settings = {}, {}
    for path in (tmp_path / "run/events").iterdir():
        data = path.read_bytes()
        while data:  # a record: its length, a checksum, the event, a checksum
            length = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
                if value.tag == "_hparams_/session_start_info":
                    settings[value.tag] = value.metadata.plugin_data.content
    assert found["evaluation/return", 32] == pytest.approx(result.summary["eval"]["iqm"])
    assert b"config.num_envs" in settings["_hparams_/session_start_info"]


@pytest.mark.slow
def test_a_sweep_s_tables_have_a_column_for_each_number(tmp_path):
    algo = make("Probe-action")
    grid = run.sweep.grid(algo.hyper, {"learning_rate": [1e-3, 1e-2], "optimizer.b1": [0.9, 0.8]})
    train(algo, 1, hypers=grid, run_dir=tmp_path / "run", eval_episodes=1)
    for name, rows_a_cell in (("metrics.csv", 2), ("sweep.csv", 1)):
        rows = list(csv.DictReader((tmp_path / "run" / name).open()))
        numbers = [(float(r["hyper.learning_rate"]), float(r["hyper.optimizer.b1"])) for r in rows]
        assert numbers == [(a, b) for a in (1e-3, 1e-2) for b in (0.9, 0.8) for _ in range(rows_a_cell)]


@pytest.mark.thorough(1)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_refused(damage, tmp_path):
    folder = tmp_path / "run"
    train(make(), 2, run_dir=folder)
    step = folder / "checkpoints/2"
    data = [p for p in (step / "state").rglob("*") if p.is_file()]
    largest = max(data, key=lambda p: p.stat().st_size)
    if damage == "flip":
        for path in (p for p in data if "d" in p.parts[-2:]):
            content = bytearray(path.read_bytes())
            for i in range(len(content) // 3, len(content), 50):
                content[i] ^= 0xFF
            path.write_bytes(content)
    elif damage == "truncate":
        largest.write_bytes(largest.read_bytes()[:20])
    elif damage == "remove":
        shutil.rmtree(step / "state")
    else:
        for path in (step / "manifest").rglob("*"):
            if path.is_file():
                path.write_text("{}")
    with pytest.raises(run.RunError, match=f"checkpoint {step} is damaged"):
        train(make(), 4, run_dir=folder, resume=True)


def test_a_damaged_checkpoint_says_which_older_one_is_left(tmp_path):
    state, path = {"x": np.arange(3.0)}, tmp_path / "checkpoints"
    kept = Checkpoints(path, {"a": 1})
    for updates in (1, 2):
        kept.save(updates, state)
        kept.wait()
    kept.close()
    shutil.rmtree(path / "2/state")
    left = Checkpoints(path, {"a": 1})
    with pytest.raises(run.RunError, match=r"2 is damaged: .*; without that folder the run goes on from update 1$"):
        left.restore(2, state)
    left.close()
    shutil.rmtree(path / "2")
    left = Checkpoints(path, {"a": 1})
    assert left.latest() == 1 and left.restore(1, state)[0]["x"].tolist() == [0, 1, 2]
    left.close()


@pytest.mark.slow
def test_a_foreign_checkpoint_is_refused(tmp_path):
    for name, fields in (
        ("a", {}),
        ("b", {"normalize_observations": True}),
        ("c", {"network": nets.Config(hidden=(9,))}),
    ):
        train(make(**fields), 2, run_dir=tmp_path / name)
    for other, message in (("b", "of another configuration"), ("c", "of another configuration")):
        shutil.rmtree(tmp_path / "a/checkpoints")
        shutil.copytree(tmp_path / other / "checkpoints", tmp_path / "a/checkpoints")
        with pytest.raises(run.RunError, match=message):
            train(make(), 4, run_dir=tmp_path / "a", resume=True)


def test_arrays_are_compared_by_path_shape_and_dtype(tmp_path):
    saved = Checkpoints(tmp_path, {})
    saved.save(1, {"a": np.zeros(3, np.float32), "b": np.zeros(2)})
    saved.wait()
    for template, message in (
        ({"a": np.zeros(3, np.float32)}, "only the checkpoint has b"),
        ({"a": np.zeros(4, np.float32), "b": np.zeros(2)}, r"a has shape \[3\], this run needs \[4\]"),
        ({"a": np.zeros(3, np.int32), "b": np.zeros(2)}, "a has dtype float32, this run needs int32"),
    ):
        with pytest.raises(run.RunError, match=message):
            saved.restore(1, template)
    saved.close()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"notes": {"in_row": 2}}, "does not match its checksum"),
        ({"config": {"a": 2}}, "does not match its checksum"),
        ({"crc32": None}, "does not match its checksum"),
        ({"notes": None, "files": {"../x": [1, 1]}, "crc32": "right"}, "../x does not lie beside it"),
        ({"notes": None, "files": [], "crc32": "right"}, "files is list"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(change, message, tmp_path):
    from jrl.run.checkpoint import sealed

    state = {"a": np.zeros(3, np.float32)}
    saved = Checkpoints(tmp_path / "checkpoints", {"a": 1})
    saved.save(1, state, {"in_row": 1, "nan": {0: 3}})
    saved.wait()
    assert saved.restore(1, state)[1] == {"in_row": 1, "nan": {"0": 3}}
    path = tmp_path / "checkpoints/1/manifest/metadata"
    manifest = json.loads(path.read_text()) | change
    if manifest["crc32"] == "right":
        manifest = sealed({name: value for name, value in manifest.items() if name != "crc32"})
    path.write_text(json.dumps(manifest))
    with pytest.raises(run.RunError, match=f"checkpoint {path.parents[1]} is damaged: .*{message}"):
        saved.restore(1, state)
    saved.close()


def test_tables_begin_with_what_they_held_at_the_save(tmp_path):
    state, path = {"a": np.zeros(3, np.float32)}, tmp_path / "metrics/1.parquet"
    (tmp_path / "metrics").mkdir()
    path.write_text("one")
    (tmp_path / "metrics.csv").write_text("update,a\n1,2\n")
    saved = Checkpoints(tmp_path / "checkpoints", {}, log.TABLES)
    saved.save(1, state)
    saved.wait()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,3\n")
    (tmp_path / "metrics/2.parquet").write_text("two")
    saved.restore(1, state)  # what came after the save is another's business
    for damaged, text in ((path, "on"), (path, "oNe"), (tmp_path / "metrics.csv", "update,a\n1,3\n2,3\n")):
        before = damaged.read_text()
        damaged.write_text(text)
        with pytest.raises(run.RunError, match=f"{damaged} is damaged: it is not what it was at update 1"):
            saved.restore(1, state)
        damaged.write_text(before)
    path.unlink()
    with pytest.raises(run.RunError, match=f"{path} is missing, which the checkpoint of update 1 was saved with"):
        saved.restore(1, state)
    saved.close()


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "it is no JSON"),
        (b"\xff", "it is no JSON"),
        ("null", "it is NoneType, not list"),
        ("[1]", "it is int, not an object"),
        ('[{"env_steps": 16}]', "it has no checksum, or is of an older version"),
        ('[{"env_steps": 17, "crc32": 1}]', "it does not match its checksum"),
    ],
)
def test_a_record_that_was_changed_is_refused(text, message, tmp_path):
    path, records = tmp_path / "evaluations.json", [{"env_steps": 16, "cells": {"": {"iqm": float("inf")}}}]
    folders.write_json(path, records)
    assert folders.read_json(path, []) == records
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(run.RunError, match=f"{path} is damaged: {message}"):
        folders.read_json(path, [])


@pytest.mark.parametrize("change", [{"settings": None}, {"settings": {"log_every": "a"}}, {"settings": []}])
def test_the_configuration_of_a_run_that_was_changed_is_refused(change, tmp_path):
    with folders.opened(tmp_path / "run", False, {"log_every": 1}) as folder:
        path = folder / "config.json"
        assert folders.saved_setting(folder, "log_every") == 1
    (folder / "checkpoints/1").mkdir(parents=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(run.RunError, match=f"{path} is damaged"):
        folders.saved_setting(folder, "log_every")
    with pytest.raises(run.RunError, match=f"{path} is damaged"), folders.opened(folder, True, {"log_every": 1}):
        pass


def test_wrong_arguments_are_refused_before_compiling(tmp_path):
    def never(*args):
        raise AssertionError("compiled")

    algo = make()._replace(init=never)
    for kwargs, message in (
        ({"num_seeds": 0}, "num_seeds must be an integer of at least 1; got 0"),
        ({"devices": 999}, f"devices must be at most {len(jax.devices())}"),
        ({"resume": True}, "resume needs a run_dir"),
        ({"hypers": {}}, "at least one set"),
        ({"eval_every": -1}, "eval_every must be an integer"),
        ({"checkpoint_every": 1e39}, "checkpoint_every must be finite in float32"),
    ):
        with pytest.raises(ValueError, match=message):
            train(algo, 2, **kwargs)


def test_what_does_not_fit_the_memory_is_refused_before_compiling():
    for kwargs, message in (
        (
            {"num_seeds": 10**9},
            "1,000,000,000 states of [0-9,]+ bytes, .* GiB in all, are larger than .*: take fewer seeds",
        ),
        ({"eval_episodes": 10**12}, "episodes of evaluation of 36 bytes, .* are larger than .* there are: take fewer"),
    ):
        with pytest.raises(ValueError, match=message):
            train(make(), 2, **kwargs)


def test_thousands_of_cells_are_checked_without_tracing_each():
    algo = make()._replace(init=None)
    grid = run.sweep.grid(algo.hyper, {"learning_rate": np.linspace(1e-4, 1e-3, 1000).tolist()})
    assert members_of(algo, jax.random.key(0), 2, grid).shape == (1000, 2)
    with pytest.raises(ValueError, match=r"hyper\.clip_eps must be at least 0; got -1"):
        members_of(algo, jax.random.key(0), 1, {"bad": algo.hyper._replace(clip_eps=-1.0)})


# Interruptions, in processes of their own; those that cannot answer are in test_interrupt

SCRIPT = """
import sys, jax
from jrl import envs, nets, run
from jrl.numerics import host, optim
from jrl.algos import ppo
from jrl.run import loop
loop.CHUNK_SECONDS = 0.05
config = ppo.Config(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=2, network=nets.Config(hidden=(8,)))
algo = ppo.make(envs.make("CartPole-v1"), config)
try:
    result = run.train(algo, jax.random.key(0), int(sys.argv[2]) * 16, num_seeds=2, run_dir=sys.argv[1], resume=True,
                       checkpoint_every=0.3, eval_episodes=0, log_every=50)
    print("finished", result.finished, result.summary["env_steps"])
except run.RunError as error:
    sys.exit(f"error: {error}")
"""


def start(folder, updates):
    command = [sys.executable, "-c", SCRIPT, str(folder), str(updates)]
    environment = processes.ENVIRONMENT | {"JRL_CPU_DEVICES": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition, process, seconds=180):
    begin = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begin < seconds
        time.sleep(0.05)


def saved_steps(folder):
    return (
        sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdecimal()) if folder.exists() else []
    )


def final_rows(folder):
    return (folder / "metrics.csv").read_text()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    process = start(folder, 20_000)
    out, err = process.communicate(timeout=300)
    assert "finished True 320000" in out, err
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_bit_for_bit(number, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    process = start(folder, 20_000)
    wait_for(lambda: saved_steps(folder), process)
    begin = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 15
    if number != signal.SIGKILL:
        assert "finished False" in out, err
    steps = saved_steps(folder)
    assert steps and steps[-1] < 20_000
    out, err = start(folder, 20_000).communicate(timeout=300)
    assert "finished True 320000" in out and f"resumed at {steps[-1] * 16:,} steps" in err
    assert final_rows(folder) == final_rows(uninterrupted)


@pytest.mark.slow
def test_a_full_disk_gives_one_line_and_keeps_what_was_saved(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("needs root, to mount a small disk")
    try:
        process = start(folder / "run", 2_000_000)
        wait_for(lambda: saved_steps(folder / "run"), process)
        (folder / "ballast").write_bytes(b"")
        with (folder / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError, match="No space"):
            while True:
                ballast.write(b"x" * 4096)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1
        (line,) = [x for x in err.splitlines() if x.startswith("error:")]
        assert "disk full while writing" in line and "Traceback" not in err
        (folder / "ballast").unlink()
        steps = saved_steps(folder / "run")
        assert steps
        process = start(folder / "run", 2_000_000)
        wait_for(lambda: saved_steps(folder / "run")[-1:] > steps[-1:], process)
        process.send_signal(signal.SIGINT)
        assert f"resumed at {steps[-1] * 16:,} steps" in process.communicate(timeout=60)[1]
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_num_updates_rounds_down():
    algo = make()
    assert program.num_updates(algo, 47) == 2


# Command lines


def test_whole_numbers_and_words_on_the_command_line():
    args = cli.parse(cli.Options, ["--env-steps", "1e6", "--num-seeds", "2_000", "--eval-every", "5e2"])
    assert (args.env_steps, args.num_seeds, args.eval_every) == (1_000_000, 2000, 500)
    with pytest.raises(ValueError, match=r"^Error parsing --env-steps: 1.5 is not a whole number; see --help$"):
        cli.parse(cli.Options, ["--env-steps", "1.5"])
    words = ("delay=4", "gravity=9.5", "slippery=False", "kind=hard", "rate=1e-3")
    assert cli.parse_params(words) == {"delay": 4, "gravity": 9.5, "slippery": False, "kind": "hard", "rate": 1e-3}
    with pytest.raises(ValueError, match="parameters are written NAME=VALUE; got 'delay'"):
        cli.parse_params(("delay",))
    for name, params, message in (
        ("CartPole-v1", {"gravity": "low"}, "CartPole-v1: gravity must be a number, such as 9.8; got 'low'"),
        ("FrozenLake", {"slippery": 1}, "FrozenLake: slippery must be true or false, such as True; got 1"),
        ("CartPole-v1", {"gravity": float("nan")}, "CartPole-v1: gravity must be finite; got nan"),
        ("Garnet", {"seed": "three"}, "Garnet: seed must be an integer, such as 0; got 'three'"),
    ):
        with pytest.raises(ValueError, match=message):
            envs.make(name, **params)


CALLBACK = """INTERNAL: CpuCallback error calling callback: Traceback (most recent call last):
  File "/home/.venv/lib/python3.11/site-packages/jax/_src/callback.py", line 71, in __call__
  File "/home/work/mine.py", line 7, in <lambda>
ZeroDivisionError: division by zero
"""


@pytest.mark.parametrize(
    "error, message",
    [
        (MemoryError("Unable to allocate 7.28 TiB"), "error: out of memory: Unable to allocate 7.28 TiB; fewer seeds"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nMore"),
            "error: out of memory: RESOURCE_EXHAUSTED",
        ),
        (RuntimeError("Unable to initialize backend 'cuda'"), "JAX_PLATFORMS names the platforms to use, such as cpu"),
        (OverflowError("int too big"), "error: a number, such as --seed, is too large"),
        (RuntimeError(CALLBACK), "error: mine.py, line 7: a callback raised ZeroDivisionError: division by zero"),
        (ValueError("one\n  and another\n"), "error: one and another"),
        (ValueError("a" * 9999 + "b"), "error: " + "a" * 500 + " [...] " + "a" * 499 + "b"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, message):
    def experiment(argv):
        raise error

    with pytest.raises(SystemExit) as done:
        cli.main(experiment)
    assert message in done.value.code and "\n" not in done.value.code


def test_a_fault_of_the_program_keeps_its_traceback():
    def experiment(argv):
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(experiment)


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path):
    folders = [cli.fresh_folder(tmp_path / "runs/ppo-x") for _ in range(3)]
    assert [f.name for f in folders] == ["ppo-x", "ppo-x-2", "ppo-x-3"] and all(f.is_dir() for f in folders)


def test_an_accelerator_that_is_wanted_and_missing_is_an_error(monkeypatch):
    for wanted in ("cuda12", "cuda13", "tpu"):
        monkeypatch.setenv("JRL_ACCEL", wanted)
        if jax.default_backend() == "cpu":
            with pytest.raises(ValueError, match=rf"JRL_ACCEL={wanted} asks for a .pu; JAX finds cpu"):
                host.check_environment()
    monkeypatch.setenv("JRL_ACCEL", "gpu")
    with pytest.raises(ValueError, match="JRL_ACCEL must be one of cpu, tpu, cuda12, cuda13; got 'gpu'"):
        host.check_environment()
    monkeypatch.setenv("JRL_ACCEL", "cpu")
    host.check_environment()


def test_a_wrong_number_of_cpu_devices_is_an_error_of_the_command_line_not_of_the_import(monkeypatch):
    for wrong in ("0", "x", "-1", "1.5", "²", "257", 30 * "9"):
        monkeypatch.setenv("JRL_CPU_DEVICES", wrong)
        host.use_cpu_cores()
        with pytest.raises(
            SystemExit, match=f"^error: JRL_CPU_DEVICES must be an integer from 1 to 256; got '{wrong}'$"
        ):
            cli.main(lambda argv: None)


def test_a_platform_without_a_device_is_refused(monkeypatch):
    def finds_none():
        raise AssertionError  # as JAX does for JAX_PLATFORMS=cuda where its plugin is missing

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "default_backend", finds_none)
    with pytest.raises(SystemExit, match=r"^error: JAX finds no device for JAX_PLATFORMS=cuda; it names"):
        cli.main(lambda argv: None)


def test_a_flag_without_its_value_is_refused_where_the_others_are():
    assert cli.read_ahead(["--preset"], preset="auto", env="CartPole-v1") == {"preset": "auto", "env": "CartPole-v1"}
    assert cli.read_ahead(["--x", "1", "--env", "Recall"], preset="auto", env="CartPole-v1")["env"] == "Recall"


def test_a_sweep_of_too_many_cells_is_refused():
    values = ",".join(map(str, range(101)))
    with pytest.raises(ValueError, match="the sweep has 10,201 cells; at most 10,000 may be"):
        run.sweep.cells(make().hyper, (f"hyper.gamma={values}", f"hyper.clip_eps={values}"))


def test_a_size_beyond_64_bits_is_refused():
    with pytest.raises(ValueError, match=r"^config.num_envs must be below 2\*\*63; got 9223372036854775808$"):
        ppo.Config(num_envs=2**63)
    with pytest.raises(ValueError, match=r"network\.gru must be between 0 and"):
        nets.Config(gru=2**40)


def test_what_the_memory_cannot_hold_is_refused():
    with pytest.raises(
        ValueError, match=r"^runs = 9: too large, since it takes 3,725,290,298\.5 GiB of memory and there are"
    ):
        memory.refuse_if_too_large("runs = 9", jax.ShapeDtypeStruct((10**18,), jnp.float32))
    memory.refuse_if_too_large("runs", jax.ShapeDtypeStruct((10**3,), jnp.float32))


def test_the_progress_line_keeps_the_last_return_that_is_known(capsys, monkeypatch):
    bar = progress.Progress("ppo", 100, 0, True)
    for done, value in ((10, float("nan")), (20, 7.0), (30, float("nan"))):
        monkeypatch.setattr(bar, "_printed", -1e9)
        bar.advance(done, value)
    shown = [line.split("return ")[1].split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["-", "7.0", "7.0"]
