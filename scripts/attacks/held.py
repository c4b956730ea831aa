"""What a run's folder holds in the end, without what may differ between two runs: their speeds."""

import csv
import json
from pathlib import Path
from typing import Any

from pyarrow import parquet


def held(folder: Path) -> dict[str, Any]:
    """What may not differ: the last checkpoint's arrays by their checksums, the metrics, the evaluations, the summary's scores."""
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
    manifest = json.loads((folder / f"checkpoints/{steps[-1]}/manifest/metadata").read_text())
    found = {"updates": steps[-1], "arrays": manifest["arrays"], "metrics": metrics(folder)}
    for name in ("evaluations.json", "summary.json"):
        if (folder / name).exists():
            found[name] = json.loads((folder / name).read_text())
    for name in ("compile_seconds", "run_seconds", "env_steps_per_second", "crc32"):
        found.get("summary.json", {}).pop(name, None)
    return found


def metrics(folder: Path) -> Any:
    """The table's rows; speeds left out."""
    if (folder / "metrics").is_dir():
        return [str(parquet.read_table(path).to_pydict()) for path in sorted((folder / "metrics").glob("*.parquet"))]
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if "per_s" not in str(k)} for row in csv.DictReader(file)]
