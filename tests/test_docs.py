"""The documentation: its links and tables hold, its code runs, and the site builds without a warning."""

import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import docs_hooks
import pytest
import yaml
from settings_table import table

from jrl import algos, run
from jrl.algos import ppo
from jrl.numerics.settings import Positive, Unit
from jrl.run import cli

RANK_PROMOTION = "allow"  # as in a user's own process
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


LONG = (
    "attention",
    "bc",
    "dpo",
    "dqfd",
    "language-model",
    "language-models",
    "process_reward",
    "reverse_curriculum",
    "reward_model",
    "rudder",
    "first-run",
    "td",
    "algorithm",
    "environment",
    "sweeps",
    "run-folder",
    "language-model",
    "parts",
)  # pages whose code takes long: they train, or compile much


def pages_with(pattern):
    return [
        pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in LONG else [])
        for page in PAGES
        if pattern.search(page.read_text())
    ]


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def in_nav(tree):
    match tree:
        case str():
            return [tree]
        case dict():
            return [page for part in tree.values() for page in in_nav(part)]
        case _:
            return [page for part in tree for page in in_nav(part)]


def test_every_page_is_in_the_navigation_once():
    nav = in_nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_every_algorithm_has_a_page():
    assert {page.stem for page in (DOCS / "algorithms").glob("*.md")} == {*algos.__all__, "index"} - {"presets"}


def test_every_script_that_a_command_names_is_there():
    for page in [*PAGES, ROOT / "README.md"]:
        for script in re.findall(r"\b(?:experiments|scripts)/[\w./]+", page.read_text()):
            assert (ROOT / script.rstrip(".")).exists(), f"{page}: {script}"


def test_every_link_within_the_documentation_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not target.startswith("http"):
                path, _, anchor = target.partition("#")
                file = (page.parent / path).resolve() if path else page
                assert file.is_file(), f"{page}: {target}"
                assert not anchor or anchor in anchors(file), f"{page}: {target}"


def test_a_file_or_function_that_a_page_names_becomes_a_link_to_its_line():
    for page in PAGES:
        docs_hooks.linked(page.read_text(), str(page.relative_to(DOCS)))  # raises for what is not there
    found = docs_hooks.linked("`jrl/algos/ppo.py::loss`, `jrl/nets/types.py`", "algorithms/ppo.md")
    file, line = re.match(r"\[`ppo.loss`\]\(../source/(.*).md#__codelineno-0-(\d+)\), ", found).groups()
    assert "def loss(" in (ROOT / file).read_text().splitlines()[int(line) - 1]
    assert found.endswith("[`jrl/nets/types.py`](../source/jrl/nets/types.py.md)")
    with pytest.raises(ValueError, match=r"ppo\.py defines no gain"):
        docs_hooks.linked("`jrl/algos/ppo.py::gain`", "index.md")


@pytest.mark.parametrize("page", pages_with(docs_hooks.SETTINGS))
def test_every_setting_of_a_page_has_a_description(page):
    for dotted in docs_hooks.SETTINGS.findall(page.read_text()):
        for row in docs_hooks.settings(dotted, "settings.md").splitlines()[2:]:
            assert row.count(" | ") >= 3 and not row.endswith("|  |"), row
    assert {name.replace(".", "").lower() for name in docs_hooks.SHARED.values()} <= anchors(DOCS / "settings.md")


@pytest.mark.parametrize("page", pages_with(re.compile("^```python", re.M)))
def test_the_code_of_a_page_runs_as_it_is_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = {"__name__": page.stem}
    for file, code in re.findall(r'^```python(?: title="(.+?)")?\n(.*?)^```$', page.read_text(), re.M | re.S):
        if file:
            Path(file).write_text(code)
        exec(compile(code, str(page), "exec"), names)


class AcceptedError(Exception):
    """Training would begin."""


def commands():
    for page in [ROOT / "README.md", *PAGES]:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S):
            yield from re.findall(
                r"^bash scripts/run experiments/((?:ppo|dqn|pqn|r2d2|grpo)\.py.*?) *(?:#.*)?$", block, re.M
            )


@pytest.mark.slow
def test_every_command_that_trains_is_accepted(tmp_path, monkeypatch, capsys):
    def accept(*args, **settings):
        raise AcceptedError

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    monkeypatch.setattr(cli, "train", accept)
    monkeypatch.setattr(run, "train", accept)
    for page in PAGES:
        for file, code in re.findall(r'^```python title="(.+?)"\n(.*?)^```$', page.read_text(), re.M | re.S):
            Path(file).write_text(code)
    for command in sorted(set(commands())):
        script, *words = shlex.split(command)
        with pytest.raises((AcceptedError, SystemExit)) as ended:
            importlib.import_module(script.removesuffix(".py")).main(words)
        assert "--help" in words or ended.type is AcceptedError, f"{command}: {capsys.readouterr()}"


# Tables of settings


@dataclass(frozen=True)
class Base:
    width: Positive = 4  # Units of a layer.


@dataclass(frozen=True)
class Commented(Base):
    rate: Unit = 0.5  # Share | of what is kept.
    kind: Literal["a", "b"] = "a"  # Which of them.
    # Long, and
    # above.
    limit: int | None = None


class Documented(NamedTuple):
    """Some numbers.

    Attributes:
        gamma: discount, from
            step to step.
        inner: more.
    """

    gamma: float = 0.99
    inner: Base = Base()


def test_a_table_of_settings_reads_the_comment_on_a_field_and_the_docstring():
    assert table(Commented, {}).splitlines()[2:] == [
        "| `width` | `4` | integer, at least 1 | Units of a layer. |",
        "| `rate` | `0.5` | number, between 0 and 1 | Share \\| of what is kept. |",
        "| `kind` | `'a'` | `a`, `b` | Which of them. |",
        "| `limit` | `None` | integer or `None` | Long, and above. |",
    ]
    assert table(Documented, {Base: "[Base](x.md)"}).splitlines()[2:] == [
        "| `gamma` | `0.99` | number | discount, from step to step. |",
        "| `inner` |  | [Base](x.md) | more. |",
    ]


# The site


def test_the_script_says_how_it_is_used():
    done = subprocess.run(["bash", str(ROOT / "scripts/docs"), "deploy"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "error: usage: bash scripts/docs [serve|build] [ARGUMENTS OF MKDOCS]\n",
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="needs the extra docs")
def test_the_site_builds_without_a_warning(tmp_path):
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ppo_page = (tmp_path / "algorithms/ppo/index.html").read_text()
    for setting in (*ppo.Config.__dataclass_fields__, *ppo.Hyper._fields):
        assert f"<code>{setting}</code>" in ppo_page
    assert 'href="../../source/jrl/algos/ppo.py/#__codelineno-0-' in ppo_page
    assert "jrl.equations.returns.gae" in (tmp_path / "reference/equations/index.html").read_text()


@pytest.mark.slow
def test_the_notebook_runs_as_it_is_written_and_shows_what_it_says(capsys):
    shown = []
    cells = json.loads((ROOT / "examples/first_steps.ipynb").read_text())["cells"]
    names = {"Image": lambda path, width: Path(path), "display": lambda path: shown.append(path.stat().st_size)}
    for cell in cells:
        if cell["cell_type"] == "code":  # IPython may be missing
            exec("".join(cell["source"]).replace("from IPython.display import Image, display\n", ""), names)
    said = capsys.readouterr().out
    saved = "".join("".join(out["text"]) for cell in cells for out in cell.get("outputs", []) if "text" in out)
    assert said.splitlines()[-1] == saved.splitlines()[-1] == "1.0" and "8 of 8" in said
    assert len(shown) == 2 and min(shown) > 5_000 and names["steps"] == 9
