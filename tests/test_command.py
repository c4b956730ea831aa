"""The command ``jrl``."""

import sys
from dataclasses import fields

import pytest
from settings_table import descriptions

from jrl import run
from jrl.run import cli, command, tools


def test_the_first_word_names_an_algorithm(capsys):
    assert command.run(["--help"]) is None
    assert "jrl ppo" in capsys.readouterr().out
    with pytest.raises(
        ValueError,
        match="the first word must be one of ppo, ppo_cma, dqn, ebu, pqn, r2d2, sac, td3, show, watch, compare, record, envs; got 'sarsa'",
    ):
        command.run(["sarsa", "--env", "CartPole-v1"])


def test_a_folder_of_runs_is_not_that_of_one(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/config.json").touch()
    with pytest.raises(run.RunError, match="one contains a single run; choose another folder"):
        cli.folder_of_runs(tmp_path / "one", True, "compare")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    with pytest.raises(run.RunError, match="full already contains runs or other files: resume it"):
        cli.folder_of_runs(tmp_path / "full", False, "compare")
    assert cli.folder_of_runs(tmp_path / "full", True, "compare") == tmp_path / "full"
    with pytest.raises(ValueError, match="--resume needs --run-dir"):
        cli.folder_of_runs(None, True, "compare")


@pytest.mark.parametrize("name", command.COMMANDS)
def test_the_help_of_an_algorithm_describes_each_of_its_options(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jrl", name])
    with pytest.raises(SystemExit) as end:
        command.run([name, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for part in ("env", "num-seeds", "config.num-envs", "hyper.gamma", "hyper.optimizer.b1"):
        assert f"--{part}" in shown
    assert f"usage: jrl {name}" in shown and "Seeds trained together." in shown and "Discount of the return." in shown


def test_it_trains(tmp_path, capsys):
    words = "ppo --env Probe-value --num-seeds 1 --config.num-envs 2 --config.num-steps 8 --env-steps 32 --config.network.hidden 4"
    result = command.run([*words.split(), "--run-dir", str(tmp_path / "run")])
    assert result is not None and result.finished and (tmp_path / "run/summary.json").exists()
    assert "ppo on Probe-value: 1 seed x 32 steps" in capsys.readouterr().out


def test_an_option_has_a_default():
    assert all(command.COMMANDS[name].options().num_seeds == 16 for name in command.COMMANDS)
    assert {"config", "hyper"} <= {f.name for f in fields(command.PPO)}


@pytest.mark.parametrize(
    "options", [*(c.options for c in command.COMMANDS.values()), *(t[0] for t in tools.TOOLS.values())]
)
def test_every_option_says_what_it_is(options):
    described = descriptions(options)
    for field in fields(options):
        assert field.name in ("config", "hyper") or described[field.name].endswith((".", "...")), field.name
