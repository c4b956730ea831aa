"""A few of the attacks of scripts/attack.py, which has thousands."""

import subprocess
import sys
from pathlib import Path

import processes
import pytest

ENVIRONMENT = processes.ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "JRL_CPU_DEVICES": "1"}  # the attacked are forks

INPUTS = """
import sys
from pathlib import Path


sys.path.insert(0, sys.argv[1])
import attack  # noqa: F401  (sets what the forks need)
from attacks import inputs, processes

for name in inputs.SMALL:  # or they could not be forked, nor a wrong platform be refused
    processes.script(name)
    print("no device is used yet" if processes.no_device_used() else f"importing {name} uses a device")

for number, case in enumerate(inputs.some(16)):
    folder = Path(str(number)).absolute()
    folder.mkdir()
    broke, _ = inputs.attempt(case, folder)
    print("refused" if broke is None else f"{broke}: {case}")
"""


@pytest.mark.slow
def test_bad_inputs_are_refused_with_one_line(tmp_path):
    scripts = processes.ROOT / "scripts"
    command = [sys.executable, "-c", INPUTS, str(scripts)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 30 and set(lines) == {"refused", "no device is used yet"}, done.stdout


TAMPERING = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from attacks import tampering
chosen = {"ppo": 4, "shards": 3, "experts": 2, "gguf": 3}
for number, case in enumerate(tampering.cases(1, 2000)):
    if chosen.get(case.kind, 0):
        chosen[case.kind] -= 1
        folder = Path(sys.argv[2], str(number))
        folder.mkdir()
        broke, _ = tampering.attempt(case, folder)
        if broke is not None:
            print(case, broke)
"""


@pytest.mark.slow
def test_damaged_runs_and_models_are_refused_in_a_line_or_the_damage_does_not_matter(tmp_path):
    command = [sys.executable, "-c", TAMPERING, str(Path(__file__).parents[1] / "scripts"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
