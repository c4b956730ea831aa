"""The rooms of the house: what imports what, and what ``import jrl`` gives."""

import ast
from pathlib import Path

import jrl

ROOT = Path(jrl.__file__).parent
FLOORS = {
    "user_file": 1, "equations": 1, "numerics": 1, "attention": 1,
    "envs": 2, "nets": 2, "experience": 2, "intrinsic": 2, "lm": 2,
    "algorithm": 3, "algos": 3,
    "run": 4,
}  # fmt: skip


def imported_rooms(path):
    """The first names after ``jrl`` that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "jrl":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jrl."):
            yield node.module.split(".")[1]


def test_a_file_imports_only_from_its_own_floor_and_those_below():
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room != "__init__":
            above = [name for name in imported_rooms(path) if FLOORS[name] > FLOORS[room]]
            assert not above, f"{path} imports {above}"


def test_jrl_gives_its_rooms_and_nothing_else():
    assert set(jrl.__all__) == FLOORS.keys() - {"user_file"}
    assert {*dir(jrl)} == {*jrl.__all__, "__version__"}
    assert jrl.envs.make("CartPole-v1").name == "CartPole-v1"
    assert jrl.algos.ppo.Config().num_envs and "ppo" in dir(jrl.algos)
    assert not hasattr(jrl, "returns") and not hasattr(jrl.algos, "nothing")
    assert (ROOT / "py.typed").exists()
