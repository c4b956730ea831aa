"""Verifiers on the host: extraction of answers, your own functions, the packages, and answers that never end."""

import importlib.util
import sys
import threading
import time
import types

import numpy as np
import pytest

from jrl.lm import grading, grading_server, verifiers
from jrl.lm.verifiers import Item

GOOD = "<think>2 and 2</think>\n<answer> 4 </answer>"


@pytest.mark.parametrize(
    "text, wanted",
    [
        (GOOD, ("4", True)),
        ("2 and 2</think><answer>4</answer>\n", ("4", True)),
        ("<think>a</think><answer>4", (None, False)),
        ("4", (None, False)),
        ("<answer>4</answer>", ("4", False)),
        (GOOD + " so it is 4", ("4", False)),
        ("<think>a</think><answer>3</answer><answer>4</answer>", ("4", False)),
        ("<think>a<think>b</think><answer>4</answer>", ("4", False)),
        ("<answer>3 or <answer>4</answer>", ("4", False)),
        ("<think></think><answer></answer>", ("", True)),
    ],
)
def test_tagged(text, wanted):
    assert verifiers.tagged(text) == wanted


def test_boxed_and_last_number_and_whole():
    assert verifiers.boxed(r"so \boxed{1} or \boxed{\frac{1}{2}}.") == (r"\frac{1}{2}", True)
    assert verifiers.boxed(r"\boxed{1") == verifiers.boxed("1") == (None, False)
    numbers = {
        "it is 1,234.50.": "1234.50", "#### -7": "-7", "10-4": "4", "x=5.": "5", "3, 4": "4", "(2)-1": "1", ".5": ".5",
        "1,2345": "2345", "12 of H2O": "12", "5km": "5", "0.7e2 x7": "70",
        # signs
        "\u22125": "-5", "x = \u2212.5.": "-.5", "+5": "5", "-$1,000": "-1000", "**-5**": "-5", "_-5_": "-5", "[2]-1": "1",
        # thousands
        "1 000 000": "1000000", "1\u00a0000": "1000", "1\u2009000,": "1000", "1\u202f000\u202f000.5": "1000000.5", "1'000": "1000",
        "1{,}000": "1000", "1\\,000": "1000", "1.000.000": "1000000", "in 2020 100 people": "100", "1.000": "1.000", "3,5": "5",
        # exponents, fractions and what follows a number
        "1.5e-3": "0.0015", "2E+3": "2000", "2e\u22123.": "0.002", "3/4": "3/4", "-3/4.": "-3/4", "10/2=5": "5", "50%": "50", "7.": "7",
    }  # fmt: skip
    for text, number in numbers.items():
        assert verifiers.last_number(text) == (number, True), text
    assert verifiers.last_number("none of H2O") == (None, False)
    assert verifiers.whole(" a b\n") == ("a b", True)


@pytest.mark.parametrize("text", [" " * 20_000, "\n" * 20_000 + "</think>", "</think><answer>" * 10_000])
def test_an_answer_that_is_long_and_nearly_of_the_form_does_not_stall(text):
    begin = time.monotonic()
    assert verifiers.tagged(text) == (None, False)
    assert time.monotonic() - begin < 1


def test_your_own_function_sees_items_and_texts():
    prompts = [Item(f"double {i}", 2 * i) for i in range(5)]
    source = verifiers.from_function(
        prompts, lambda items, texts: [t == str(i.data) for i, t in zip(items, texts, strict=True)]
    )
    items = source.draw(0, 5)
    assert items == source.draw(0, 5) != source.draw(1, 5) and sorted(items) == sorted(prompts)
    assert [items.count(p) for items in [source.draw(3, 10)] for p in prompts] == [2] * 5
    assert source.draw(0, 0) == []
    parts = source.score(items[:2], [str(items[0].data), "x"])
    assert parts["correct"].tolist() == [1, 0] and parts["correct"].dtype == np.float32

    both = verifiers.from_function(["a", "b"], lambda items, texts: {"correct": [1, 0], "format": [0.5, 1]})
    assert both.draw(0, 1)[0].data is None
    assert {k: v.tolist() for k, v in both.score(both.draw(0, 2), ["", ""]).items()} == {
        "correct": [1, 0],
        "format": [0.5, 1],
    }


@pytest.mark.parametrize(
    "answer, message",
    [
        ([1.0], "own: 'correct' must be 2 finite numbers, or None to abstain; got .1.0."),
        ([1.0, np.nan], "own: 'correct' must be finite, or None to abstain; got nan for the problem 'a'"),
        ({"format": [1, 1]}, 'parts must hold "correct"; got format'),
        (None, "own: 'correct' must be 2 finite numbers, or None to abstain; got None"),
        ({"correct": [1, 1], "format": ["good", "bad"]}, "own: 'format' must be 2 finite numbers"),
    ],
)
def test_broken_functions_are_refused(answer, message):
    source = verifiers.from_function(["a"], lambda items, texts: answer)
    for score in (source.score, lambda *x: verifiers.judge(source, *x)):
        with pytest.raises(ValueError, match=message):
            score(source.draw(0, 2), ["", ""])


def test_none_abstains_and_is_nan():
    def function(items, texts):
        return {"correct": [1.0, None], "format": [0, 1]}

    source = verifiers.from_function(["a"], function)
    parts = verifiers.judge(source, source.draw(0, 2), ["", ""])
    np.testing.assert_array_equal(parts["correct"], np.float32([1, np.nan]))
    assert parts["format"].tolist() == [0, 1]
    own = verifiers.Source("mine", source.draw, function)  # a source that is written by hand may abstain either way
    np.testing.assert_array_equal(verifiers.judge(own, own.draw(0, 2), ["", ""])["correct"], parts["correct"])


def test_a_verifier_that_raises_names_the_problem():
    source = verifiers.from_function(["one", "two"], lambda items, texts: [1 / len(text) for text in texts])
    items = sorted(source.draw(0, 2))
    message = r"own: the verifier raised ZeroDivisionError: .* \(problem 'two', answer ''\)"
    with pytest.raises(verifiers.VerifierError, match=message):
        verifiers.judge(source, items, ["1", ""])
    with pytest.raises(verifiers.VerifierError, match='mine: parts must hold "correct"; got NoneType'):
        verifiers.judge(verifiers.Source("mine", source.draw, lambda items, texts: None), items, ["", ""])


def test_answers_that_never_end_break_or_shout_are_wrong_and_the_next_ones_are_judged():
    judge = grading.grader("python", 1, 1.0)
    pairs = [
        (4, "2 + 2"),
        (4, "9**9**9**9"),
        (4, "oops"),
        (4, "print('5') or 4"),
        (4, "__import__('os')._exit(1)"),
        (4, "4"),
    ]
    start = time.monotonic()
    assert judge(pairs) == [1, 0, 0, 1, 0, 1]
    assert time.monotonic() - start < 60
    scores = []
    threads = [threading.Thread(target=lambda i=i: scores.append(judge([(i, str(i))] * 3))) for i in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert scores == [[1, 1, 1]] * 3


def test_what_the_judging_process_cannot_read_is_no_wrong_answer(monkeypatch):
    module = types.ModuleType("only_here")  # which that process cannot import
    module.Known = type("Known", (), {"__module__": "only_here"})
    monkeypatch.setitem(sys.modules, "only_here", module)
    judge = grading.grader("python", 1, 5.0)
    with pytest.raises(ValueError, match="python: what is known cannot be read: No module named 'only_here'"):
        judge([(module.Known(), "4")])
    assert judge([(4, "4")]) == [1]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'reasoning-gym'"):
        verifiers.reasoning_gym("countdown")
    with pytest.raises(ValueError, match="pip install 'math-verify"):
        verifiers.math_verify(["1"], ["1"])


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    source = verifiers.reasoning_gym("countdown", min_numbers=3, max_numbers=3)
    items = source.draw(0, 4)
    assert items == source.draw(0, 4) and items[0] != source.draw(1, 1)[0]
    assert items[0].prompt.endswith(verifiers.INSTRUCTION)
    right = [f"<think>so</think><answer>{item.data['answer']}</answer>" for item in items]
    parts = source.score(items, right)
    assert all((parts[part] == 1).all() for part in ("correct", "format", "score"))
    wrong = ["", "<answer>1+1</answer>", "<think>so</think><answer>9**9**9**9</answer>", items[3].data["answer"]]
    parts = source.score(items, wrong)
    assert not parts["correct"].any() and 0 < parts["score"][1] < 0.1 and parts["format"].tolist() == [0, 0, 1, 0]
    mild = verifiers.reasoning_gym("countdown", threshold=0.05, extract=verifiers.whole, min_numbers=3, max_numbers=3)
    assert mild.score(items[:2], ["1+1", "nonsense"])["correct"].tolist() == [1, 0]

    other = verifiers.reasoning_gym("chain_sum", seed=1, size=100, instruction="")
    asked = {item.prompt for item in verifiers.reasoning_gym("chain_sum", size=100, instruction="").draw(0, 200)}
    assert not asked & {item.prompt for item in other.draw(0, 200)}
    for settings, message in [
        ({"dataset": "chain_sums"}, "dataset must be one of .*chain_sum"),
        ({"dataset": "chain_sum", "nonsense": 1}, "reasoning_gym chain_sum: .*nonsense"),
        ({"dataset": "chain_sum", "threshold": 0.0}, "threshold must be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            verifiers.reasoning_gym(**settings)


@pytest.mark.parametrize(
    "known, answer, right",
    [
        ("5", "The answer is 5", 1), ("5", "Therefore we get 5", 1), ("5", "The answer is 5.", 1), ("5", "5.", 1), ("5", "x=5", 1),
        ("5", "The answer is 6", 0), ("5", "The answer is \u22125", 0), ("-5", "The answer is \u22125", 1), ("-5", "\u22125", 1),
        ("1234", "That makes 1,234 apples.", 1), ("1000000", "1\u202f000\u202f000", 1), ("1000000", "It is 1 000 000", 1),
        ("0.0015", "1.5e-3", 1), ("0.5", "1/2", 1), ("2", "pi / 2", 0), ("2", "1/2", 0), (r"\frac12", r"\frac{1}{2}", 1),
        (r"\{2,3\}", "2 or 3", 1), (r"\sqrt{2}", "2^{1/2}", 1),
    ],
)  # fmt: skip
def test_math_verify_reads_sentences_and_expressions(known, answer, right):
    pytest.importorskip("math_verify")
    assert grading_server._math_verify(None)[0](known)(answer) == right


def test_math_verify():
    pytest.importorskip("math_verify")
    source = verifiers.math_verify(["half?", "root?", "many?"], ["1/2", r"\sqrt{2}", "1,234"], extract=verifiers.boxed)
    half, root, many = (
        sorted(source.draw(0, 3))[0],
        *[i for d in (r"\sqrt{2}", "1,234") for i in source.draw(0, 3) if i.data == d],
    )
    judged = [
        (half, "0.5", 1),
        (half, r"\frac12", 1),
        (half, "0.51", 0),
        (root, "2^{1/2}", 1),
        (many, "1234", 1),
        (many, "", 0),
    ]
    items, answers, wanted = zip(*judged, strict=True)
    parts = source.score(items, [rf"so \boxed{{{answer}}}" for answer in answers])
    assert parts["correct"].tolist() == list(wanted) and (parts["format"] == 1).all()
    parts = source.score([half], ["1/2"])
    assert parts["correct"].tolist() == parts["format"].tolist() == [0]
    with pytest.raises(ValueError, match="as many; got 1 and 2"):
        verifiers.math_verify(["a"], ["1", "2"])
    with pytest.raises(ValueError, match="as many; got 2 and 1"):
        source.score(source.draw(0, 2), ["1"])
    with pytest.raises(ValueError, match="what is known cannot be read: '' is no mathematics"):
        broken = verifiers.math_verify(["a"], [""], extract=verifiers.whole)
        broken.score(broken.draw(0, 1), ["1"])
