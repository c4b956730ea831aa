"""Runs side by side: the statistics against other formulas, what is read, and the commands that show it."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest
import scipy.stats

from jrl import envs, nets, run
from jrl.algos import ppo
from jrl.run import command, compare, report, show, stats
from jrl.run.checkpoint import sealed

RANK_PROMOTION = "allow"  # gymnax promotes ranks

TINY = ppo.Config(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=2, network=nets.Config(hidden=(8,)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs of two settings in two environments, and a sweep."""
    base = tmp_path_factory.mktemp("compare")
    for env in ("Probe-action", "Probe-policy"):
        for name, rate in (("slow", 1e-4), ("fast", 1e-2)):
            algo = ppo.make(envs.make(env), TINY, ppo.Hyper(learning_rate=rate))
            kwargs = {"num_seeds": 4, "eval_episodes": 4, "progress": False}
            run.train(algo, jax.random.key(0), 30 * 16, run_dir=base / f"{name}-{env}", **kwargs)
    algo = ppo.make(envs.make("Probe-action"), TINY)
    grid = run.sweep.grid(algo.hyper, {"learning_rate": [1e-3, 1e-2]})
    run.train(
        algo, jax.random.key(0), 320, hypers=grid, num_seeds=2, eval_episodes=0, run_dir=base / "sweep", progress=False
    )
    return base


# Statistics


def test_improvement_is_mann_and_whitney_s():
    rng = np.random.default_rng(0)
    scores = [(rng.integers(0, 6, 7).astype(float), rng.integers(0, 6, 5).astype(float)) for _ in range(3)]
    wanted = [scipy.stats.mannwhitneyu(x, y).statistic / (7 * 5) for x, y in scores]
    ours = stats.improvement([x for x, _ in scores], [y for _, y in scores])
    assert ours == pytest.approx(np.mean(wanted))
    assert stats.improvement([np.array([1.0, 3.0])], [np.array([1.0, 2.0])]) == (0.5 + 0 + 1 + 1) / 4


def test_aggregates_over_tasks_by_hand():
    scores = [np.array([0.0, 0.2, 0.4, 2.0]), np.array([1.0, 0.6, 0.8, 0.9])]
    pooled = np.concatenate(scores)
    assert stats.pooled_iqm(scores) == pytest.approx(scipy.stats.trim_mean(pooled, 0.25)) == pytest.approx(0.675)
    assert stats.optimality_gap(scores) == pytest.approx(1 - (0 + 0.2 + 0.4 + 1 + 1 + 0.6 + 0.8 + 0.9) / 8)
    np.testing.assert_allclose(stats.profile(scores, np.array([-1, 0, 0.6, 1, 2])), [1, 7 / 8, 5 / 8 - 1 / 8, 1 / 8, 0])


def test_a_profile_has_a_band_that_draws_within_tasks():
    def one(label, task, values):
        return compare.Run(label, task, np.array([10.0]), np.array(values)[:, None], np.array(values))

    runs = [one("a", "t", [0.0, 0.0]), one("a", "u", [1.0, 1.0]), one("b", "t", [0.0, 1.0]), one("b", "u", [0.0, 1.0])]
    scale = {"t": (0.0, 1.0), "u": (0.0, 1.0)}
    panel = compare._profiles(compare.by_label(runs), scale)
    (low, high), (wide_low, wide_high) = panel.bands
    assert panel.lines[0][2][0][10] == 0.5 == low[10] == high[10]  # each task's seeds are alike
    assert wide_low[10] == 0.0 and wide_high[10] == 1.0 and panel.lines[1][2][0][10] == 0.5


def test_an_interval_draws_within_tasks():
    apart = [np.full(5, 0.0), np.full(5, 1.0)]
    assert stats.stratified_interval(stats.pooled_iqm, apart) == (0.5, 0.5)  # drawn over all it would vary
    low, high = stats.stratified_interval(stats.pooled_iqm, [np.arange(10.0)])
    assert (low, high) == pytest.approx(tuple(float(x) for x in stats.interval(np.arange(10.0))), abs=0.2)


def test_steps_to_a_threshold_by_hand():
    curves = np.array([[0, 5, 3, 9], [0, 1, 2, 3], [np.nan, np.nan, 6, 5]], float)
    made = compare.Run("a", "t", np.array([10, 20, 30, 40]), curves, curves[:, -1])
    assert compare.steps_to(made, 5).tolist() == [20, np.inf, 30]
    row = compare.table([made], 5)[0]
    assert row["seeds that reach 5"] == "2 of 3" and row["median steps to it"] == "30"
    assert compare.table([made], 8)[0]["median steps to it"] == "never"


# Reading


def test_a_folder_gives_its_evaluation_and_its_curves(folders):
    (found,) = compare.read(folders / "fast-Probe-action")
    summary = json.loads((folders / "fast-Probe-action/summary.json").read_text())
    assert found.scores.tolist() == summary["eval"]["per_seed"] and found.task == "Probe-action"
    assert found.curves.shape == (4, 30) and found.env_steps[-1] == 480
    (loss,) = compare.read(folders / "fast-Probe-action", "mine", "loss")
    table = list(csv.DictReader((folders / "fast-Probe-action/metrics.csv").open()))
    np.testing.assert_allclose(loss.curves[1], [float(r["loss"]) for r in table if r["seed"] == "1"], rtol=1e-6)
    np.testing.assert_allclose(loss.scores, loss.curves[:, -3:].mean(1))
    assert loss.label == "mine"
    assert [x.label for x in compare.read(folders / "sweep")] == [
        "sweep learning_rate=0.001",
        "sweep learning_rate=0.01",
    ]


def test_a_seed_that_turned_nan_is_left_out(folders, tmp_path):
    shutil.copytree(folders / "fast-Probe-action", tmp_path / "run")
    whole = compare.read(tmp_path / "run")[0]
    summary = {"nan_seeds": [{"seed": 1, "update": 3}], "finished": True}
    (tmp_path / "run/summary.json").write_text(json.dumps(sealed(summary)))
    found = compare.read(tmp_path / "run")[0]
    np.testing.assert_array_equal(found.curves, whole.curves[[0, 2, 3]])
    np.testing.assert_array_equal(found.scores, whole.scores[[0, 2, 3]])


def test_a_table_of_jrl_is_read_as_one_of_another_tool(folders):
    folder = folders / "fast-Probe-policy"
    (as_run,), (as_table,) = compare.read(folder), compare.read(folder / "metrics.csv")
    assert as_table.curves.shape == (4, 100) and np.isfinite(as_table.curves).all()
    np.testing.assert_allclose(as_table.curves[:, -1], as_run.curves[:, -1])


def test_a_table_of_another_tool_is_read(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("global_step,charts/episodic_return,seed\n0,1,a\n100,3,a\n0,2,b\n50,4,b\n100,4,b\n75,,b\n")
    (found,) = compare.read(path)
    assert found.label == "other" and found.curves.shape == (2, 100) and found.env_steps[-1] == 100
    np.testing.assert_allclose(found.curves[:, [0, -1]], [[1, 3], [2, 4]])
    np.testing.assert_allclose(found.scores, [2.9, 4], atol=0.02)
    path.write_text("Wall time,Step,Value\n1.5,10,7\n2.5,20,9\n")  # as TensorBoard exports it
    assert compare.read(path)[0].curves[0, [0, -1]].tolist() == [7, 9]


FOREIGN = {
    "progress": "time/total_timesteps,rollout/ep_rew_mean,time/fps\n10,1,9\n20,2,9\n30,3,9\n",
    "monitor": '#{"t_start": 1, "env_id": "Pong"}\nr,l,t\n1,10,0.1\n2,10,0.2\n3,10,0.3\n',
    "a BOM, tabs and spaces": "\ufeffstep\t episode_return \n10\t 1\n20\t 2\n30\t 3\n",
    "semicolons": "Step;Return\n10;1\n20;2\n30;3\n",
    "named": "when,reached,value\n10,1,8\n20,2,8\n30,3,8\n",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_each_tool_is_read(kind, tmp_path):
    (tmp_path / "a.csv").write_text(FOREIGN[kind])
    (found,) = compare.read(tmp_path / "a.csv", None, *(["reached", "when"] if kind == "named" else []))
    assert found.env_steps[[0, -1]].tolist() == [10, 30] and found.curves[0, [0, -1]].tolist() == [1, 3]
    assert found.task == ("Pong" if kind == "monitor" else "")


def test_seeds_and_tasks_of_a_file_are_told_apart(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("step,return\n0,1\n10,2\n10,4\n0,5\n10,6\n")  # two episodes may end at one step
    (found,) = compare.read(path)
    assert found.curves[:, 0].tolist() == [1, 5] and found.curves[1, -1] == 6
    path.write_text("step,return,env_id,seed\n0,1,A,0\n5,2,A,0\n0,3,B,0\n5,4,B,0\n")
    assert [(run.task, run.curves[0, [0, -1]].tolist()) for run in compare.read(path)] == [("A", [1, 2]), ("B", [3, 4])]
    path.write_text(
        "Step,one - return,one - return__MIN,one - return__MAX,two - return\n0,1,0,9,5\n10,2,0,9,\n20,3,0,9,6\n"
    )
    (found,) = compare.read(path)
    assert found.curves[:, [0, -1]].tolist() == [[1, 3], [5, 6]]
    path.write_text("Step,one - return,one - loss\n0,1,2\n")
    with pytest.raises(run.RunError, match="has several metrics: choose one by --metric: return, loss"):
        compare.read(path)
    assert compare.read(path, metric="loss")[0].curves[0].tolist() == [2]


def test_what_belongs_together_is_joined(tmp_path):
    def one(label, task, value, slippery=None):
        settings = () if slippery is None else (("env_params.slippery", slippery),)
        return compare.Run(label, task, np.array([0.0, 10.0]), np.full((2, 2), value), np.full(2, value), settings)

    found = compare.joined([one("a", "Lake", 1.0, True), one("a", "Lake", 3.0, True), one("b", "", 2.0)])
    assert [(run.label, run.task, len(run.scores)) for run in found] == [("a", "Lake", 4), ("b", "Lake", 2)]
    assert found[0].curves.shape == (4, 100) and sorted(found[0].scores) == [1, 1, 3, 3]
    found = compare.joined([one("a", "Lake", 1.0, True), one("a", "Lake", 3.0, False)])
    assert [run.task for run in found] == ["Lake (slippery=True)", "Lake (slippery=False)"]
    apart = [one("a", "Lake", 1.0), one("a", "Lake", 1.0)._replace(env_steps=np.array([20.0, 30.0]))]
    with pytest.raises(run.RunError, match="a on Lake: its seeds have no steps in common"):
        compare.joined(apart)


def test_tables_escape_what_their_language_reads():
    rows = [{"a|b": "x_1 ~ 5^2 \\ 3%"}]
    assert report.table(rows, "markdown").splitlines()[0] == r"| a\|b |"
    assert r"x\_1 \textasciitilde{} 5\textasciicircum{}2 \textbackslash{} 3\%" in report.table(rows, "latex")


@pytest.mark.parametrize("text", ["", "update,env_st"])
def test_a_table_that_has_just_been_begun_has_no_rows(text, folders, tmp_path):
    (tmp_path / "config.json").write_bytes((folders / "fast-Probe-action/config.json").read_bytes())
    (tmp_path / "metrics.csv").write_text(text)
    assert show.progress(tmp_path) == "no row of metrics yet"
    with pytest.raises(run.RunError, match="has no row of metrics yet"):
        compare.read(tmp_path)


def test_a_row_that_is_being_written_is_left_out(folders, tmp_path):
    source = folders / "fast-Probe-action"
    for name in ("config.json", "metrics.csv"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    text = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text(text[: text.rindex("\n", 0, -1) - 5])  # its seeds 2 and 3 lack
    assert compare.read(tmp_path)[0].curves.shape == (4, 29)
    assert show.progress(tmp_path).startswith("464")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no rows"),
        ("a,b\n1,2\n", "must have one of the columns episode_return, .*; it has: a, b"),
        ("step,return\n1,x\n", "row 2, holds something that is not a number"),
        ("step,return\n1,\n", "has no rows with a value"),
        ("step,return\n1,2\n-3,2\n", "row 3: a step must be a finite number of at least 0; got -3"),
        ("step,return\ninf,2\n", "row 2: a step must be a finite number of at least 0; got inf"),
        ("step,return\n1,2\n2\n", "row 3, has 1 of 2 columns"),
        ("a,return\n1,2\n", "must have one of the columns env_steps, global_step, .*; it has: a, return"),
        ("step,return,seed\n1,1,0\n2,1,0\n3,1,1\n4,1,1\n", "seeds have no steps in common"),
    ],
)
def test_wrong_tables_are_refused(text, message, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(run.RunError, match=message):
        compare.read(tmp_path / "a.csv")


# The commands


def test_runs_are_compared(folders, tmp_path, capsys):
    words = [
        f"{name}={folders / f'{name}-{env}'}" for name in ("slow", "fast") for env in ("Probe-action", "Probe-policy")
    ]
    command.run(["compare", *words, "--threshold", "0.9", "--table", "markdown", "--picture", str(tmp_path / "c.png")])
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith(("| slow", "| fast"))]
    assert len(rows) == 6  # four runs, and two labels over both tasks
    assert "IQM, normalized" in said and "optimality gap" in said and "seeds that reach 0.9" in said
    assert (tmp_path / "c.png").stat().st_size > 1000 and (tmp_path / "c.svg").exists()
    assert "Performance profile" in (tmp_path / "c.svg").read_text() or (tmp_path / "c.svg").stat().st_size > 1000
    command.run(["compare", words[0], "--metric", "loss", "--table", "latex", "--picture", str(tmp_path / "d.pdf")])
    assert capsys.readouterr().out.startswith("\\begin{tabular}") and (tmp_path / "d.pdf").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["absent"], "absent is neither the folder of a run nor a CSV file"),
        ([], "compare needs the folders of runs"),
        (["{}/sweep", "--metric", "lost"], "has no metric 'lost'; it has: "),
        (["{}/sweep", "--picture", "a.gif"], "--picture must end in .png, .svg or .pdf; got a.gif"),
        (["{}/sweep", "--scale", "Probe-action=1"], "--scale is written TASK=LOW,HIGH; got 'Probe-action=1'"),
        (["a={}/sweep", "b={}/sweep"], "sweep is given twice"),
        (["{}/sweep", "--threshold", "nan"], "--threshold must be a finite number; got nan"),
        (["{}/sweep", "--scale", "Probe-action=0,inf"], "--scale: LOW must be below HIGH, both finite"),
        (["{}/sweep", "--scale", "Pong=0,1"], "--scale must be one of Probe-action; got 'Pong'"),
        (["{}"], "is not the folder of a run: it has no config.json"),
    ],
)
def test_what_cannot_be_compared_is_one_line(words, message, folders):
    with pytest.raises((ValueError, run.RunError), match=message):
        command.run(["compare", *(word.format(folders) for word in words)])


def test_a_run_is_shown_and_a_folder_of_runs(folders, capsys):
    command.run(["show", str(folders / "fast-Probe-policy")])
    said = capsys.readouterr().out
    assert "ppo on Probe-policy: 4 seeds" in said and "hyper..learning_rate" not in said
    assert "hyper.learning_rate = 0.01" in said and "config.num_steps = 8" in said and "gamma" not in said
    assert "finished after 480 steps a seed" in said and "greedy" in said
    command.run(["show", str(folders)])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 6 and table[1].startswith("fast-Probe-action")
    with pytest.raises(run.RunError, match="no such folder: absent"):
        command.run(["show", "absent"])


def test_a_run_is_followed_until_it_ends(folders, capsys):
    command.run(["watch", str(folders / "slow-Probe-action"), "--every", "0.1"])
    said = capsys.readouterr().out
    assert "480 of 480 steps a seed, return in training" in said and "finished after 480" in said


def test_environments_are_listed(capsys):
    command.run(["envs"])
    assert "CartPole-v1" in capsys.readouterr().out.splitlines()
