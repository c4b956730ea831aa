"""What the documentation site takes from the code when it is built (mkdocs.yml names this file).

`jrl/algos/ppo.py::make`               in a page becomes a link to that line of the file, which the site shows
<!-- settings: jrl.algos.ppo.Config -->   becomes the table of those settings
<!-- environments -->, <!-- tasks -->     become tables of what ``envs.make`` and ``tasks.make`` know
<!-- inner modules -->                    becomes a table of the modules that the reference leaves out
"""

import ast
import os
import pkgutil
import re
from pathlib import Path
from typing import Any

from settings_table import table

from jrl import envs, intrinsic, nets
from jrl.algos import auxiliary_tasks, self_imitation
from jrl.attention import dsa, mla, nsa
from jrl.attention.rotary import Scaling
from jrl.lm import tasks
from jrl.nets import adapters, moe, transformer
from jrl.nets.memory import AttentionConfig
from jrl.nets.torso import TorsoConfig
from jrl.numerics import optim

ROOT = Path(__file__).parents[1]

# Settings that several algorithms share, by their headings in docs/settings.md
SHARED: dict[type, str] = {
    nets.Config: "nets.Config",
    nets.ValueConfig: "nets.ValueConfig",
    nets.ContinuousConfig: "nets.ContinuousConfig",
    TorsoConfig: "nets.torso.TorsoConfig",
    intrinsic.Config: "intrinsic.Config",
    intrinsic.Hyper: "intrinsic.Hyper",
    self_imitation.Config: "self_imitation.Config",
    self_imitation.Hyper: "self_imitation.Hyper",
    auxiliary_tasks.Config: "auxiliary_tasks.Config",
    auxiliary_tasks.Hyper: "auxiliary_tasks.Hyper",
    AttentionConfig: "nets.memory.AttentionConfig",
    adapters.Config: "adapters.Config",
    optim.OptimizerConfig: "optim.OptimizerConfig",
    optim.Hyper: "optim.Hyper",
    transformer.Config: "transformer.Config",
    nsa.Config: "nsa.Config",
    mla.Config: "mla.Config",
    dsa.Config: "dsa.Config",
    moe.Config: "moe.Config",
    Scaling: "rotary.Scaling",
}
REFERENCE = re.compile(r"(?<!`)`((?:jrl|experiments|scripts|tests)/[\w/]+\.py)(?:::(\w+))?`(?!`)")
SETTINGS = re.compile(r"<!-- settings: (\S+) -->")


def line_of(path: str, name: str) -> int:
    """The line on which a file defines a function or a class, also within another. Raises ``ValueError`` if it does not."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node.lineno
    raise ValueError(f"{path} defines no {name}")


def relative(target: str, page: str) -> str:
    """The way from a page to another, both within docs."""
    return os.path.relpath(target, os.path.dirname(page) or ".")


def linked(markdown: str, page: str) -> str:
    """References to files of this project as links to the pages that show them."""

    def link(found: re.Match[str]) -> str:
        path, name = found.groups()
        if not (ROOT / path).is_file():
            raise ValueError(f"{page}: no such file: {path}")
        anchor = f"#__codelineno-0-{line_of(path, name)}" if name else ""
        shown = f"{Path(path).stem}.{name}" if name else path
        return f"[`{shown}`]({relative(f'source/{path}.md', page)}{anchor})"

    return REFERENCE.sub(link, markdown)


def settings(dotted: str, page: str) -> str:
    """The table of the settings that a dotted name names."""
    links = {
        cls: f"[`{name}`]({relative('settings.md', page)}#{name.replace('.', '').lower()})"
        for cls, name in SHARED.items()
    }
    return table(pkgutil.resolve_name(dotted), links)


def first_sentence(doc: str | None) -> str:
    """Of a docstring."""
    return re.split(r"(?<=\.)\s", " ".join((doc or "").split()))[0]


def observation(spec: Any) -> str:
    """Shape and dtype of an observation, in words."""
    if isinstance(spec, envs.MaskedObs):
        return f"{observation(spec.obs)} and a mask"
    return f"{spec.dtype} {list(spec.shape)}"


def actions(space: envs.Space) -> str:
    """A space of actions, in words."""
    match space:
        case envs.Discrete(n):
            return str(n)
        case envs.MultiDiscrete(nvec):
            return " x ".join(map(str, nvec))
        case envs.Box(low, high):
            return f"{len(low)} real, {min(low):.3g} to {max(high):.3g}"


def rows(header: str, lines: list[tuple[str, ...]]) -> str:
    """A Markdown table; ``header`` has its columns between bars."""
    return "\n".join([f"| {header} |", "|" + " --- |" * len(lines[0]), *(f"| {' | '.join(line)} |" for line in lines)])


def environments() -> str:
    """All environments that have a name."""
    lines = []
    for name in envs.names():
        env = envs.make(name)
        what = first_sentence(envs._registered[name].__doc__) if name in envs._registered else "of gymnax"
        limit = f"{env.time_limit:,}" if env.time_limit else ""
        lines.append((f"`{name}`", observation(envs.observation_spec(env)), actions(env.action_space), limit, what))
    return rows("name | observation | actions | time limit | what", lines)


def all_tasks() -> str:
    """All tasks of language models that have a name."""
    lines = []
    for name in tasks.names():
        task = tasks.make(name)
        sizes = (str(len(task.symbols)), f"{task.prompt_length} tokens", f"{task.answer_length} tokens")
        lines.append((f"`{name}`", *sizes, first_sentence(tasks._registered[name].__doc__)))
    return rows("name | symbols | prompt | answer | what", lines)


def inner_modules() -> str:
    """All modules that no page of the reference shows."""
    shown = re.findall(r"^::: (\S+)", "\n".join(p.read_text() for p in (ROOT / "docs/reference").glob("*.md")), re.M)
    lines = []
    for path in sorted((ROOT / "jrl").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if path.name != "__init__.py" and name.removesuffix(".py").replace("/", ".") not in shown:
            lines.append((f"`{name}`", first_sentence(ast.get_docstring(ast.parse(path.read_text())))))
    return rows("file | what", lines)


TABLES = {"environments": environments, "tasks": all_tasks, "inner modules": inner_modules}


# What mkdocs calls


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each file of this project that some page refers to."""
    from mkdocs.structure.files import File

    text = inner_modules() + "".join(file.content_string for file in files.documentation_pages())
    for path in sorted({path for path, _ in REFERENCE.findall(text)}):
        code = f'````python linenums="1"\n{(ROOT / path).read_text()}````\n'
        content = f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n\n# {path}\n\n{code}"
        files.append(File.generated(config, f"source/{path}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the tables, and link the files."""
    where = page.file.src_uri
    if where.startswith("source/"):
        return markdown
    markdown = SETTINGS.sub(lambda found: settings(found[1], where), markdown)
    for name, made in TABLES.items():
        if f"<!-- {name} -->" in markdown:
            markdown = markdown.replace(f"<!-- {name} -->", made())
    return linked(markdown, where)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Tell mkdocs, which checks where links lead, of the lines of a file."""
    if page.file.src_uri.startswith("source/"):
        page.present_anchor_ids |= set(re.findall(r'id="(__codelineno-0-\d+)"', html))
    return html
