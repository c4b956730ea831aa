"""A few of the attacks of scripts/attack.py, which has thousands."""

import subprocess
import sys
from pathlib import Path

import processes

TAMPERING = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from attacks import tampering
chosen = {"ppo": 24, "shards": 14, "experts": 10, "gguf": 12}
for number, case in enumerate(tampering.cases(1, 2000)):
    if chosen.get(case.kind, 0):
        chosen[case.kind] -= 1
        folder = Path(sys.argv[2], str(number))
        folder.mkdir()
        broke, _ = tampering.attempt(case, folder)
        if broke is not None:
            print(case, broke)
"""


def test_damaged_runs_and_models_are_refused_in_a_line_or_the_damage_does_not_matter(tmp_path):
    command = [sys.executable, "-c", TAMPERING, str(Path(__file__).parents[1] / "scripts"), str(tmp_path)]
    environment = processes.ENVIRONMENT | {"JRL_CPU_DEVICES": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
