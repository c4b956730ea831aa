"""What the cases of ``inputs`` are made of: files and words that are wrong, each in a way of its own."""

from collections.abc import Iterator

from attacks import language_model

# Environments

ENVIRONMENT = """
import jax
import jax.numpy as jnp
from jrl import envs

action_space = envs.Discrete(2)


def reset(key):
    return jnp.zeros(2), jnp.int32(0)


def step(key, state, action):
    t = state + 1
    return jnp.zeros(2), t, 1.0, t >= 5, t >= 9
"""
HELPER = "LENGTH = 5\n"
MAKE = ENVIRONMENT + "\n\ndef make(steps=5):\n    return envs.Environment('mine', reset, step, action_space, 9)\n"
SPACE, RESET = "action_space = envs.Discrete(2)", "    return jnp.zeros(2), jnp.int32(0)"
STEP = "    return jnp.zeros(2), t, 1.0, t >= 5, t >= 9"
WHOLE = "envs.Environment('mine', reset, step, action_space, 9)"

# What takes the place of a line, which must be refused.
LINES: dict[str, tuple[str, ...]] = {
    SPACE: (
        "", "action_space = None", "action_space = 2", "action_space = envs.Discrete(0)", "action_space = envs.Discrete(-1)",
        "action_space = envs.Discrete(2.5)", "action_space = envs.Discrete('2')", "action_space = envs.Discrete(None)",
        "action_space = envs.Discrete(10**30)", "action_space = envs.Discrete(10**12)", "action_space = envs.Discrete",
        "action_space = envs.MultiDiscrete(())", "action_space = envs.MultiDiscrete((2, 0))",
        "action_space = envs.MultiDiscrete((2, 'x'))", "action_space = envs.MultiDiscrete(3)",
        "action_space = envs.MultiDiscrete(((2, 2), (2,)))", "action_space = envs.Box((), ())",
        "action_space = envs.Box((0.0,), (-1.0,))", "action_space = envs.Box((float('nan'),), (1.0,))",
        "action_space = envs.Box((0.0,), (1.0, 2.0))", "action_space = envs.Box(0.0, 1.0)", "action_space = envs.Box('a', 'b')",
        "action_space = envs.Box((1j,), (2j,))", "action_space = envs.Box((None,), (1.0,))",
        "action_space = {'n': 2}", "action_space = jnp.zeros(3)", "import gymnax\naction_space = gymnax.environments.spaces.Discrete(0)",
        "def action_space(): return envs.Discrete(2)", "action_space = [envs.Discrete(2)]", "raise KeyboardInterrupt2",
    ),
    RESET: (
        "    return jnp.zeros(2)", "    return None", "    pass", "    return jnp.zeros(2), jnp.int32(0), 1", "    return {}['x']",
        "    return reset(key)", "    raise SystemExit(0)", "    import sys; sys.exit(0)", "    import sys; sys.exit('bye')",
        "    raise KeyError('x')", "    raise StopIteration", "    raise BaseException('mine')", "    assert False", "    1 / 0",
        "    return 'obs', jnp.int32(0)", "    return jnp.zeros(2), 'state'", "    return jnp.zeros(2), object()",
        "    return jnp.array(0), jnp.int32(0)", "    return {'a': jnp.zeros(2)}, jnp.int32(0)",
        "    return jnp.zeros(2, complex), jnp.int32(0)", "    return jnp.zeros((0,)), jnp.int32(0)",
        "    if key[0] > 0: return 1\n    return jnp.zeros(2), jnp.int32(0)", "    return jnp.zeros(2) + jnp.zeros(3), jnp.int32(0)",
        "    return jnp.zeros(10**12), jnp.int32(0)", "    return jnp.zeros(10**30), jnp.int32(0)", "    return jnp.zeros(-1), jnp.int32(0)",
        "    import numpy as np\n    return np.random.rand(key), jnp.int32(0)", "    return jnp.zeros(2), {1: jnp.int32(0), 'a': jnp.int32(1)}",
        "    raise ValueError('line one\\nline two\\nline three')", "    raise ValueError('☃' * 100000)", "    raise ValueError",
        "    yield jnp.zeros(2)", "    return lambda: 1", "    return jax.random.split(key, 10**12), jnp.int32(0)",
    ),
    "def reset(key):": ("def reset():", "def reset(key, more):", "reset = 5\ndef other(key):", "async def reset(key):", "class reset:\n  def f(key):"),
    "def step(key, state, action):": ("def step(state, action):", "def step():", "step = None\ndef other(key, state, action):"),
    STEP: (
        "    return jnp.zeros(2), t, 1.0, t >= 5", "    return jnp.zeros(2), t, 1.0, t >= 5, {}", "    return None",
        "    return jnp.zeros(2), t, 1j, t >= 5, t >= 9", "    return jnp.zeros(2), t, 'reward', t >= 5, t >= 9",
        "    return jnp.zeros(2), t, None, t >= 5, t >= 9", "    return jnp.zeros(2), t, jnp.ones(1), t >= 5, t >= 9",
        "    return jnp.zeros(2), t, 1.0, 0.0, t >= 9", "    return jnp.zeros(2), t, 1.0, t, t >= 9",
        "    return jnp.zeros(3), t, 1.0, t >= 5, t >= 9", "    return jnp.zeros(2), t + 0.5, 1.0, t >= 5, t >= 9",
        "    return jnp.zeros(2), (t, t), 1.0, t >= 5, t >= 9", "    return jnp.zeros(2, complex), t, 1.0, t >= 5, t >= 9",
        "    if t > 3: return 1", "    while t < 10: t = t + 1", "    raise SystemExit(3)", "    return step(key, state, action)",
        "    return jnp.zeros(2), float(t), 1.0, t >= 5, t >= 9", "    return jnp.zeros(2), t, int(action), t >= 5, t >= 9",
        "    return jnp.zeros(2), t, jnp.array([1.0, 2.0])[t:], t >= 5, t >= 9", "    return state.nope",
        "    return jnp.zeros(2), t, key, t >= 5, t >= 9", "    return [jnp.zeros(2), t, 1.0, t >= 5, t >= 9]",
        "    return jnp.zeros(2), t, 1.0, t >= 5, t >= 9, {}", "    return envs.nope",
    ),
    WHOLE: (
        "None", "'CartPole-v1'", "5", "{}", "envs", "envs.Environment", "make", "reset", "(reset, step, action_space)",
        "envs.Environment('mine', None, step, action_space)", "envs.Environment('mine', reset, 'step', action_space)",
        "envs.Environment('mine', reset, step, action_space, 'five')", "envs.Environment('mine', reset, step, action_space, 0)",
        "envs.Environment('mine', reset, step, action_space, -1)", "envs.Environment('mine', reset, step, action_space, 1.5)",
        "envs.Environment('mine', reset, step, action_space, True)", "envs.Environment('mine', reset, step, action_space, 9, -1)",
        "envs.Environment(None, reset, step, None)", "make(steps)", "sys.exit(0)", "1 / 0", "{}['x']", "[][0]", "envs.make('nope')",
        "envs.make('CartPole-v1', gravity=float('nan'))", "__import__('gymnasium').make('CartPole-v1')", "__import__('nope')",
        "__import__('gymnax').make('CartPole-v1')", "__import__('gymnax').make('CartPole-v1')[0]", "object()", "NotImplemented",
        "type('E', (), {'reset': 1, 'step': 2, 'action_space': 3})()", "exec('raise SystemExit(0)')", "eval('1 +')",
        "__import__('os').chdir('/nope')", "jnp.zeros(2)", "iter([1])", "(_ for _ in ()).throw(KeyboardInterrupt2)",
    ),
}  # fmt: skip
TEXTS = (
    "", "\n", "oops oops", "def", "import nope", "import nope.nope", "1 / 0", "raise SystemExit(0)", "import sys; sys.exit()",
    "import sys; sys.exit('a text')", "raise KeyError", "raise Exception('two\\nlines')", "x = " + "(" * 300, "x = [" * 200,
    "def f(): return f()\nf()", "\t x", "from jrl.envs import *", "from jrl.envs.probes import *", "import os; os.chdir('/nope')",
    "action_space = 1", "reset = step = action_space = None", "make = 5", "make = None", "def make(a, b): pass", "class make: pass",
    "async def make(): pass", "def make(*, a): pass", "make = lambda x: x", "del make", "x = '\\udc80'", "# -*- coding: nope -*-",
    "def make(**more): return more", "def make(*more): return more", "return 5", "yield 5", "\0", "assert 0, 'no'",
    "raise BaseException('mine')", "raise GeneratorExit", "import this_is_not_there as helper", "from helper import nope",
    "import helper; helper.nope", "exec('x' * 10**6)", "x = 9**9**9 if False else nope",
)  # fmt: skip
# With words for --env-params.
WITH_PARAMETERS = (
    (ENVIRONMENT, "steps=3"), (MAKE, "nope=3"), (MAKE, "steps"), (MAKE, "steps="), (MAKE, "=3"), (MAKE, "steps=x"),
    (MAKE, "steps=1.5"), (MAKE, "steps=nan"), (MAKE, "steps=true"), (MAKE, "steps=1e400"), (MAKE, "steps=3 nope=1"),
    (MAKE.replace("steps=5", "steps"), ""), (MAKE.replace("steps=5", "*, steps"), ""),
)  # fmt: skip
WORKING = (
    ENVIRONMENT, MAKE, "import helper\n" + ENVIRONMENT.replace(">= 5", ">= helper.LENGTH"),
    "from helper import LENGTH\n" + ENVIRONMENT.replace(">= 5", ">= LENGTH"),
    ENVIRONMENT.replace(RESET, "    import helper\n    return jnp.zeros(2), jnp.int32(helper.LENGTH - 5)"),
)  # fmt: skip


def environments() -> Iterator[tuple[str, str, bool]]:
    """Text of a file, words for its parameters, and whether it may work."""
    for line, others in LINES.items():
        text = MAKE if line == WHOLE else ENVIRONMENT
        assert line in text
        for other in others:
            yield ("import sys\n" + text).replace(line, other), "", False
    for text in TEXTS:
        yield text, "", False
    for limit in ("'five'", "0", "-1", "1.5", "True", "float('nan')", "[9]", "jnp.ones(3)"):
        yield f"{ENVIRONMENT}\ntime_limit = {limit}\n", "", False
    for text, params in WITH_PARAMETERS:
        yield text, params, False
    for text in WORKING:
        yield text, "", True


# Tasks

TASK = """
import jax
import jax.numpy as jnp
from jrl.lm import tasks

symbols = ("<pad>", "<end>", "0", "1")
prompt_length = 1
answer_length = 2


def draw(key):
    bit = jax.random.randint(key, (), 0, 2)
    return tasks.Problem((2 + bit)[None], jnp.ones(1, bool), bit)


def verify(problem, tokens, mask):
    right = (tokens[0] == 2 + problem.answer).astype(jnp.float32)
    return {"correct": right, "format": right}


def demonstrate(problem):
    return jnp.stack([2 + problem.answer, 1]).astype(jnp.int32)
"""
TASK_LINES = {
    'symbols = ("<pad>", "<end>", "0", "1")': (
        "", "symbols = None", "symbols = 5", "symbols = ()", 'symbols = ("<pad>",)', 'symbols = ("0", "1")',
        'symbols = ("<pad>", "<end>", "0", "0")', 'symbols = ("<pad>", "<end>", 0, 1)', 'symbols = "abcd"',
        'symbols = ("<pad>", "<end>", None, [])', 'symbols = {"<pad>": 1, "<end>": 2}',
    ),
    "prompt_length = 1": ("prompt_length = 0", "prompt_length = -1", "prompt_length = 'x'", "prompt_length = 1.5", "prompt_length = 2", "prompt_length = None"),
    "answer_length = 2": ("answer_length = 0", "answer_length = -1", "answer_length = 'x'", "answer_length = 3", "answer_length = None", "answer_length = 10**12"),
    "    return tasks.Problem((2 + bit)[None], jnp.ones(1, bool), bit)": (
        "    return None", "    return (2 + bit)[None], jnp.ones(1, bool), bit", "    return tasks.Problem(2 + bit, True, bit)",
        "    return tasks.Problem((2 + bit)[None], jnp.ones(1), bit)", "    return tasks.Problem(None, None, None)", "    raise SystemExit(0)",
        "    return draw(key)", "    return {}['x']", "    return tasks.Problem((2.0 + bit)[None], jnp.ones(1, bool), bit)",
    ),
    '    return {"correct": right, "format": right}': (
        "    return right", "    return {}", "    return None", '    return {"correct": right}', '    return {"correct": 1.0, "format": 0.0}',
        '    return {"correct": tokens, "format": right}', '    return {"correct": "x", "format": right}', '    return {1: right}',
        '    return {"correct": right, "format": right, 5: right}', '    return {"correct": right, "format": right, "loss": right}',
        "    import sys; sys.exit()",
    ),
    "    return jnp.stack([2 + problem.answer, 1]).astype(jnp.int32)": (
        "    return None", "    return jnp.zeros(2)", "    return jnp.zeros(3, jnp.int32)", "    return [1, 2]", "    return problem.nope",
    ),
}  # fmt: skip


def tasks() -> Iterator[str]:
    """Texts of files, none of which is a task."""
    for line, others in TASK_LINES.items():
        assert line in TASK
        for other in others:
            yield TASK.replace(line, other)
    for made in (
        "None",
        "5",
        "'reverse'",
        "tasks",
        "tasks.Task",
        "sys.exit(0)",
        "1 / 0",
        "make()",
        "tasks.make('nope')",
        "{}['x']",
    ):
        yield f"import sys\n{TASK}\n\ndef make():\n    return {made}\n"
    yield from TEXTS[:16]


# Problems with a verifier

SAY = language_model.PROBLEMS
SOURCES = (
    "None", "5", "'say'", "[]", "verifiers", "verifiers.Source", "sys.exit(0)", "1 / 0", "{}['x']", "make(seed)",
    "verifiers.from_function([], None)", "verifiers.from_function(None, None)", "verifiers.from_function(5, 5)",
    "verifiers.from_function([5], lambda items, texts: [1.0])", "verifiers.from_function([None], lambda items, texts: [1.0])",
    "verifiers.from_function([b'say'], lambda items, texts: [1.0])", "verifiers.from_function(['say'], 5)",
    "verifiers.Source('say', None, None)", "verifiers.Source('say', lambda seed, n: [], lambda items, texts: {})",
    "verifiers.Source('say', lambda seed, n: None, lambda items, texts: {})", "verifiers.Source('say', lambda seed, n: 1 / 0, None)",
    "verifiers.Source('say', lambda seed, n: ['x'] * n, lambda items, texts: {})", "verifiers.Source(None, None, None)",
    "verifiers.Source('say', lambda: [], lambda items, texts: {})", "verifiers.Source('say', lambda seed, n: sys.exit(0), None)",
    "verifiers.Source('say', lambda seed, n: [verifiers.Item(5, 5)] * n, lambda items, texts: {})",
    "verifiers.Source('say', lambda seed, n: [verifiers.Item('say', 5)], lambda items, texts: {})",
    "verifiers.reasoning_gym('nope')", "verifiers.math_verify([], [])", "verifiers.math_verify(['a'], [])",
    "exec('raise KeyError(5)')", "next(iter(()))",
)  # fmt: skip


def problems() -> Iterator[tuple[str, str]]:
    """Text of a file, and words for its settings."""
    for source in SOURCES:
        yield f"import sys\nfrom jrl.lm import verifiers\n\n\ndef make(seed):\n    return {source}\n", ""
    for text in TEXTS[:24]:
        yield text, ""
    for setting in ("nope=1", "largest", "largest=", "largest=x", "largest=1.5", "largest=nan", "largest=-5", "seed=5"):
        yield SAY, setting


# Models

# Chat templates, and whether they may work.
TEMPLATES: tuple[tuple[str, bool], ...] = tuple(
    (template, False)
    for template in (
        "{{ raise_exception('no') }}", "{{ nope.nope }}", "{{ 1 / 0 }}", "{% for", "{{", "{% nope %}", "{% include 'a' %}",
        "{% import 'a' as b %}", "{% extends 'a' %}", "{{ 'a' * 10**10 }}", "{{ 'a' * 10**10 * 10**10 }}", 
        "{{ '%10000000000d' % 1 }}", "{{ '{:10000000000}'.format(1) }}", "{{ 'a'.ljust(10**10) }}", "{{ 'a'.zfill(10**11) }}",
        "{{ 'a' | center(10**10) }}", "{{ 'a\na' | indent(10**10) }}", "{{ '\t'.expandtabs(10**10) }}", "{{ [0] * 10**10 }}",
        "{{ messages | tojson(indent=10**9) }}", "{{ lipsum(n=10**6) }}", "{{ range(10**10) | list }}", "{{ range(100001) | list }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(90) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=['a']) %}{% for i in range(90) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x=99) %}{% for i in range(90) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x='ab') %}{% for i in range(90) %}{% set n.x = n.x | replace('a', n.x) %}{% endfor %}{{ n.x }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ messages[0].content.nope() }}",
        "{{ messages[99].content }}", "{{ messages | nope }}", "{{ messages is nope }}", "{{ strftime_now(5) }}", "{{ strftime_now('%') * 10**10 }}",
        "{{ cycler() }}", "{{ joiner(1, 2, 3) }}", 
        "{{ messages | slice(0) | list }}", "{{ 'a' | wordwrap(0) }}", "{{ 'a'.encode('nope') }}", "{{ (1).to_bytes(10**10, 'big') }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ self }}{{ super() }}", "{{ caller() }}",
        "{{ 1 + 'a' }}", "{{ none + 1 }}", "{{ dict(1) }}", "{{ namespace(1) }}", "{{ messages[0]['content'] + 5 }}", "{% set loop = 1 %}{{ loop() }}",
        "{% break %}", "{{ ''.join(messages) }}", "{{ 10**5000 }}", "{{ 'a' | urlize(5, 5, 5, 5, 5, 5) }}", "{{" + "(" * 5000 + ")" * 5000 + "}}",
        "{% if 1 %}" * 500 + "{% endif %}" * 500, "{{ " + "-" * 100000 + "1 }}", "{{ messages | groupby }}", 
        "{% generation %}", 
    )
) + tuple(
    (template, True)
    for template in (
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}",
    )
)  # fmt: skip
WRONG_SIZES = (None, "16", 1.5, 0, -1, True, [], {}, 10**12, 10**30, "nope")
MODEL_SETTINGS: dict[str, tuple] = {
    "model_type": (None, 5, "nope", [], {}, "gpt2", "LLAMA", ""),
    "vocab_size": WRONG_SIZES,
    "hidden_size": WRONG_SIZES,
    "intermediate_size": WRONG_SIZES,
    "num_hidden_layers": WRONG_SIZES,
    "num_attention_heads": (*WRONG_SIZES, 3),
    "num_key_value_heads": ("2", 1.5, 0, -1, True, [], 3),
    "head_dim": ("8", 1.5, -1, True, [], 10**12, 7),
    "rms_norm_eps": ("x", [], True, {}, float("nan"), float("inf"), -1, -1e9),
    "rope_theta": ("x", [], True, 0, -1, float("nan"), float("inf"), 1e300),
    "rope_scaling": (5, "x", [1], {"rope_type": "nope"}, {"rope_type": []}, {"rope_type": "linear"}, {"rope_type": "linear", "factor": "x"},
        {"rope_type": "yarn", "factor": float("nan")}, {"rope_type": "llama3", "factor": 8}, {"type": 5}, {"rope_type": "linear", "factor": 0},
        {"rope_type": "linear", "factor": -1}),
    "tie_word_embeddings": ("x", 5, [], {}, 1.5),
    "hidden_act": (5, [], "nope", None),
    "attention_bias": ("x", 5, [], True),
    "mlp_bias": ("x", 5, [], True),
    "quantization_config": ({}, 5, {"bits": 4}),
    "sliding_window": (5, "x", 0),
    "eos_token_id": ("x", -1, 1.5, [None], 99, {}, [[1]], True, 10**30),
}  # fmt: skip
BROKEN_JSON = (
    None,
    "",
    "{",
    "[]",
    "5",
    "null",
    '"x"',
    "{}",
    "\ufeff{}",
    "[" * 100000,
    '{"settings": []}',
    "NaN",
    '{"a": 1e999999}x',
    "\0",
)
MODEL_FILES: dict[str, tuple[str | None, ...]] = {
    "config.json": (*BROKEN_JSON, '{"settings": {}, "layer_types": 5}'),
    "model.safetensors": (None, "", "x", "{}", "\0" * 100, "\2\0\0\0\0\0\0\0{}", "\377" * 3),
    "model.safetensors/": (),
    "tokenizer.json": (*BROKEN_JSON, '{"model": 5}', '{"model": {"type": "nope"}}', '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}'),
    "tokenizer_config.json": (
        "", "{", "[]", "5", "null", "[" * 100000, '{"eos_token": "nope"}', '{"eos_token": 5}', '{"eos_token": []}', '{"eos_token": "<end>", "chat_template": 5}',
        '{"eos_token": "<end>", "chat_template": [5]}', '{"eos_token": "<end>", "chat_template": [{"name": "default"}]}', '{"eos_token": "<end>", "chat_template": {}}',
        '{"eos_token": "<end>", "bos_token": "nope"}', '{"eos_token": null}', '{"eos_token": {"content": 5}}', '{}',
        '{"eos_token": "<end>", "chat_template": [{"name": [], "template": "x"}]}', '{"eos_token": "<end>", "chat_template": true}',
    ),
    "special_tokens_map.json": ("", "{", "[]", "5", "null", '{"eos_token": "nope"}', '{"pad_token": "nope"}', '{"bos_token": {"content": "nope"}}'),
    "generation_config.json": ("", "{", "[]", "5", "null", '{"eos_token_id": "x"}', '{"eos_token_id": -1}', '{"eos_token_id": 99}', '{"eos_token_id": [1.5]}',
        '{"eos_token_id": true}', '{"eos_token_id": {}}', '{"eos_token_id": [[]]}', '{"eos_token_id": 1e400}'),
    "chat_template.json": ("", "{", "[]", "5", '{"chat_template": 5}', '{"chat_template": []}', '{"chat_template": [{}]}', '{"chat_template": {"default": "x"}}'),
    "chat_template.jinja": ("{{", "{{ 1 / 0 }}", "{% for %}"),
    "model.safetensors.index.json": (),
}  # fmt: skip

# Words

OPTIONS: tuple[tuple[str, ...], ...] = (
    ("--env", "CartPole"), ("--env", "cartpole-v1"), ("--env", "CartPole-v1 "), ("--preset", "nope"), ("--preset", ""), ("--preset", "☃"),
    ("--preset",), ("--precision", ""), ("--precision", "nope"), ("--precision", "float64"), ("--precision", "params=float32,,"),
    ("--precision", "params"), ("--precision", "params=nope"), ("--precision", "params=float32,params=float16"), ("--precision", "=float32"),
    ("--precision", "compute=bfloat16;output=float32"), ("--config.precision", "int8"), ("--sweep", "x"), ("--sweep", "="), ("--sweep", "hyper.nope=1"),
    ("--sweep", "hyper.learning_rate"), ("--sweep", "hyper.learning_rate="), ("--sweep", "hyper.learning_rate=1,"),
    ("--sweep", "hyper.learning_rate=x"), ("--sweep", "hyper.learning_rate=nan"), ("--sweep", "hyper.learning_rate=1e-3,1e-3"),
    ("--sweep", "hyper.learning_rate=inf"), ("--sweep", "hyper.learning_rate=1e400"), ("--sweep", "hyper.learning_rate=-1"),
    ("--sweep", "hyper.gamma=2"), ("--sweep", "config.num_envs=1,2"), ("--sweep", "num_envs=1"), ("--sweep", "hyper=1"), ("--sweep", "hyper.optimizer=1"),
    ("--sweep", "hyper.learning_rate=1e-3", "hyper.learning_rate=1e-4"), ("--sweep", "hyper..learning_rate=1"), ("--sweep", "☃=1"),
    ("--sweep", "hyper.gamma=" + ",".join(str(x / 1e6) for x in range(200000))), ("--env-params", "nope=1"), ("--env-params", "=1"),
    ("--env-params", "x"), ("--env-params", "☃=1"), ("--env-params", "gravity=x"), ("--env-params", "__class__=1"),
    ("--gif", "--env", "CliffWalking"), ("--run-dir",), ("--run-dir", ""), ("--env", ""), ("--env", "nope.py"), ("--env", "/dev/null"),
    ("--config.network.torso", "conv"), ("--config.network.torso", "vit"), ("--config.network.hidden", "0"), ("--config.network.hidden", "-5", "x"),
    ("--config.optimizer.name", "nope"), ("--config.optimizer.drops", "2"), ("--config.optimizer.drops", "nan"), ("--config.optimizer.nesterov",),
    ("--config.optimizer.warmup", "2"), ("--config.optimizer.accumulate", "0"), ("--config.optimizer.no-decay", "nope"),
    ("--config.optimizer.rounding", "stochastic", "--nope"), ("--hyper.learning-rate", "-1"), ("--hyper.gamma", "1.5"), ("--hyper.gamma", "-0.1"),
    ("--config.network.norm", "batch"), ("--config.network.activation", "x"), ("--devices", "99"), ("--devices", "0"), ("--seed", "1e30"),
    ("--checkpoint-every", "-1"), ("--checkpoint-every", "nan"), ("--log-every", "0"), ("--eval-every", "0"), ("--num-seeds", "0"),
    ("--env-steps", "0"), ("--env-steps", "1"), ("--env-steps", "1e18"), ("--env-steps", "1e30"), ("--seeds-at-once", "0"),
)  # fmt: skip
COMBINATIONS: dict[str, tuple[str, ...]] = {
    "ppo.py": (
        "--config.num-minibatches 3", "--config.num-envs 3 --config.network.gru 8", "--config.network.gru 8 --config.network.attention.kind dense",
        "--config.network.hidden --config.network.attention.kind dense", "--config.continuous beta", "--config.loss nope", "--preset penalty2",
        "--config.network.attention.kind nope", "--env Pendulum-v1 --config.precision float8", "--config.network.torso conv --env CartPole-v1",
        "--config.standardize-advantages always", "--hyper.clip-eps -1", "--hyper.gae-lambda 2", "--hyper.max-grad-norm 0", "--hyper.target-kl -1",
    ),
    "dqn.py": (
        "--env Pendulum-v1", "--config.n-step 0", "--config.distribution nope", "--config.capacity 1", "--config.batch-size 0",
        "--config.distribution categorical --hyper.v-min 5 --hyper.v-max 1", "--config.distribution categorical --hyper.v-min 1 --hyper.v-max 1",
        "--config.capacity 10 --config.batch-size 100", "--hyper.tau 2", "--hyper.epsilon-start 2", "--hyper.epsilon-fraction -1", "--env Probe-multi",
    ),
    "pqn.py": ("--env Pendulum-v1", "--config.num-minibatches 7", "--hyper.q-lambda 2", "--hyper.epsilon-end -1", "--config.num-epochs 0"),
    "r2d2.py": ("--env Pendulum-v1", "--config.network.gru 0", "--config.capacity 1", "--config.n-step 0", "--hyper.gamma 2", "--config.burn-in -1"),
    "td_random_walk.py": ("--runs 0", "--runs -1", "--runs 1e10", "--runs 1e12", "--run-dir", "--seed 1e30", "--runs 1 2"),
    "q_learning.py": ("--methods", "--methods nope", "--methods sarsa nope", "--runs 0", "--episodes 0", "--episodes 1e12", "--runs 1e12", "--episodes 1e10"),
    "grpo.py": (
        "--methods", "--methods nope", "--methods grpo nope", "--task nope", "--task-params modulus=1", "--task-params nope=1", "--updates 0",
        "--config.group-size 0", "--config.group-size 1", "--config.num-minibatches 7", "--config.model.num-heads 3", "--config.model.dim 5",
        "--config.model.dim 0", "--config.model.dim 1e12", "--config.model.num-layers 1e12", "--config.model.attention nope", "--config.adapter.rank -1",
        "--config.adapter.kind lora --config.adapter.rank 4000000000", "--hyper.learning-rate nan", "--sweep hyper.nope=1", "--eval-episodes -1", "--config.kl nope", "--updates 1e30",
        "--methods grpo --config.loss nope", "--config.oversample 0", "--config.num-prompts 1e12", "--config.group-size 1e12",
    ),
    "memory.py": ("--task nope", "--lengths 0", "--lengths -1", "--lengths x", "--kinds nope", "--kinds gru nope", "--env-steps 0", "--env-steps 1", "--num-seeds 0",
        "--lengths 1e12", "--lengths 1e12 --task recall", "--lengths 99999999999999999999999"),
    "language.py": ("--task nope", "--kinds", "--kinds nope", "--length 1", "--length 1e12", "--length 1e9", "--steps 1", "--batch-size 0", "--dim 0", "--dim 5",
        "--dim 1e12", "--num-layers 1e12", "--batch-size 1e12", "--learning-rate nan", "--learning-rate 0", "--learning-rate -1", "--learning-rate inf"),
    "optimizers.py": ("--optimizers", "--optimizers nope", "--learning-rates", "--learning-rates nan", "--learning-rates -1", "--learning-rates 1 1",
        "--toy-steps 0", "--toy-steps 7", "--num-seeds 0", "--env nope", "--env Pendulum-v2", "--env-steps 0", "--toy-steps -50"),
    "estimators.py": ("--methods", "--methods nope", "--group-sizes", "--group-sizes 1", "--group-sizes x", "--vocabulary 2", "--length 1", "--length 1e9",
        "--vocabulary 1e9", "--samples 0", "--samples 1e12", "--step nan", "--step -1", "--step inf", "--group-sizes 1e9", "--group-sizes 1e18"),
    "precision.py": ("--variants", "--variants nope", "--memory-width -1", "--memory-width 1e12", "--speed-widths 0", "--speed-widths x", "--speed-widths 1e12",
        "--env nope", "--num-seeds 0", "--env-steps 0"),
    "rainbow.py": ("--parts", "--parts nope", "--parts C51 --v-min 5 --v-max 1", "--parts C51 --v-min nan", "--parts C51 --v-max inf", "--env Pendulum-v1",
        "--env nope", "--num-seeds 0", "--env-steps 0", "--env-steps 1"),
    "lm.py": ("--form nope", "--steps 0", "--prompt-length 0", "--prompt-length 1", "--answer-length 0", "--answer-length 1e12", "--prompt-length 1e12",
        "--save-every 0", "--devices 0", "--devices 99", "--model-devices 0", "--model-devices 99", "--setting x", "--setting seed=1", "--config.adapter.rank -1",
        "--config.adapter.rank 4000000000", "--config.supervised 5", "--config.precision nope", "--hyper.learning-rate nan", "--config.group-size 0",
        "--dataset nope", "--dataset chain_sum --setting nope=1", "--dataset chain_sum --setting min_terms=x", "--dataset chain_sum --setting max_terms=-1",
        "--dataset say.py --setting largest=x", "--config.num-prompts 1e12", "--config.group-size 1e12", "--config.micro-batches 0", "--config.micro-batches 7"),
}  # fmt: skip
MAY_WORK: dict[str, tuple[str, ...]] = {
    "ppo.py": ("--seed -1 --log-every 1e18 --eval-every 1e18 --seeds-at-once 1e18 --checkpoint-every 1e300", "--env-params gravity=5 --eval-episodes 0"),
    "q_learning.py": ("--methods sarsa sarsa",),
    "lm.py": ("--setting largest=2",),
}  # fmt: skip
PARAMETERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("CartPole-v1", ("gravity=nan", "gravity=inf", "gravity=-inf", "gravity=1e400", "gravity=true", "gravity=", "gravity", "nope=1", "max_steps_in_episode=0",
        "max_steps_in_episode=-1", "max_steps_in_episode=1.5", "max_steps_in_episode=x", "max_steps_in_episode=1e30", "max_steps_in_episode=nan", "gravity=1e39",
        "max_steps_in_episode=1e10")),
    ("Recall", ("delay=0", "delay=-1", "delay=x", "delay=1.5", "queries=0", "symbols=0", "symbols=1e12", "nope=1", "delay=1e30", "symbols=true")),
    ("Probe-credit", ("delay=0", "delay=-1", "delay=x", "delay=1e30", "nope=1")),
    ("Probe-memory", ("delay=0", "delay=-1", "delay=nan")),
    ("Probe-truncation", ("limit=0", "limit=-1", "limit=1e30", "limit=x")),
    ("Probe-value", ("nope=1",)),
    ("RandomWalk", ("num_states=0", "num_states=-1", "num_states=1.5", "num_states=1e12", "num_states=x", "one_hot=5", "one_hot=false")),
    ("CliffWalking", ("time_limit=0", "time_limit=-1", "time_limit=x", "time_limit=1e30", "one_hot=x")),
    ("FrozenLake", ("slippery=5", "slippery=x", "time_limit=0", "time_limit=1.5")),
    ("Garnet", ("seed=x", "num_states=0", "num_actions=0", "num_actions=-1", "branching=0", "branching=99", "num_states=1e12", "num_states=1e6", "seed=1e30")),
    ("MemoryChain-bsuite", ("memory_length=0", "memory_length=-1", "memory_length=x", "memory_length=nan")),
    ("DeepSea-bsuite", ("deterministic=5", "size=1e12")),
    ("Breakout-MinAtar", ("nope=1", "use_minimal_action_set=5", "max_steps_in_episode=0")),
)  # fmt: skip
TASK_PARAMETERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("modular_addition", ("modulus=0", "modulus=1", "modulus=-1", "modulus=x", "modulus=1.5", "modulus=nan", "modulus=1e12", "modulus=1e30", "modulus=true", "nope=1")),
    ("addition", ("digits=0", "digits=10", "digits=-1", "digits=x", "shortest=5", "shortest=0", "shortest=x", "reverse=5", "digits=1e12")),
    ("reverse", ("length=0", "length=-1", "length=x", "letters=0", "letters=27", "letters=99", "length=1e12", "shortest=99", "length=1e30")),
    ("sort", ("length=0", "letters=0", "shortest=-1", "nope=1")),
    ("parity", ("length=0", "length=-1", "length=1e12", "nope=1", "length=x")),
    ("countdown", ("numbers=1", "numbers=7", "numbers=x", "largest=0", "largest=1e12", "target=0", "target=1", "target=1e12", "shortest=9")),
)  # fmt: skip
