"""Answers that attack their judge leave no file, change no other score and are wrong; right ones beside them are right."""

import importlib.util
import inspect
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from attacks import answers

from jrl.lm import grading, grading_server

RIGHT, WRONG = (4, "2 + 2"), (4, "5")


@pytest.fixture(scope="module")
def judge():
    """The most careless judge: it evaluates any expression of Python."""
    return grading.grader("python", 1, 0.2)


@pytest.fixture
def folder():
    """A folder to which everybody may write, with a file in it."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        Path(name, "victim").write_text("unharmed")
        Path(name, "victim").chmod(0o666)
        yield Path(name)


@pytest.fixture(scope="module")
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("landlock, attack", answers.PYTHON, ids=[attack[:40] for _, attack in answers.PYTHON])
def test_attacks_are_wrong_and_change_nothing(judge, folder, port, landlock, attack):
    if landlock > answers.LANDLOCK:
        pytest.skip("the kernel's Landlock is too old")
    previous = signal.signal(signal.SIGUSR1, lambda *_: pytest.fail("a signal reached the program"))
    try:
        assert judge([(4, answers.expression(attack, folder, port)), RIGHT, WRONG]) == [0, 1, 0]
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert [path.name for path in folder.iterdir()] == ["victim"] and (folder / "victim").read_text() == "unharmed"


def test_many_answers_are_judged_side_by_side_in_their_order(monkeypatch):
    monkeypatch.setattr(grading, "FEW", 2)
    judge = grading.graders("python", 1, 0.5)
    wanted = [1, 0, 0, 1, 1, 0, 1]
    assert judge([RIGHT if x else WRONG for x in wanted]) == wanted
    assert judge([]) == [] and judge([RIGHT]) == [1]


def test_answers_of_one_fork_have_their_own_deadlines_and_deaths():
    judge = grading.grader("python", 4, 0.2)
    ends = [(4, "__import__('os')._exit(0)"), (4, "any(iter(int, 1))")]
    assert judge([RIGHT, ends[0], RIGHT, ends[1], ends[1], RIGHT, WRONG, RIGHT, ends[0]]) == [1, 0, 1, 0, 0, 1, 0, 1, 0]
    hungry = (4, "len(bytes(1 << 27)) and 4")
    hog = (4, "__import__('resource').setrlimit(__import__('resource').RLIMIT_AS, (1 << 20, 1 << 31))")
    assert judge([hungry, hog, hungry]) == [1, 0, 1]  # an answer is not wrong because the one before it left no memory
    assert judge([]) == [] and judge([RIGHT] * 9 + [WRONG]) == [1] * 9 + [0]


def test_a_judge_has_no_secrets_and_no_jax(judge, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    empty = "{*__import__('os').environ} <= {'OMP_NUM_THREADS', 'LD_LIBRARY_PATH', 'PYTHONHOME', 'LC_CTYPE'}"
    assert judge([(True, empty), (False, "bool({'jax', 'jrl'} & {*__import__('sys').modules})")]) == [1, 1]


def test_a_judge_that_dies_is_asked_again(monkeypatch):
    servers = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            servers.append(self)

    monkeypatch.setattr(grading.subprocess, "Popen", Popen)
    judge = grading.grader("python", 1, 1.0)
    assert judge([RIGHT]) == [1]
    timer = threading.Timer(0.2, servers[0].kill)
    timer.start()
    assert judge([(4, "__import__('time').sleep(0.7) or 4"), WRONG]) == [1, 0] and len(servers) == 2
    timer.join()


SCRIPT = """
import os, signal, sys, types
for name in ("jrl", "jrl.lm"):  # the two modules alone, without JAX
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.argv[1]]
from jrl.lm import grading
judge = grading.grader("python", 1, 60.0)
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
first = judge([(True, "True")])
os.killpg(0, signal.SIGINT)
os.killpg(0, signal.SIGTERM)
grading.subprocess.Popen = None  # the first server must do
print(first + judge([(True, "True")]), flush=True)
judge([(True, "any(iter(int, 1))")])
"""


def _servers() -> set[int]:
    """Processes that run the server, or are forks of one."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                str(grading_server.__file__) in (process / "cmdline").read_text()
                and "Z" not in (process / "stat").read_text().split()[2]
            ):
                found.add(int(process.name))
        except OSError:
            pass
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_a_judge_survives_the_programs_signals_and_dies_with_it():
    before = _servers()
    command = [sys.executable, "-c", SCRIPT, str(Path(grading.__file__).parent)]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert program.stdout is not None and program.stdout.readline() == "[1.0, 1.0]\n"
    time.sleep(0.2)
    assert _servers() - before
    program.kill()
    program.communicate()
    deadline = time.monotonic() + 20
    while _servers() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _servers() - before


ADMITTED = {
    "countdown": ["94*4 - 61 - 6", "(1+2)*-3/4"],
    "simple_integration": ["-34*x**8/15 - 5*X/4 + C", "2*sin(x)*exp(-x) + 0.5*log(x) + E**(2.*x) + C"],
    "intermediate_integration": ["-4*(-2*x - 8)**(3/2)/3 + C", "atan(x/2)/2 + sqrt(x)*Rational(1, 2)"],
    "polynomial_multiplication": ["2240*x**3 + 3584*x**2*y - 896*z"],
    "n_queens": ["_ Q\nQ _", "[['_', 'Q'], ['Q', '_']]"],
    "spiral_matrix": ["4 6 7", "[4, 6, 7]"],
    "binary_matrix": ["0 1\n1 2", "[[0, 1], [1, 2]]"],
    "string_insertion": ["EACAD", "['E', 'A']"],
    "chain_sum": ["anything (goes) __import__", "nano"],
    "complex_arithmetic": ["1 + 2i"],
}
REFUSED = {
    "countdown": ["9**9**9", "7//2", "x", "1.5", "\uff11+2", "1_0", "4!", "1 if 1 else 2", "2\u00b2", "\u0661", "__import__('os')"],
    "simple_integration": [
        "S('__import__(1)')", "x.subs", "x .subs", "x. subs", "x2.n", "1.real", "__class__", "x\uff0en", "\u212f", "\uff33(x)", "lambda x: x",
        "O(x)", "N(x)", "eval(x)", "[x]", "x; y", "x = 1", "x\\ny", "x#", "Symbol(x)", "().x", "x@y", "sys", "oo", "nan", "Integral(x, x)",
    ],
    "spiral_matrix": ["__import__('os')", "[i for i in x]", "9**9", "(1).real", "oracle_answer", "f'{x}'", "[print]", "[" * 5000, "exit()"],
    "string_insertion": ["oracle_answer", "entry", "''.join(x)", "\uff21+x"],
    "chain_sum": ["nan", "NaN", "-nan"],
    "number_sorting": ["[NaN, NaN]", "['nan']"],
    "complex_arithmetic": ["nan", "1+nani", "nanj"],
}  # fmt: skip


def test_answers_that_scorers_evaluate_hold_nothing_but_mathematics_or_literals():
    for wanted, table in ((True, ADMITTED), (False, REFUSED)):
        for dataset, given in table.items():
            for answer in given:
                known = {"answer": "4", "metadata": {"source_dataset": dataset}}
                assert grading_server.admitted(dataset, known, answer) == wanted, (dataset, answer)
                assert grading_server.admitted("composite", known, answer) == wanted, (dataset, answer)
    assert grading_server.admitted("word_sorting", {"answer": "ann, nan", "metadata": {}}, "ann, nan")


def test_the_packages_answers_are_right_and_code_and_nan_are_wrong(folder):
    pytest.importorskip("reasoning_gym")
    from reasoning_gym import create_dataset
    from reasoning_gym.composite import DatasetSpec

    names = [*grading_server.EVALUATED, "complex_arithmetic", "number_sorting"]
    judge = grading.grader(
        "reasoning_gym",
        ("composite", {"seed": 1, "size": 2, "datasets": [DatasetSpec(name, 1, {}) for name in names]}),
        5.0,
    )
    code = f"__import__('os').system('touch {folder}/new')"
    for name in names:
        dataset = create_dataset(name, seed=1, size=2)
        item = dataset[1]
        attacks = [code, f"[{code}]"]
        if name not in grading_server.EVALUATED:  # within any distance of any number, says the package
            attacks.append(
                "nan"
                if name == "complex_arithmetic"
                else "[" + ", ".join(["NaN"] * (item["answer"].count(",") + 1)) + "]"
            )
            assert dataset.score_answer(attacks[-1], item) == 1
        pairs = [(item, attack) for attack in attacks] + [(item, item["answer"])]
        assert judge(pairs) == [0] * len(attacks) + [1], name
    assert not (folder / "new").exists()


def test_no_other_scorer_of_the_package_evaluates_answers():
    pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    call = re.compile(
        r"\b(eval|exec|parse_expr|sympify|parse_latex|simplify|lambdify)\((answer|user_answer|student|cleaned)"
    )
    found = {name for name, (kind, _) in DATASETS.items() if call.search(inspect.getsource(inspect.getmodule(kind)))}
    assert found == set(grading_server.EVALUATED)


def test_mathematics_that_never_ends_is_wrong():
    if importlib.util.find_spec("math_verify") is None:
        pytest.skip("needs math_verify")
    judge = grading.grader("math_verify", None, 1.0)
    answers = ["4", "9^{9^{9^{9}}}", "2+2", "9" * 200_000, r"\frac{8}{2}", "{" * 50_000]
    assert judge([("4", answer) for answer in answers]) == [1, 0, 1, 0, 1, 0]
