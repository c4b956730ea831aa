"""Scripts of this project in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def command(name, *args):
    """What runs ``experiments/NAME.py``."""
    return [sys.executable, str(ROOT / f"experiments/{name}.py"), *map(str, args)]


def experiment(name, *args, cwd=None):
    """The finished run, with its texts."""
    return subprocess.run(command(name, *args), capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, timeout=300)
