"""Attacks of scripts/attack.py, a few of each kind."""

import subprocess
import sys

import processes

INPUTS = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import attack  # noqa: F401  (sets what the forks need)
from attacks import inputs, processes

for name in inputs.SMALL:  # or they could not be forked, nor a wrong platform be refused
    processes.script(name)
    print("no device is used yet" if processes.no_device_used() else f"importing {name} uses a device")

for number, case in enumerate(inputs.some(23)):
    folder = Path(str(number)).absolute()
    folder.mkdir()
    broke, _ = inputs.attempt(case, folder)
    print("refused" if broke is None else f"{broke}: {case}")
"""


def test_bad_inputs_are_refused_with_one_line(tmp_path):
    scripts = processes.ROOT / "scripts"
    command = [sys.executable, "-c", INPUTS, str(scripts)]
    done = subprocess.run(command, capture_output=True, text=True, env=processes.ENVIRONMENT, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 40 and set(lines) == {"refused", "no device is used yet"}, done.stdout
