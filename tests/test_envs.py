"""Environments: the protocol, gymnax behind it, wrappers, your own, and what is refused."""

import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import envs
from jrl.algos import dqn, ppo, pqn, r2d2, td
from jrl.envs import Discrete, Environment, probes, strict, wrappers
from jrl.envs import gymnax as ours
from jrl.envs.types import example_action
from jrl.lm import tasks

RANK_PROMOTION = "allow"  # gymnax promotes ranks


def play(env, key, actions):
    """Observations, rewards and flags of one episode's first steps, without resets."""

    def step(carry, x):
        action, key = x
        obs, state, reward, terminated, truncated = env.step(key, carry, action)
        return state, (obs, reward, terminated, truncated)

    key, key_reset = jax.random.split(key)
    obs, state = env.reset(key_reset)
    return obs, jax.lax.scan(step, state, (actions, jax.random.split(key, len(actions))))[1]


@pytest.mark.thorough(12)
@pytest.mark.parametrize("name", ours.IDS)
def test_every_gymnax_id_follows_the_protocol(name, key):
    env = envs.make(name)
    actions = jnp.stack([example_action(env.action_space)] * 3)
    first, (obs, reward, terminated, truncated) = jax.jit(lambda k: play(env, k, actions))(key)
    assert obs.shape[1:] == first.shape and obs.dtype == first.dtype == envs.observation_spec(env).dtype
    assert reward.dtype == jnp.float32 and terminated.dtype == truncated.dtype == bool
    assert np.isfinite(np.asarray(obs, float)).all() and np.isfinite(reward).all()
    assert not any(x.weak_type for x in jax.tree.leaves(jax.eval_shape(env.reset, key)))
    assert env.time_limit > 0


@pytest.mark.parametrize("name", ["CartPole-v1", "Breakout-MinAtar", "Pendulum-v1", "Catch-bsuite"])
def test_steps_are_gymnax_s_own(name, key):
    import gymnax

    env, (theirs, params) = envs.make(name), gymnax.make(name)
    obs, state = env.reset(key)
    their_obs, their_state = theirs.reset(key, params)
    np.testing.assert_array_equal(obs, their_obs)
    for i in range(5):
        key_step = jax.random.fold_in(key, i)
        action = theirs.action_space(params).sample(key_step)
        obs, state, reward, terminated, truncated = env.step(jax.random.split(key_step)[0], state, action)
        _, their_state, their_reward, their_terminated, their_truncated, info = theirs.step(
            key_step, their_state, action, params
        )
        np.testing.assert_allclose(obs, info["final_observation"], rtol=1e-6)
        np.testing.assert_allclose(
            reward, their_reward, rtol=1e-6 if name == "Pendulum-v1" else 0
        )  # a float of many terms
        assert (terminated, truncated) == (their_terminated, their_truncated)


def test_cartpole_truncates_at_its_limit_and_terminates_by_falling(key):
    env = strict(wrappers.time_limit(envs.make("CartPole-v1"), 5))
    _, (_, _, terminated, truncated) = play(env, key, jnp.zeros(5, jnp.int32))
    assert truncated.tolist() == [False] * 4 + [True] and not terminated.any()
    _, (_, _, terminated, truncated) = play(envs.make("CartPole-v1"), key, jnp.zeros(20, jnp.int32))
    assert terminated.any() and not truncated.any()


def test_minatar_observations_take_a_byte_each():
    assert envs.observation_spec(envs.make("Breakout-MinAtar")).dtype == bool


def test_discrete_observations_come_one_hot(key):
    obs, _ = envs.make("FrozenLake-misc").reset(key)
    assert obs.shape == (16,) and obs.sum() == 1


def test_parameters_of_gymnax():
    assert envs.make("MemoryChain-bsuite", memory_length=3).name == "MemoryChain-bsuite(memory_length=3)"
    with pytest.raises(ValueError, match=r"no parameter 'length'; it has: .*memory_length"):
        envs.make("MemoryChain-bsuite", length=3)


def test_unknown_names_are_refused_with_a_hint():
    with pytest.raises(ValueError, match="did you mean CartPole-v1"):
        envs.make("CartPole")
    with pytest.raises(ValueError, match=r"known: .*Breakout-MinAtar"):
        envs.make("zzzzzz")
    with pytest.raises(ValueError, match="no such environment file"):
        envs.make("missing.py")


def test_sticky_actions_repeat_and_never_on_the_first_step(key):
    def echo_step(key, state, action):
        return action.astype(jnp.float32)[None], state, 0.0, False, False

    echo = Environment("Echo", lambda key: (jnp.zeros(1), jnp.int32(0)), echo_step, Discrete(1000))
    actions = jnp.arange(1, 2001, dtype=jnp.int32) % 1000
    _, (obs, *_) = play(strict(wrappers.sticky_actions(strict(echo), 0.25)), key, actions)
    seen = obs[:, 0].astype(int)
    assert seen[0] == 1
    repeated = np.mean(seen[1:] == seen[:-1])
    assert 0.2 < repeated < 0.3
    assert ((seen == actions) | (seen == np.append(0, seen[:-1]))).all()


def test_the_previous_action_and_reward_are_shown(key):
    env = strict(wrappers.previous(envs.make("Probe-mask")))
    obs, state = env.reset(key)
    width = env.action_space.n + 1
    assert (obs.obs[-width:] == 0).all()
    obs, state, reward, *_ = env.step(key, state, jnp.int32(1))
    np.testing.assert_array_equal(obs.obs[-width:], [*np.eye(width - 1)[1], reward])
    picture = strict(wrappers.previous(envs.make("Breakout-MinAtar")))
    obs, state = picture.reset(key)
    assert obs["obs"].shape == (10, 10, 4) and obs["previous"].shape == (picture.action_space.n + 1,)
    pendulum = strict(wrappers.previous(envs.make("Pendulum-v1")))
    obs, *_, reward, _, _ = pendulum.step(key, pendulum.reset(key)[1], jnp.array([0.5]))
    np.testing.assert_allclose(obs[3:], [0.5, reward])


def test_wrappers_by_name(key):
    words = ["time_limit=7", "sticky_actions", "frame_stack(num_frames=2)", "previous()"]
    env = wrappers.wrapped(envs.make("CartPole-v1"), words)
    recorded = dict(env.settings)["wrappers"]
    assert recorded == (
        "time_limit(steps=7)",
        "sticky_actions(probability=0.25)",
        "frame_stack(num_frames=2)",
        "previous()",
    )
    assert wrappers.wrapped(envs.make("CartPole-v1"), recorded).settings == env.settings
    assert strict(env).reset(key)[0].shape == (2 * 4 + 3,)


@pytest.mark.parametrize(
    "word, message",
    [
        ("time_limt=3", "unknown wrapper 'time_limt=3'; did you mean time_limit"),
        ("time_limit", "time_limit needs the settings steps"),
        ("time_limit=0", "time_limit: steps must be an integer of at least 1; got 0"),
        ("time_limit=soon", "the value of a wrapper must be a number; got 'time_limit=soon'"),
        ("sticky_actions=2", "sticky_actions: probability must be between 0 and 1; got 2"),
        ("previous=1", "the wrapper previous takes no value"),
        ("frame_stack=0.5", "num_frames must be an integer, such as 4; got 0.5"),
        ("", "unknown wrapper ''"),
    ],
)
def test_a_wrong_wrapper_is_refused(word, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        wrappers.wrapped(envs.make("CartPole-v1"), [word])


def test_frame_stack_and_time_feature(key):
    env = strict(wrappers.frame_stack(envs.make("CartPole-v1"), 3))
    first, (obs, *_) = play(env, key, jnp.zeros(2, jnp.int32))
    assert first.shape == (12,) and (first[:4] == first[8:]).all()
    np.testing.assert_array_equal(obs[1, :4], first[:4])
    np.testing.assert_array_equal(obs[1, 4:8], obs[0, 8:])

    env = strict(wrappers.time_feature(envs.make("Pendulum-v1")))
    first, (obs, *_) = play(env, key, jnp.zeros((2, 1)))
    np.testing.assert_allclose([first[-1], *obs[:, -1]], [0, 1 / 200, 2 / 200])
    masked = strict(wrappers.time_limit(envs.make("Probe-mask"), 4))
    obs, _ = wrappers.time_feature(masked).reset(key)
    assert obs.obs.tolist() == [0, 0] and obs.mask.shape == (4,)
    with pytest.raises(ValueError, match="has no time limit"):
        wrappers.time_feature(probes.value()._replace(time_limit=None))


OWN = """
import jax, jax.numpy as jnp
from jrl.envs import Discrete
action_space = Discrete(2)
time_limit = 7
def reset(key):
    return jnp.zeros(3), 0
def step(key, state, action):
    t = state + 1
    return jnp.full(3, t, float), t, action, False, t >= time_limit
"""


def test_an_environment_in_a_file(tmp_path, key):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    env = envs.make(str(path))
    assert env.name == "mine" and env.time_limit == 7
    _, (obs, reward, _, truncated) = play(env, key, jnp.ones(7, jnp.int32))
    assert reward.dtype == jnp.float32 and truncated[-1] and obs[-1, 0] == 7


@pytest.mark.parametrize(
    "edit, message",
    [
        (("action_space = Discrete(2)", ""), "must define action_space"),
        (
            ("def reset", "from jrl.envs.probes import value as reset\ndef start"),
            "must define reset .*imported names do not count",
        ),
        (("def reset", "oops oops"), "mine.py cannot be run: SyntaxError"),
        (
            ("import jax, jax.numpy as jnp", "import jax, jax.numpy as jnp\n1 / 0"),
            "mine.py cannot be run: line 3: ZeroDivisionError",
        ),
        (("jnp.full(3, t, float)", "jnp.zeros(4)"), r"observation of shape \(4,\), reset one of shape \(3,\)"),
        (("return jnp.full(3, t, float), t,", "return jnp.full(3, t, float), (t, t),"), "another state structure"),
        (
            ("action, False, t >= time_limit", "action, False"),
            "must return \\(obs, state, reward, terminated, truncated\\)",
        ),
        (
            ("return jnp.zeros(3), 0", "return jnp.zeros(3, complex), 0"),
            "mine: observations must be real; got dtype complex64",
        ),
        (("action, False,", "jnp.ones(2), False,"), r"scalar reward, got shape \(2,\)"),
        (
            ("t = state + 1", "t = nonsense"),
            r"^mine.py, line 9: mine: step cannot be traced: NameError: name 'nonsense'",
        ),
    ],
)
def test_a_broken_environment_is_refused(tmp_path, edit, message):
    path = tmp_path / "mine.py"
    path.write_text(OWN.replace(*edit))
    with pytest.raises(ValueError, match=message):
        envs.make(str(path))


@pytest.mark.parametrize("imported", ["from jrl.envs import *", "from gymnax import *", "from jrl.envs import make"])
def test_what_a_file_imports_is_not_taken_for_its_own(imported, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"{imported}\n{OWN}")
    assert envs.make(path).name == "mine"


def test_a_file_may_define_dataclasses_and_a_make_of_its_own(tmp_path):
    path = tmp_path / "mine.py"
    header = "from __future__ import annotations\nimport dataclasses\n"
    own_make = """
@dataclasses.dataclass
class Length:
    steps: int = 7
def make(steps: int):
    from jrl.envs import Environment
    return Environment("made", reset, step, action_space, Length(steps).steps)
"""
    path.write_text(header + OWN + own_make)
    assert envs.make(path, steps=5).time_limit == 5
    with pytest.raises(ValueError, match=r"mine\.py has no setting .length.; it has: steps"):
        envs.make(path, length=5)
    with pytest.raises(ValueError, match=r"mine\.py needs the settings steps"):
        envs.make(path)


@pytest.mark.parametrize("imports", ["import helper\n", ""])
def test_a_file_may_import_those_beside_it(imports, tmp_path):
    body = "\n    import colorsys, helper\n    colorsys.rgb_to_hsv(1, 1, 1)\n    t = state + helper.STEP"
    before = sys.path.copy()
    for folder, step in ((tmp_path / "a", 1), (tmp_path / "b", 2)):  # with two files of one name
        folder.mkdir()
        (folder / "mine.py").write_text(imports + OWN.replace("\n    t = state + 1", body))
        (folder / "helper.py").write_text(f"STEP = {step}\n")
        (folder / "colorsys.py").write_text("1 / 0")  # Python's own comes first
        env = envs.make(folder / "mine.py")
        assert env.step(jax.random.key(0), jnp.int32(0), 0)[1] == step
        assert dict(env.settings)["text of helper"] == f"STEP = {step}\n"
    assert sys.path == before


@pytest.mark.parametrize(
    "made, message",
    [
        ("{}['x']", "mine.py, line 14: KeyError: 'x'"),
        ("sys.exit(0)", "mine.py, line 14: SystemExit: 0"),
        ("make()", "mine.py, line 14: RecursionError: maximum recursion depth exceeded"),
        ("next(iter(()))", "mine.py, line 14: StopIteration"),
        ("envs.make('nope')", "mine.py, line 14: ValueError: unknown environment 'nope'; known"),
        (
            "envs.Environment('own', wait, step, action_space)",
            "mine.py: own: reset must be a function; got a coroutine",
        ),
        ("None", "mine.py: an environment must have reset, step, action_space; got None"),
        ("'CartPole-v1'", "mine.py: an environment must have reset, step, action_space; got 'CartPole-v1'"),
        ("envs.Environment('own', reset, 5, action_space)", "mine.py: own: step must be a function; got 5"),
        ("envs.Environment('own', reset, step, 5)", "mine.py: own: action_space must be Discrete"),
        ("envs.Environment('own', reset, step, action_space, 'five')", "mine.py: own: time_limit must be an integer"),
        (
            "envs.Environment('own', lambda key: sys.exit(), step, action_space)",
            "mine.py, line 14: own: reset cannot be traced: SystemExit",
        ),
    ],
)
def test_what_goes_wrong_in_a_file_is_said_with_its_name_and_line(made, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_make = f"import sys\nfrom jrl import envs\ndef make():\n    return {made}\nasync def wait(key): ...\n"
    (tmp_path / "mine.py").write_text(OWN + own_make)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        envs.make("mine.py")


# What an environment may return


def walk(obs=(0.0, 0.0), state=(0.0, 0), move=0.1, ending=(1.0, False, False), space=Discrete(2)):
    """A point that moves by ``move`` a step, written carelessly."""

    def step(key, state, action):
        position, t = state
        return jnp.asarray(obs) + position, (position + move, t + 1), *ending

    return Environment("walk", lambda key: (jnp.asarray(obs), state), step, space)


def test_python_numbers_are_promoted_to_what_the_steps_need(key):
    env = strict(walk(state=(0, 0)))
    _, state = env.reset(key)
    assert [x.dtype for x in state] == [jnp.float32, jnp.int32]
    for _ in range(3):
        _, state, *_ = env.step(key, state, 0)
    np.testing.assert_allclose(state[0], 0.3, rtol=1e-6)


def test_promotion_goes_on_until_it_has_reached_every_number(key):
    """What is a fraction in the first number of a state comes to the last of eight after seven steps."""

    def step(key, state, action):
        return jnp.asarray(state, float), (state[0] + 0.5, *state[:-1]), 1.0, False, False

    env = strict(Environment("chain", lambda key: (jnp.zeros(8), (0,) * 8), step, Discrete(2)))
    _, state = env.reset(key)
    assert {x.dtype for x in state} == {jnp.dtype(jnp.float32)}
    for _ in range(9):
        obs, state, *_ = env.step(key, state, 0)
    assert state[-1] == 1.0 and obs[-1] == 0.5


@pytest.mark.parametrize(
    "careless, message",
    [
        ({"obs": np.zeros(2, np.int32)}, "step returns observation of dtype float32, reset one of dtype int32"),
        ({"state": (jnp.zeros((), bool), 0)}, r"step returns state\[0\] of dtype float32, reset one of dtype bool"),
        ({"state": (0.0, jnp.uint8(0)), "move": 1}, None),
        ({"ending": (1.0, False, {"discount": 1.0})}, "gymnax's order .* does not tell terminated from truncated"),
        ({"ending": (1.0, False, False, {})}, "step must return .*; got 6 values; gymnax's order"),
        ({"ending": (1.0, 0.0, False)}, "terminated must be bool, .*; got dtype float32"),
        ({"ending": (1.0, False, 1)}, "truncated must be bool"),
        ({"ending": (None, False, False)}, "a scalar reward among them; got NoneType"),
        ({"ending": (1j, False, False)}, "the reward must be real"),
    ],
)
def test_what_would_be_cast_or_misread_in_silence_is_refused(careless, message):
    if message is None:
        strict(walk(**careless))
    else:
        with pytest.raises(ValueError, match=message):
            strict(walk(**careless))


@pytest.mark.parametrize(
    "space, arguments, message",
    [
        (envs.Box, ((1.0,), (0.0,)), "low must be at most high; got 1 and 0 at position 0"),
        (envs.Box, ((1.0,), (2.0, 3.0)), "low and high must have one length; got 1 and 2"),
        (envs.Box, (-1.0, 1.0), "low must be a vector"),
        (envs.Box, ((np.nan,), (1.0,)), "low must be at most high; got nan and 1"),
        (envs.Box, ((np.inf,), (np.inf,)), "low must be at most high"),
        (envs.Discrete, (0,), "the number of choices must be an integer of at least 1; got 0"),
        (envs.Discrete, (2.5,), "must be an integer of at least 1; got 2.5"),
        (envs.MultiDiscrete, ((3, 0),), "must be an integer of at least 1; got 0"),
        (envs.MultiDiscrete, ((),), "must be a vector"),
    ],
)
def test_spaces_that_cannot_be_are_refused(space, arguments, message):
    with pytest.raises(ValueError, match=message):
        space(*arguments)


def test_spaces_of_gymnasium_are_converted():
    from gymnasium import spaces

    for theirs, ours_ in (
        (spaces.Discrete(3), envs.Discrete(3)),
        (spaces.MultiDiscrete([2, 3]), envs.MultiDiscrete((2, 3))),
        (spaces.MultiBinary(2), envs.MultiDiscrete((2, 2))),
        (spaces.Box(-1, 2, (2,)), envs.Box((-1.0, -1.0), (2.0, 2.0))),
    ):
        assert strict(walk(space=theirs)).action_space == ours_
    for theirs, message in (
        (spaces.Discrete(3, start=1), "choices must start at 0"),
        (spaces.Box(-1, 1, ()), "low must be a vector"),
        (spaces.Tuple([spaces.Discrete(2)]), "action_space must be Discrete, MultiDiscrete or Box"),
        (None, "action_space must be Discrete, MultiDiscrete or Box"),
    ):
        with pytest.raises(ValueError, match=message):
            strict(walk(space=theirs))


@pytest.mark.parametrize(
    "mask, space, message",
    [
        (np.ones(1, bool), Discrete(2), r"must be bool of shape \(2,\).*; got bool of shape \(1,\)"),
        (np.ones(3, bool), Discrete(2), r"must be bool of shape \(2,\)"),
        (np.ones(2, np.float32), Discrete(2), r"must be bool of shape \(2,\).*; got float32"),
        (np.ones(2, bool), envs.MultiDiscrete((2, 3)), r"must be bool of shape \(5,\)"),
        (np.ones(2, bool), envs.Box((0.0,), (1.0,)), "a mask is for discrete actions"),
    ],
)
def test_masks_that_do_not_fit_the_actions_are_refused(mask, space, message):
    obs = envs.MaskedObs(jnp.zeros(2), jnp.asarray(mask))
    env = Environment("masked", lambda key: (obs, 0), lambda k, s, a: (obs, s, 1.0, False, False), space)
    with pytest.raises(ValueError, match=message):
        strict(env)
    if isinstance(space, Discrete):
        several = envs.MaskedObs({"a": jnp.zeros(2)}, jnp.ones(2, bool))
        with pytest.raises(ValueError, match="the observation beside a mask must be one array; got dict"):
            strict(
                Environment("dict", lambda key: (several, 0), lambda k, s, a: (several, s, 1.0, False, False), space)
            )


@pytest.mark.parametrize(
    "space, first, then",
    [
        (Discrete(2), [True, False], [False, False]),
        (envs.MultiDiscrete((2, 2)), [True, False, False, True], [True, True, False, False]),
    ],
)
def test_a_state_without_a_legal_action_is_terminal(space, first, then, key):
    def observe(mask):
        return envs.MaskedObs(jnp.zeros(1), jnp.array(mask))

    env = strict(
        Environment(
            "stuck", lambda k: (observe(first), 0), lambda k, s, a: (observe(then), s, 1.0, False, False), space
        )
    )
    assert env.step(key, env.reset(key)[1], example_action(space))[3]
    alive = strict(env._replace(step=lambda k, s, a: (observe(first), s, 1.0, False, False)))
    assert not alive.step(key, alive.reset(key)[1], example_action(space))[3]


@pytest.mark.parametrize("module", [ppo, dqn, pqn, r2d2, td])
def test_arguments_of_the_wrong_kind_are_refused_in_one_line(module):
    name, kind = module.__name__.split(".")[-1], module.Config.__module__
    env = envs.make("Probe-action")
    with pytest.raises(ValueError, match="an environment must have reset, step, action_space; got 'CartPole-v1'"):
        module.make("CartPole-v1")
    with pytest.raises(ValueError, match=rf"^{name}.make: config must be a {kind}.Config; got 'fast', a builtins.str$"):
        module.make(env, "fast")
    with pytest.raises(ValueError, match=rf"{name}.make: hyper must be a {kind}.Hyper; got {{}}"):
        module.make(env, module.Config(), {})
    with pytest.raises(ValueError, match="an environment's name must be text; got 3"):
        envs.make(3)


def test_environments_and_tasks_may_be_static_arguments():
    for make in (
        lambda: envs.make("CartPole-v1"),
        lambda: wrappers.sticky_actions(envs.make("Garnet", seed=2)),
        lambda: tasks.as_environment(tasks.make("parity", length=3)),
    ):
        assert isinstance(hash(make()), int) and make().settings == make().settings != ()


def test_environments_of_other_packages_are_refused_by_name():
    import gymnax as theirs

    with pytest.raises(ValueError, match="is an environment of gymnax, which has another protocol"):
        ppo.make(theirs.make("CartPole-v1")[0])


def test_any_record_of_the_protocol_is_an_environment(key):
    mine = types.SimpleNamespace(reset=lambda k: (jnp.zeros(2), 0), action_space=Discrete(2), name="mine")
    mine.step = lambda k, s, a: (jnp.zeros(2), s + 1, 1, s > 3, False)
    algo = ppo.make(mine)
    assert algo.env.name == "mine" and algo.env.step(key, algo.env.reset(key)[1], 0)[2].dtype == jnp.float32


def test_register():
    envs.register("Mine-v0", probes.value)
    assert envs.make("Mine-v0").name == "Probe-value"
    with pytest.raises(ValueError, match="registered already"):
        envs.register("CartPole-v1", probes.value)
