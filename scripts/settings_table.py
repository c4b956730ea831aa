"""Tables of settings, whose descriptions are comments on or above the fields' own lines, or "Attributes:" of the docstring."""

import ast
import inspect
import itertools
import re
import textwrap
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

NAMES = {bool: "`True`, `False`", int: "integer", float: "number", str: "text"}


def descriptions(cls: type) -> dict[str, str]:
    """By field, those of base classes included."""
    found: dict[str, str] = {}
    for base in filter(inspect.get_annotations, reversed(cls.__mro__)):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2].split("\n\n")[0]
        for entry in re.split(r"^    (?=\w+: )", section, flags=re.MULTILINE)[1:]:
            name, _, text = entry.partition(": ")
            found[name] = " ".join(text.split())
        source = textwrap.dedent(inspect.getsource(base))
        lines = source.splitlines()
        for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign):
                rest = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
                above = itertools.takewhile(lambda x: x.startswith("    #"), reversed(lines[: node.lineno - 1]))
                if said := [rest] if rest else list(above)[::-1]:
                    found[ast.unparse(node.target)] = " ".join(x.strip().removeprefix("# ") for x in said)
    return found


def allowed(hint: Any) -> str:
    """What an annotation admits, in words: choices, or the kind of number with its range."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        try:
            parts[1]("it", -1 if parts[0] in (int, float) else "")
        except ValueError as error:  # it says what is allowed
            found = re.search(r"it must be (?:an integer of )?(.*); got", str(error))
            return f"{allowed(parts[0])}, {found[1]}" if found else allowed(parts[0])
        return allowed(parts[0])
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in parts)
    if origin is tuple:
        return f"tuple of {allowed(parts[0])}"
    if parts:
        return " or ".join("`None`" if part is type(None) else allowed(part) for part in parts)
    return NAMES.get(hint, f"`{hint.__name__}`")


def table(cls: Any, links: dict[type, str]) -> str:
    """A Markdown table; ``links`` say where the settings within a field are shown. ``KeyError`` if that, or a description, lacks."""
    hints, texts = typing.get_type_hints(cls, include_extras=True), descriptions(cls)
    made = {f.name: f.default for f in fields(cls)} if is_dataclass(cls) else cls._field_defaults
    lines = ["| field | default | allowed | description |", "| --- | --- | --- | --- |"]
    for name, hint in hints.items():
        kind = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        nested = is_dataclass(kind) or hasattr(kind, "_fields")
        default = "" if nested or made.get(name, MISSING) is MISSING else f"`{made[name]!r}`"
        cells = (f"`{name}`", default, links[kind] if nested else allowed(hint), texts[name])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
