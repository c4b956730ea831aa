"""Damage to one file, or folder, of a run or of a language model."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import gguf as gguf_package
import numpy as np
from pyarrow import parquet

from jrl.lm import hf
from jrl.run import checkpoint

# How a file of any kind is damaged, how one of JSON, and how a table.
FILE = (
    "flip a bit", "change a byte", "zero a part", "cut off", "empty", "append", "swap with a sibling", "take another run's", "remove",
    "a folder", "a link to nowhere", "a pickle",
)  # fmt: skip
JSON = ("a wrong value", "a wrong value", "a wrong value", "a key less", "a key more", "nested deeply")
ROWS = ("a row twice", "a row less", "shuffled rows", "another digit", "a column less")


class Case(NamedTuple):
    """What is damaged, and how; the rest is drawn from the number."""

    kind: str
    part: str
    damage: str
    number: int


class Payload:
    """A pickle that leaves a mark where it is read."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._mark}",)


WRONG = (
    None, [], {}, "", "x", True, float("nan"), -1, 0, 1.5, 10**30, "1e400", "../../x", [None], {"a": 1}, [[1]], "\ud800", "'; import os",
)  # fmt: skip
DEEP = "[" * 100_000
RAW = {"1e400": "1e400", "deep": DEEP}


def files_of(folder: Path, case: Case) -> list[Path]:
    """The files of the part that is damaged."""
    steps = sorted((path for path in (folder / "checkpoints").glob("[0-9]*")), key=lambda path: int(path.name))
    where = {
        "state": lambda: (steps[-1] / "state").rglob("*"),
        "older state": lambda: (steps[0] / "state").rglob("*"),
        "marks": lambda: [*steps[-1].rglob("commit_success.txt"), *steps[-1].rglob("_*METADATA")],
        "manifest": lambda: [steps[-1] / "manifest/metadata"],
        "sealed manifest": lambda: [steps[-1] / "manifest/metadata"],
        "metrics": lambda: [*folder.glob("metrics.csv"), *folder.glob("metrics/*")],
        "events": lambda: (folder / "events").glob("*"),
        "weights": lambda: folder.glob("*.safetensors"),
        "header": lambda: folder.glob("*.safetensors"),
        "index": lambda: [folder / hf.INDEX],
        "file": lambda: [folder / "model.gguf"],
        "metadata": lambda: [folder / "model.gguf"],
    }.get(case.part, lambda: [folder / case.part])
    return sorted((path for path in where() if path.is_file()), key=lambda path: (path.stat().st_size, path.name))


def damage(case: Case, folder: Path, other: Path, mark: Path) -> str | None:
    """Do it; says to what it was done, or None if there is nothing to damage."""
    rng = random.Random(case.number)
    if case.part == "checkpoints":
        return _among_checkpoints(case.damage, folder / "checkpoints", other / "checkpoints")
    if case.part == "folders":
        return _within_checkpoint(case.damage, folder / "checkpoints")
    files = files_of(folder, case)
    if not files:
        return None
    path = rng.choice(files)
    before = path.read_bytes()
    if case.damage in ROWS:
        _rows(rng, case.damage, path)
    elif case.part == "metadata":
        _gguf(rng, path)
    elif case.part == "header":
        _header(rng, case.damage, path)
    elif case.damage in JSON or case.damage == "a path":
        text = before.decode()
        changed = _json(rng, case.damage, text)
        path.write_text(_sealed(changed) if case.part == "sealed manifest" else changed)
    else:
        _file(rng, case.damage, path, other / path.relative_to(folder), mark)
    same = path.is_file() and not path.is_symlink() and path.read_bytes() == before
    return None if same else str(path.relative_to(folder))


def _file(rng: random.Random, how: str, path: Path, other: Path, mark: Path) -> None:
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data)) if data else 0
    if how == "flip a bit" and data:
        data[place] ^= 1 << rng.randrange(8)
    elif how == "change a byte" and data:
        data[place] = rng.randrange(256)
    elif how == "zero a part" and data:
        end = min(len(data), place + rng.randrange(1, 65))
        data[place:end] = bytes(end - place)
    elif how == "cut off":
        del data[place:]
    elif how == "empty":
        data.clear()
    elif how == "append":
        data += rng.choice([b"\0" * 9, b"x\n", b",,,\n", rng.randbytes(40), bytes(data[:50])])
    elif how == "a pickle":
        data = bytearray(pickle.dumps(Payload(mark)))
    elif how == "swap with a sibling":
        siblings = sorted(x for x in path.parent.iterdir() if x.is_file() and x != path)
        if not siblings:
            return
        sibling = rng.choice(siblings)
        data, there = bytearray(sibling.read_bytes()), bytes(data)
        sibling.write_bytes(there)
    elif how == "take another run's":
        if not other.is_file():
            matching = sorted(other.parent.glob("*")) if other.parent.is_dir() else []
            if not matching or not matching[0].is_file():
                return
            other = matching[0]
        data = bytearray(other.read_bytes())
    else:
        path.unlink()
        if how == "a folder":
            path.mkdir()
        elif how == "a link to nowhere":
            path.symlink_to(path.with_name("nowhere"))
        return
    path.write_bytes(data)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Each container of a tree of JSON with each of its keys."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in [(tree, key), *_places(value)]]


def _json(rng: random.Random, how: str, text: str) -> str:
    tree = json.loads(text)
    places = _places(tree)
    if how == "a wrong value" and rng.random() < 0.1:
        return rng.choice(["null", "[]", "{}", "1", '"x"', "NaN", "[1]", "[{}]", '{"a": []}'])
    if not places:
        return text + " x"
    levels = {
        id(node): len(_places(node)) for node, _ in places
    }  # fields near the root are as likely as those of long lists
    node, key = rng.choices(places, [1 / (1 + len(node)) * (1 + levels[id(node)]) ** 0.3 for node, _ in places])[0]
    if how == "a wrong value":
        node[key] = rng.choice(WRONG)
    elif how == "a key less":
        del node[key]
    elif how == "a key more":
        if isinstance(node, dict):
            node[rng.choice(["x", "../x", "__class__", "", "0", "chat_template", "updates"])] = rng.choice(WRONG)
        else:
            node.append(rng.choice(WRONG))
    elif how == "a path":
        tree["weight_map"][rng.choice([*tree["weight_map"]])] = rng.choice(
            ["../folder/model.safetensors", "/etc/passwd", "..", ".", "a\0b"]
        )
    else:
        node[key] = "deep"
    text = json.dumps(tree, indent=2)
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw, 1)
    return text


def _sealed(text: str) -> str:
    """With the right checksum of what it holds."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(tree, dict):
        return text
    return json.dumps(checkpoint.sealed({name: value for name, value in tree.items() if name != checkpoint.SEAL}))


def _header(rng: random.Random, how: str, path: Path) -> None:
    """The JSON at the head of a file of safetensors."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = _json(rng, how, data[8 : 8 + size].decode()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def _gguf(rng: random.Random, path: Path) -> None:
    """A value of the metadata, in its place."""
    reader = gguf_package.GGUFReader(path, "r+")
    fields = [field for name, field in reader.fields.items() if name != "general.alignment"]
    part = rng.choice(rng.choice(fields).parts)
    flat = part.view(np.uint8).reshape(-1)
    if rng.random() < 0.5:
        flat[rng.randrange(len(flat))] = rng.randrange(256)
    else:
        flat[:] = rng.choice([0, 1, 127, 255])
    reader.data.flush()


def _rows(rng: random.Random, how: str, path: Path) -> None:
    if path.suffix == ".parquet":
        return _parquet(rng, how, path)
    head, *rows = path.read_text().splitlines(keepends=True)
    place = rng.randrange(len(rows))
    if how == "a row twice":
        rows.insert(rng.randrange(len(rows)), rows[place])
    elif how == "a row less":
        del rows[place]
    elif how == "shuffled rows":
        rng.shuffle(rows)
    elif how == "another digit":
        digits = [i for i, c in enumerate(rows[place]) if c.isdigit()]
        i = rng.choice(digits)
        rows[place] = rows[place][:i] + str((int(rows[place][i]) + 1) % 10) + rows[place][i + 1 :]
    else:
        column = rng.randrange(head.count(",") + 1)
        head, *rows = [
            ",".join(cells[:column] + cells[column + 1 :])
            for cells in (x.rstrip("\r\n").split(",") for x in (head, *rows))
        ]
        head, rows = head + "\r\n", [row + "\r\n" for row in rows]
    path.write_text("".join([head, *rows]), newline="")


def _parquet(rng: random.Random, how: str, path: Path) -> None:
    rows = parquet.read_table(path)
    order = [*range(len(rows))]
    if how == "a row twice":
        order.insert(rng.choice(order), rng.choice(order))
    elif how == "a row less":
        del order[rng.choice(order)]
    elif how == "shuffled rows":
        rng.shuffle(order)
    name = rng.choice(rows.column_names)
    rows = rows.take(order)
    if how == "another digit":
        values = rows[name].to_numpy().copy()
        values[rng.choice(order)] += 1
        rows = rows.set_column(rows.column_names.index(name), name, [values])
    elif how == "a column less":
        rows = rows.drop_columns([name])
    parquet.write_table(rows, path)


def _among_checkpoints(how: str, folder: Path, other: Path) -> str:
    steps = sorted((path for path in folder.glob("[0-9]*")), key=lambda path: int(path.name))
    newest = steps[-1]
    if how == "renamed":
        newest.rename(newest.with_name(str(int(newest.name) + 1)))
    elif how == "a name":
        newest.rename(newest.with_name(newest.name + "x"))
    elif how == "swapped":
        newest.rename(folder / "aside")
        steps[0].rename(newest)
        (folder / "aside").rename(steps[0])
    elif how == "all removed":
        shutil.rmtree(folder)
    else:
        shutil.rmtree(newest)
        if how == "a file":
            newest.write_text("x")
        elif how == "another run's":
            shutil.copytree(other / newest.name, newest)
    return f"checkpoints, {how}"


def _within_checkpoint(how: str, folder: Path) -> str:
    steps = sorted((path for path in folder.glob("[0-9]*")), key=lambda path: int(path.name))
    part = "manifest" if "manifest" in how else "state"
    shutil.rmtree(steps[-1] / part)
    if "other" in how:
        shutil.copytree(steps[0] / part, steps[-1] / part)
    elif "link" in how:
        (steps[-1] / part).symlink_to("nowhere")
    return f"checkpoints/{steps[-1].name}, {how}"
