"""Attack runs, command lines, files and verifiers, and record what broke.

    bash scripts/attack                               every kind at full length: hours on 2 cores
    bash scripts/attack --kinds inputs --count 50     the first 50 cases of one kind
    bash scripts/attack --kinds kills --only 17       one case again; its folder is kept

A case depends on the seed and its number alone. Results are appended to FOLDER/KIND.jsonl as they come; cases that stand there
are not attacked again. The folder of a case that broke something is kept beside them.
"""

import importlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.progress import track

# Before JAX is imported: the attacked processes are forks of this one.
ROOT = Path(__file__).parents[1]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JRL_CPU_DEVICES", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

KINDS = ("kills", "inputs", "tampering", "answers")


@dataclass(frozen=True)
class Args:
    """Attack, and record what broke."""

    # Kinds of attack: kills of running processes, bad inputs, tampered files, answers of language models.
    kinds: tuple[str, ...] = KINDS
    count: int | None = None  # Cases of each kind; default: as many as the recorded result has.
    only: int | None = None  # Number of the one case to attack.
    seed: int = 0  # Seed from which the cases are drawn.
    folder: Path = Path("runs/attack")  # Folder of the results, and of what broke.
    record: bool = False  # Write the table of results into docs/attacks.md.


def attack(kind: str, args: Args) -> list[dict]:
    """Attack with the cases of one kind that have no result yet; all results of the kind."""
    module = importlib.import_module(f"attacks.{kind}")
    cases = module.cases(args.seed, module.COUNT if args.count is None else args.count)
    path = args.folder.absolute() / f"{kind}-{args.seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {} if args.only is not None or not path.exists() else _results(path)
    wanted = range(len(cases)) if args.only is None else [args.only]
    left = [number for number in wanted if number not in known]
    for number in track(left, kind, disable=not sys.stderr.isatty()):
        folder = path.with_suffix("") / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begin = time.monotonic()
        broke, counts = module.attempt(cases[number], folder)
        known[number] = {
            "case": number,
            "what": str(cases[number]),
            "broke": broke,
            "counts": counts,
            "seconds": round(time.monotonic() - begin, 1),
        }
        if broke is not None:
            print(f"{kind} {number}: {broke}\n    {cases[number]}\n    {folder}", flush=True)
        elif args.only is None:
            shutil.rmtree(folder)
        if args.only is None:
            with path.open("a") as file:
                file.write(json.dumps(known[number]) + "\n")
    return [known[number] for number in wanted]


def _results(path: Path) -> dict[int, dict]:
    """What is in a file of results, by case; a last line that was cut off does not count."""
    found = {}
    for line in path.read_text().splitlines():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        found[result["case"]] = result
    return found


def row(kind: str, results: list[dict]) -> str:
    """A line of the table of results."""
    counts = sum((Counter(r["counts"]) for r in results), Counter())
    listed = ", ".join(f"{number:,} {name}" for name, number in counts.items())
    broke = sum(r["broke"] is not None for r in results)
    return f"| {kind} | {len(results):,} | {listed} | {broke} |"


def main(args: Args) -> None:
    table = ["| kind | cases | what happened | broke |", "| --- | --- | --- | --- |"]
    failed = False
    for kind in args.kinds:
        results = attack(kind, args)
        failed = failed or any(r["broke"] is not None for r in results)
        table.append(row(kind, results))
    print("\n".join(table))
    if args.record:
        path, mark = ROOT / "docs/attacks.md", f"Seed {args.seed}:\n"
        head = path.read_text().partition("Seed ")[0]
        path.write_text(head + mark + "\n" + "\n".join(table) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
