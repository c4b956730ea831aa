"""Scripts of this project, in processes of their own or in this one."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jrl.run import cli

ROOT = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
ENVIRONMENT = os.environ | {"PYTHONPATH": PYTHONPATH, "COLUMNS": "200"}


def command(name, *args):
    """What runs ``experiments/NAME.py``."""
    return [sys.executable, str(ROOT / f"experiments/{name}.py"), *map(str, args)]


def experiment(name, *args, cwd=None):
    """The finished run, with its texts."""
    return subprocess.run(command(name, *args), capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, timeout=300)


def refused(name, words, monkeypatch, capsys):
    """What ``experiments/NAME.py`` says to words that it refuses, in this process: its exit status and its text."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    monkeypatch.setattr(sys, "argv", [f"experiments/{name}.py", *map(str, words)])
    main = importlib.import_module(name).main
    with pytest.raises(SystemExit) as end:
        cli.main(main)
    code = end.value.code
    said = capsys.readouterr().err
    return (1, said + code) if isinstance(code, str) else (code, said)
