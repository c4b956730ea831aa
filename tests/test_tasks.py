"""Tasks: demonstrations, verifiers against plain Python on decoded text (all answers of small tasks), and what is refused."""

import functools
import itertools
import re
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import envs
from jrl.lm import tasks
from jrl.lm.tasks import END, PAD
from jrl.lm.tasks.countdown import Expression, value
from jrl.run.evaluate import evaluate

LARGE = [
    ("modular_addition", {}),
    ("addition", {"digits": 9, "shortest": 1}),
    ("addition", {"digits": 3, "reverse": True}),
    ("reverse", {"shortest": 2}),
    ("sort", {"shortest": 2}),
    ("parity", {"shortest": 3, "chained": 0.5}),
    ("countdown", {"numbers": 4, "shortest": 2}),
]
SMALL = [
    ("modular_addition", {"modulus": 3}),
    ("addition", {"digits": 1}),
    ("addition", {"digits": 1, "reverse": True}),
    ("reverse", {"length": 3, "letters": 2, "shortest": 1}),
    ("sort", {"length": 3, "letters": 2, "shortest": 1}),
    ("parity", {"length": 3, "shortest": 1}),
    ("countdown", {"numbers": 2, "largest": 3, "target": 10}),
]


def label(x):
    return x if isinstance(x, str) else ",".join(f"{k}={v}" for k, v in x.items())


@functools.cache
def compiled(name, settings):
    """A task, 256 of its problems with their demonstrations, and its verifier over pairs of a problem and an answer."""
    task = tasks.make(name, **dict(settings))
    problems, shown = jax.jit(lambda keys: over_draws(task, keys))(jax.random.split(jax.random.key(0), 256))
    return task, problems, np.array(shown), jax.jit(jax.vmap(task.verify))


def over_draws(task, keys):
    problems = jax.vmap(task.draw)(keys)
    return problems, jax.vmap(task.demonstrate)(problems)


def setup(name, settings):
    return compiled(name, tuple(settings.items()))


def mask_of(tokens):
    ends = np.cumsum(tokens == END, axis=-1) - (tokens == END)
    return ends == 0


def every_pair(verify, problems, tokens):
    """Parts ``[M, N]`` of each of N answers to each of M problems."""
    m, n = problems.prompt.shape[0], len(tokens)
    repeated = jax.tree.map(lambda x: np.repeat(x, n, axis=0), problems)
    tokens = np.tile(tokens, (m, 1))
    return {part: np.array(x).reshape(m, n) for part, x in verify(repeated, tokens, mask_of(tokens)).items()}


def first(problems, count):
    return jax.tree.map(lambda x: x[:count], problems)


# Plain verifiers: (prompt's text, answer's text) -> (correct, format), for answers that ended.


def plain_modular(prompt, answer, modulus=11, **_):
    a, b = map(int, re.findall(r"\d+", prompt))
    form = answer in map(str, range(modulus))
    return form and int(answer) == (a + b) % modulus, form


def plain_addition(prompt, answer, reverse=False, **_):
    a, b = prompt.removesuffix("=").split("+")
    return (answer[::-1] if reverse else answer) == str(int(a) + int(b)), bool(re.fullmatch(r"\d+", answer))


def plain_reverse(prompt, answer, **_):
    return answer == prompt[:-1][::-1], bool(re.fullmatch("[a-z]+", answer))


def plain_sort(prompt, answer, **_):
    return answer == "".join(sorted(prompt[:-1])), bool(re.fullmatch("[a-z]+", answer))


def plain_parity(prompt, answer, **_):
    bits = prompt[:-1]
    return answer.endswith(str(bits.count("1") % 2)), bool(re.fullmatch(f"[01]{{{len(bits)}}}", answer))


def plain_countdown(prompt, answer, **_):
    given, target = prompt.split(" = ")
    if not re.fullmatch(r"\d+( [-+*] \d+)*", answer):
        return False, False
    return Counter(answer.split()[::2]) == Counter(given.split()) and eval(answer) == int(target), True


PLAIN = {
    "modular_addition": plain_modular,
    "addition": plain_addition,
    "reverse": plain_reverse,
    "sort": plain_sort,
    "parity": plain_parity,
    "countdown": plain_countdown,
}


def plainly(task, name, settings, prompt, tokens):
    if END not in tokens:
        return False, False
    blank = " " if name in ("modular_addition", "countdown") else ""
    said = tokens[: tokens.index(END)]
    asked = [token for token in np.asarray(prompt).tolist() if token != PAD]
    return PLAIN[name](*(blank.join(task.symbols[t] for t in text) for text in (asked, said)), **settings)


@pytest.mark.thorough(5)
@pytest.mark.parametrize("name, settings", LARGE, ids=label)
def test_demonstrations_are_correct_and_changes_of_them_are_judged_as_plain_python_judges(name, settings):
    task, problems, shown, verify = setup(name, settings)
    parts = verify(problems, shown, mask_of(shown))
    assert (parts["correct"] == 1).all()
    chained = problems.answer.chained if name == "parity" else np.ones(256, bool)
    for part in parts:
        assert (np.asarray(parts[part])[chained] == 1).all(), part

    rng = np.random.default_rng(0)
    changed, place = shown.copy(), rng.integers(0, task.answer_length, 256)
    changed[np.arange(256), place] = rng.integers(0, len(task.symbols), 256)
    parts = verify(problems, changed, mask_of(changed))
    for i, prompt in enumerate(np.array(problems.prompt)):
        wanted = plainly(task, name, settings, prompt, changed[i].tolist())
        assert (parts["correct"][i], parts["format"][i]) == wanted, (prompt, changed[i])
    for part in parts.values():
        assert part.dtype == jnp.float32 and (part >= 0).all() and (part <= 1).all()

    no_end = np.where(shown <= END, 2, shown)
    parts = verify(problems, no_end, mask_of(no_end))
    assert not parts["correct"].any() and not parts["format"].any()


@pytest.mark.parametrize("name, settings", LARGE, ids=label)
def test_what_lies_behind_the_end_does_not_matter(name, settings):
    task, problems, shown, verify = setup(name, settings)
    mask = mask_of(shown)
    np.testing.assert_array_equal(tasks.answer_mask(jnp.asarray(shown)), mask)
    noise = np.random.default_rng(0).integers(0, len(task.symbols), shown.shape, np.int32)
    given = verify(problems, np.where(mask, shown, noise), mask)
    jax.tree.map(np.testing.assert_array_equal, given, verify(problems, shown, mask))


@pytest.mark.parametrize("name, settings", LARGE, ids=label)
def test_prompts_are_padded_on_the_left_and_keys_are_used_once(name, settings, key):
    task, problems, _, _ = setup(name, settings)
    prompt, valid = np.array(problems.prompt), np.array(problems.valid)
    np.testing.assert_array_equal(valid, np.maximum.accumulate(prompt != PAD, axis=1))
    np.testing.assert_array_equal(valid, prompt != PAD)
    sizes = set(valid.sum(1).tolist())
    assert (len(sizes) > 1) == ("shortest" in settings) and max(sizes) == task.prompt_length
    assert len({tuple(row) for row in prompt.tolist()}) > 50
    with jax.debug_key_reuse(True):
        jax.jit(task.draw).trace(key)


@pytest.mark.parametrize("name, settings", SMALL, ids=label)
def test_every_answer_to_small_problems_is_judged_as_plain_python_judges(name, settings):
    task, problems, _, verify = setup(name, settings)
    problems = first(problems, 2)
    tokens = np.array(list(itertools.product(range(len(task.symbols)), repeat=task.answer_length)), np.int32)
    parts, rows = every_pair(verify, problems, tokens), tokens.tolist()
    for i, prompt in enumerate(np.array(problems.prompt)):
        plain = np.array([plainly(task, name, settings, prompt, row) for row in rows])
        np.testing.assert_array_equal(parts["correct"][i], plain[:, 0])
        np.testing.assert_array_equal(parts["format"][i], plain[:, 1])
        assert plain[:, 0].any() and not plain[:, 0].all()
    if name not in ("parity", "countdown"):  # there the share of steps or numbers that are right
        np.testing.assert_array_equal(parts["close"] == 1, parts["correct"] == 1)


def test_prompts_read_as_people_expect():
    for (name, settings), form in zip(
        LARGE,
        [r"\d+ \+ \d+ =", r"\d{1,9}\+(0|[1-9]\d*)=", r"[1-9]\d\d\+[1-9]\d\d=", "[a-j]{2,6}=", "[a-j]{2,6}=", "[01]{3,8}=", r"(\d+ ){2,4}= \d+"],
        strict=True,
    ):  # fmt: skip
        task, problems, _, _ = setup(name, settings)
        for prompt in np.array(problems.prompt)[:16]:
            text = tasks.decode(task, prompt)
            assert re.fullmatch(form, text), text
            np.testing.assert_array_equal(tasks.encode(task, text), prompt[prompt != PAD])


def test_parts_by_hand():
    def judge(name, settings, prompt, answer):
        """The parts of a text, whose problem is found among the drawn ones."""
        task, problems, _, verify = setup(name, settings)
        padded = np.append(np.zeros(task.prompt_length, np.int32), tasks.encode(task, prompt))[-task.prompt_length :]
        at = int(np.flatnonzero((np.array(problems.prompt) == padded[None]).all(1))[0])
        tokens = np.append(tasks.encode(task, answer), np.zeros(task.answer_length, np.int32))[: task.answer_length]
        repeated = jax.tree.map(lambda x: np.repeat(x[at : at + 1], 256, axis=0), problems)
        tokens = np.tile(tokens, (256, 1))  # as many as the verifier is compiled for
        return {part: round(float(x[0]), 3) for part, x in verify(repeated, tokens, mask_of(tokens)).items()}

    small = ("addition", {"digits": 1})
    assert judge(*small, "7+8=", "15<end>") == {"correct": 1, "format": 1, "close": 1}
    assert judge(*small, "7+8=", "16<end>") == {"correct": 0, "format": 1, "close": 0.667}
    assert judge(*small, "7+8=", "1<end>") == {"correct": 0, "format": 1, "close": 0.333}
    assert judge(*small, "7+8=", "15=") == {"correct": 0, "format": 0, "close": 0.667}
    chain = ("parity", {"length": 3, "shortest": 1})
    assert judge(*chain, "011=", "010<end>") == {"correct": 1, "format": 1, "close": 1}
    assert judge(*chain, "011=", "000<end>") == {"correct": 1, "format": 1, "close": 0.75}
    assert judge(*chain, "011=", "011<end>") == {"correct": 0, "format": 1, "close": 0.75}
    assert judge(*chain, "011=", "0<end>") == {"correct": 1, "format": 0, "close": 0.25}
    assert judge(*chain, "011=", "=0<end>") == {"correct": 1, "format": 0, "close": 0}
    few = ("countdown", {"numbers": 2, "largest": 3, "target": 10})
    assert judge(*few, "3 2 = 6", "2 * 3 <end>") == {"correct": 1, "format": 1, "close": 1}
    assert judge(*few, "3 2 = 6", "3 * 2 <end>") == {"correct": 1, "format": 1, "close": 1}
    assert judge(*few, "3 2 = 6", "3 + 3 <end>") == {"correct": 0, "format": 1, "close": 0.5}
    assert judge(*few, "3 2 = 6", "6 <end>") == {"correct": 0, "format": 1, "close": 0}
    assert judge(*few, "3 2 = 6", "3 2 <end>") == {"correct": 0, "format": 0, "close": 1}


def test_countdown_takes_every_solution_and_nothing_else():
    settings = {"numbers": 4, "shortest": 2}
    task, problems, _, verify = setup("countdown", settings)
    at = [i for i in range(256) if problems.answer[0].size[i] == 3][:3]
    problems = jax.tree.map(lambda x: x[np.array(at)], problems)
    for i, prompt in enumerate(np.array(problems.prompt)):
        given = tasks.decode(task, prompt).split()[:3]
        texts = [f"{a} {s} {b} {r} {c}" for a, b, c in itertools.product(given, repeat=3) for s in "+-*" for r in "+-*"]
        texts += [f"{a} {s} {b}" for a, b in itertools.product(given, repeat=2) for s in "+-*"]
        texts += [f"{text} {s} {a}" for text in texts[:243] for s in "+-*" for a in given]
        rows = [np.append(tasks.encode(task, text), END) for text in texts]
        tokens = np.array([np.pad(row, (0, task.answer_length - len(row))) for row in rows], np.int32)
        wanted = [plain_countdown(tasks.decode(task, prompt), text)[0] for text in texts]
        correct = every_pair(verify, jax.tree.map(lambda x, i=i: x[i : i + 1], problems), tokens)["correct"][0]
        np.testing.assert_array_equal(correct, wanted)
        assert 1 <= sum(wanted) < 40


def test_values_of_expressions_are_those_of_python():
    rng = np.random.default_rng(0)
    numbers, signs = rng.integers(1, 21, (200, 5)), rng.integers(0, 3, (200, 4))
    size = rng.integers(1, 6, 200)
    given = jax.jit(jax.vmap(value))(Expression(*(jnp.asarray(x, jnp.int32) for x in (numbers, signs, size))))
    for i in range(200):
        text = str(numbers[i, 0]) + "".join(f"{'+-*'[signs[i, j]]}{numbers[i, j + 1]}" for j in range(size[i] - 1))
        assert given[i] == eval(text), text


@pytest.mark.parametrize(
    "name, settings, symbols, chance",
    [("modular_addition", {}, 11, 1 / 11), ("parity", {"shortest": 3, "chained": 0.5}, 2, 1 / 2)],
)
def test_chance(name, settings, symbols, chance):
    _, problems, shown, verify = setup(name, settings)
    rng, scores = np.random.default_rng(1), []
    for _ in range(16):
        tokens = rng.integers(2, 2 + symbols, shown.shape, np.int32)
        tokens[:, -1] = END
        scores.append(verify(problems, tokens, mask_of(tokens))["correct"].mean())
    assert abs(np.mean(scores) - chance) < 4 * np.sqrt(chance * (1 - chance) / 4096)


def played(task, problem_key, say):
    """Observations, rewards and ends of an episode in which the n-th answer token is ``say(problem)[n]``, else an end token."""
    env = envs.strict(tasks.as_environment(task))

    def steps(key):
        obs, state = env.reset(key)
        tokens = say(state.problem)
        script = jnp.concatenate([jnp.full(task.prompt_length - 1, END), tokens])

        def step(state, _):
            action = script[state.position]
            obs, state, reward, terminated, truncated = env.step(key, state, action)
            return state, (obs, reward, terminated, truncated)

        out = jax.lax.scan(step, state, length=env.time_limit)[1]
        return jnp.append(obs, out[0]), *out[1:]

    return [np.array(x) for x in jax.jit(steps)(problem_key)]


def test_an_episode_reads_the_prompt_and_then_what_was_said(key):
    settings = {"shortest": 2}
    task, problems, shown, _ = setup("reverse", settings)
    keys = jax.random.split(jax.random.key(0), 256)
    for i in (0, 1, 2):
        prompt, answer = problems.prompt[i][problems.valid[i]], shown[i][mask_of(shown)[i]]
        obs, reward, terminated, truncated = played(task, keys[i], task.demonstrate)
        episode = len(prompt) + len(answer) - 1
        np.testing.assert_array_equal(obs[: episode + 1], [*prompt, *answer])
        assert reward[:episode].sum() == reward[episode - 1] == 1 and not truncated.any()
        assert terminated[: episode - 1].sum() == 0 and terminated[episode - 1]

    _, reward, terminated, _ = played(task, keys[0], lambda problem: jnp.full(task.answer_length, 2))
    start = task.prompt_length - int(problems.valid[0].sum())
    last = task.prompt_length + task.answer_length - 2 - start
    assert terminated[: last + 1].sum() == 1 and terminated[last] and reward[: last + 1].sum() == 0


def test_evaluation_of_an_agent_that_can_add_and_of_one_that_cannot(key):
    task = tasks.make("modular_addition", modulus=5)
    env = envs.strict(tasks.as_environment(task))
    assert envs.observation_spec(env) == jax.ShapeDtypeStruct((), jnp.int32)
    equals = len(task.symbols) - 1

    def agent(shift, obs, key=None, memory=None):
        memory = jnp.zeros(4, jnp.int32) if memory is None else memory
        seen = jnp.append(memory[1:], obs)
        return jnp.where(obs == equals, 2 + (seen[0] + seen[2] - 4 + shift) % 5, END), seen

    scores = [
        jax.jit(lambda k, s=shift: evaluate(SimpleNamespace(env=env, act=agent), s, k, 8))(key) for shift in (0, 1)
    ]
    assert (scores[0].returns == 1).all() and (scores[1].returns == 0).all()
    assert all((score.lengths == 5).all() and score.finished.all() for score in scores)


OWN = """
import jax, jax.numpy as jnp
from jrl.lm.tasks import MARKS, Problem, answer_mask
symbols, prompt_length, answer_length = (*MARKS, "x"), 1, 2
def draw(key):
    return Problem(jnp.full(1, 2, jnp.int32), jnp.ones(1, bool), ())
def demonstrate(problem):
    return jnp.array([2, 1], jnp.int32)
def verify(problem, tokens, mask):
    right = (tokens[0] == 2) & (tokens[1] == 1)
    return {"correct": right.astype(jnp.float32), "format": jnp.float32(1)}
"""


@pytest.mark.parametrize("imports", ["", "from jrl.lm.tasks import *\n"])
def test_a_task_in_a_file(imports, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(imports + OWN)
    task = tasks.make(str(path))
    assert task.name == "mine" and tasks.decode(task, [2, 1, 2]) == "x"
    with pytest.raises(ValueError, match="takes no settings, since it has no make"):
        tasks.make(str(path), size=3)
    path.write_text(
        "from jrl.lm import tasks\ndef make(base=3):\n    return tasks.make('modular_addition', modulus=base)\n"
    )
    assert tasks.make(str(path), base=5).name == "modular_addition-5"
    with pytest.raises(ValueError, match="has no setting 'modulus'; it has: base"):
        tasks.make(str(path), modulus=5)


@pytest.mark.parametrize(
    "edit, message",
    [
        (("def demonstrate", "def show"), "must define demonstrate"),
        (('(*MARKS, "x")', "5"), "mine: symbols must be a tuple of texts; got 5"),
        (('*MARKS, "x"', "*MARKS, 5"), "mine: symbols must be a tuple of texts"),
        (('"x"), 1, 2', '"x"), 1, -2'), "mine: answer_length must be an integer of at least 1; got -2"),
        (("def verify", "verify = 5\ndef check"), "mine: verify must be a function; got 5"),
        (
            ("def draw", "def make():\n    return None\ndef draw"),
            "mine.py: a task must be a jrl.lm.tasks.Task; got NoneType",
        ),
        (("def draw", "def make():\n    raise SystemExit(0)\ndef draw"), r"mine.py, line \d+: SystemExit: 0"),
        (('*MARKS, "x"', '"x", *MARKS'), "first two symbols"),
        (('*MARKS, "x"', '*MARKS, "x", "x"'), "symbols must differ"),
        (
            ("jnp.full(1, 2, jnp.int32)", "jnp.full(3, 2, jnp.int32)"),
            r"draw's prompt must be int32 \[1\], got int32 \[3\]",
        ),
        (("jnp.ones(1, bool)", "jnp.ones(1)"), r"draw's valid must be bool \[1\], got float32 \[1\]"),
        (("[2, 1], jnp.int32", "[2], jnp.int32"), r"demonstrate's answer must be int32 \[2\], got int32 \[1\]"),
        (('"format"', '"form"'), 'a dict with "correct" and "format"'),
        (("right.astype(jnp.float32)", "right"), r"verify's 'correct' must be float32 \[\], got bool \[\]"),
        (("tokens[0]", "token[0]"), "verify cannot be traced: NameError: name 'token' is not defined"),
    ],
)
def test_a_broken_task_is_refused(tmp_path, edit, message):
    path = tmp_path / "mine.py"
    path.write_text(OWN.replace(*edit))
    with pytest.raises(ValueError, match=message):
        tasks.make(str(path))


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("modular", {}, "did you mean modular_addition"),
        ("zzzzzz", {}, "known: addition, countdown"),
        ("missing.py", {}, "no such task file"),
        ("modular_addition", {"base": 3}, "has no setting 'base'; it has: modulus"),
        ("modular_addition", {"modulus": 1}, "modulus must be an integer of at least 2; got 1"),
        ("modular_addition", {"modulus": 10**12}, r"modulus must be between 2 and 1e\+06; got 1e\+12"),
        ("parity", {"length": 10**12}, r"length must be between 1 and 1e\+06; got 1e\+12"),
        ("countdown", {"target": 10**12}, r"target must be between 1 and 1e\+06; got 1e\+12"),
        ("addition", {"digits": 10}, "digits must be at most 9"),
        ("reverse", {"length": 3, "shortest": 4}, "shortest must be at most length, 3; got 4"),
        ("sort", {"letters": 27}, "letters must be at most 26"),
        ("parity", {"chained": 1.5}, "chained must be between 0 and 1"),
        ("countdown", {"numbers": 1}, "numbers must be an integer of at least 2"),
        ("countdown", {"numbers": 7}, "numbers must be between 2 and 6"),
        ("countdown", {"target": 50}, "target must be an integer of at least 60"),
        ("countdown", {"numbers": 6, "largest": 40, "target": 240}, r"below 2 \*\* 31"),
    ],
)
def test_wrong_names_and_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        tasks.make(name, **settings)


def test_register_and_encode():
    with pytest.raises(ValueError, match="registered already"):
        tasks.register("sort", tasks.make)
    task = tasks.make("modular_addition")
    assert tasks.encode(task, "10+3=").tolist() == tasks.encode(task, " 10 + 3 = ").tolist() == [12, 13, 5, 14]
    assert tasks.decode(task, [0, 3, 2]) == "1 0" and tasks.decode(task, [12, 1, 5]) == "10"
    assert tasks.decode(task, [3, 0, 2]) == "1 <pad> 0"
    with pytest.raises(ValueError, match="no symbol for 'a'"):
        tasks.encode(task, "1a")
