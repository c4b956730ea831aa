"""A run read back from its folder: the same state, nothing touched, and what can be done with it."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import bits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from jrl import envs, nets, run
from jrl.algos import dqn, ppo, pqn
from jrl.envs import pictures
from jrl.run import command, compare, scores, show
from jrl.run.checkpoint import sealed

RANK_PROMOTION = "allow"  # gymnax promotes ranks

TINY = ppo.Config(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=2, network=nets.Config(hidden=(8,)))
FILE = """
import jax.numpy as jnp
from jrl.envs import Discrete
action_space = Discrete(2)
time_limit = 3
print("run")
def reset(key):
    return jnp.zeros(1), 0
def step(key, state, action):
    return jnp.zeros(1), state + 1, action, False, state + 1 >= 3
"""


def train(algo, folder, **more):
    kwargs = {"num_seeds": 3, "eval_episodes": 2, "progress": False} | more
    return run.train(algo, jax.random.key(0), 4 * algo.env_steps_per_update, run_dir=folder, **kwargs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder, and what ``run.train`` returned; its settings are not the defaults."""
    folder = tmp_path_factory.mktemp("load") / "run"
    env = envs.make("CartPole-v1", max_steps_in_episode=50, gravity=10.0)
    algo = ppo.make(env, TINY, ppo.Hyper(learning_rate=1e-3, optimizer=ppo.optim.Hyper(b1=0.8)))
    return folder, algo, train(algo, folder)


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")}


def test_the_algorithm_and_the_state_are_those_of_the_run_and_the_folder_is_as_it_was(trained):
    folder, algo, result = trained
    before = contents(folder)
    loaded = run.load(folder)
    assert contents(folder) == before
    bits.assert_same(loaded.state, result.state)
    assert (loaded.algo.config, loaded.algo.hyper, loaded.algo.env.name) == (algo.config, algo.hyper, algo.env.name)
    assert loaded.env_steps == 64 and loaded.cells == [""] and loaded.settings["config.num_steps"] == 8
    scores = json.loads((folder / "summary.json").read_text())["eval"]["per_seed"]
    assert (loaded.best_cell, loaded.best_seeds) == ("", {"": int(np.argmax(scores))})
    state, key = loaded.member(1), jax.random.key(2)
    bits.assert_same(state, jax.tree.map(lambda x: x[1], result.state))
    best = jax.jit(lambda s: run.evaluate(loaded.algo, s, jax.random.key(20_000_003), 2).returns.mean())
    assert float(best(loaded.member())) == pytest.approx(max(scores))  # the evaluation of the run again
    obs = algo.env.reset(key)[0]
    assert loaded.algo.act(state, obs)[0] == algo.act(state, obs)[0]


def test_parameters_are_exported_by_their_paths(trained, tmp_path):
    state = run.load(trained[0]).member(0)
    run.export_parameters(state, tmp_path / "p.safetensors")
    arrays = safetensors.numpy.load_file(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(arrays["params.policy.out.kernel"], state.params["params"]["policy"]["out"]["kernel"])
    assert sum(x.size for x in arrays.values()) == sum(x.size for x in jax.tree.leaves(state.params))
    with pytest.raises(run.RunError, match=r"cannot write .*No such file or directory"):
        run.export_parameters(state, tmp_path / "absent" / "p.safetensors")


def test_a_sweep_is_loaded_by_cells(tmp_path):
    algo = ppo.make(envs.make("Probe-action"), TINY)
    grid = run.sweep.grid(algo.hyper, {"learning_rate": [1e-3, 1e-2]})
    result = train(algo, tmp_path / "run", hypers=grid, num_seeds=2)
    loaded = run.load(tmp_path / "run")
    assert loaded.cells == list(grid) and loaded.algo.hyper == grid["learning_rate=0.001"]
    bits.assert_same(loaded.member(1, "learning_rate=0.01"), jax.tree.map(lambda x: x[1, 1], result.state))
    assert loaded.best_cell == result.summary["best_cell"]
    for i, (cell, reached) in enumerate(result.summary["cells"].items()):
        bits.assert_same(
            loaded.member(cell=cell),
            jax.tree.map(lambda x, i=i, s=reached: x[i, np.argmax(s["per_seed"])], result.state),
        )
    with pytest.raises(ValueError, match=r"cell must be one of learning_rate=0.001, learning_rate=0.01; got 'a'"):
        loaded.member(0, "a")
    with pytest.raises(ValueError, match="seed must be an integer between 0 and 1; got 2"):
        loaded.member(2)


@pytest.mark.slow
def test_wrappers_are_put_on_again_and_frames_that_dqn_stacks_only_once(tmp_path):
    network = nets.ValueConfig(hidden=(8,))
    config = dqn.Config(num_envs=2, learning_starts=0, batch_size=4, capacity=100, num_frames=2, network=network)
    env = envs.make("Probe-value")
    result = train(dqn.make(env, config), tmp_path / "stacked", eval_episodes=0)
    bits.assert_same(run.load(tmp_path / "stacked").state, result.state)
    wrapped = envs.wrappers.previous(envs.wrappers.sticky_actions(envs.wrappers.time_limit(env, 3)))
    result = train(ppo.make(wrapped, TINY), tmp_path / "wrapped", eval_episodes=0)
    loaded = run.load(tmp_path / "wrapped")
    bits.assert_same(loaded.state, result.state)
    assert dict(loaded.algo.env.settings)["wrappers"] == (
        "time_limit(steps=3)",
        "sticky_actions(probability=0.25)",
        "previous()",
    )


def test_a_file_of_an_environment_is_not_run_unasked(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(FILE)
    env = envs.make(tmp_path / "mine.py")
    train(ppo.make(env, TINY), tmp_path / "run")
    capsys.readouterr()
    with pytest.raises(run.RunError, match=r"is a run of mine.py, which is not run unasked: give the environment"):
        run.load(tmp_path / "run")
    assert capsys.readouterr().out == ""
    assert run.load(tmp_path / "run", env=env).env_steps == 64
    (tmp_path / "mine.py").write_text(FILE + "\nx = 1\n")
    with pytest.raises(run.RunError, match=r"is a run of mine.py as it was: the file has changed since"):
        run.load(tmp_path / "run", env=envs.make(tmp_path / "mine.py"))


def test_an_algorithm_of_one_s_own_is_given(trained, tmp_path):
    own = trained[1]._replace(name="mine")
    train(own, tmp_path / "run")
    with pytest.raises(run.RunError, match=r"'mine' is none of ppo, dqn, .*; give the algorithm, as in run.load"):
        run.load(tmp_path / "run")
    bits.assert_same(run.load(tmp_path / "run", algo=own).state, trained[2].state)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config.num_envs": "many"}, "config.num_envs is str, not int"),
        ({"config.num_envs": 3}, "of another configuration: config.num_envs was 2, is 3"),
        ({"config.network.hidden": 8}, "config.network.hidden is int, not tuple"),
        ({"config.loss": None}, "config.loss is NoneType, not str"),
        ({"config.loss": "clap"}, "config.loss must be one of clip, penalty; got 'clap'"),
        ({"env": "Pong"}, "unknown environment 'Pong'"),
        ({"cells": 3}, "is damaged: cells must be a list of labels"),
        ({"cells": []}, "is damaged: cells must be a list of labels"),
        ({"cells": [[]]}, "is damaged: cells must be a list of labels"),
        ({"env": None}, "is damaged: env is NoneType, not text"),
        ({"num_seeds": 2.0}, "is damaged: num_seeds must be an integer of at least 1; got 2.0"),
        ({"num_seeds": 10**9}, "are larger than"),
        ({"num_seeds": -1}, "num_seeds must be an integer of at least 1; got -1"),
        ({"algorithm": "os"}, "'os' is none of ppo"),
    ],
)
def test_a_configuration_that_was_changed_is_refused_in_a_line(changes, message, trained, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(sealed({"settings": run.load(trained[0]).settings | changes})))
    (tmp_path / "checkpoints").symlink_to(trained[0] / "checkpoints")
    with pytest.raises((run.RunError, ValueError), match=message) as refused:
        run.load(tmp_path)
    assert "\n" not in str(refused.value)
    if "is damaged" in message:
        for look in (compare.read, show.show, show.progress):
            with pytest.raises(run.RunError, match=message):
                look(tmp_path)


def test_a_folder_without_a_run_or_a_checkpoint_is_refused(trained, tmp_path):
    with pytest.raises(run.RunError, match=r"is not the folder of a run: it has no config.json"):
        run.load(tmp_path)
    (tmp_path / "config.json").write_bytes((trained[0] / "config.json").read_bytes())
    with pytest.raises(run.RunError, match="has no checkpoint yet"):
        run.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(run.RunError, match="has no checkpoint yet"):
        run.load(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


# Going on from it


@pytest.mark.parametrize("module", [ppo, dqn, pqn])
def test_a_run_starts_from_a_trained_state(module, trained, key):
    config = {
        ppo: TINY,
        dqn: dqn.Config(
            num_envs=2, learning_starts=0, batch_size=4, capacity=100, network=nets.ValueConfig(hidden=(8,))
        ),
        pqn: pqn.Config(num_envs=2, num_steps=8, num_minibatches=2, network=nets.ValueConfig(hidden=(8,))),
    }[module]
    env = envs.make("Probe-action")
    first = module.make(env, config)
    state = jax.jit(first.update)(jax.jit(first.init)(key))[0]
    second = module.make(env, config, module.Hyper(learning_rate=0.5), start=state)
    begun = jax.jit(second.init)(jax.random.key(7))
    bits.assert_same(begun.params, state.params)
    if module is dqn:
        bits.assert_same(begun.target_params, state.params)
    assert begun.updates == 0 and begun.hyper.learning_rate == 0.5
    jax.eval_shape(second.update, begun)


def test_statistics_of_observations_go_on_and_averages_are_what_is_gone_on_from(key):
    optimizer = ppo.optim.OptimizerConfig("adam", ema=True)
    config = ppo.Config(num_envs=2, num_steps=8, num_minibatches=2, normalize_observations=True, optimizer=optimizer)
    env = envs.make("Probe-value")
    first = ppo.make(env, config)
    state = jax.jit(first.update)(jax.jit(first.init)(key))[0]
    begun = jax.jit(ppo.make(env, config, start=state).init)(key)
    bits.assert_same(begun.obs_stats, state.obs_stats)
    bits.assert_same(begun.params, ppo.optim.eval_params(state.opt_state, state.params))
    with pytest.raises(ValueError, match=r"normalized observations: config.normalize_observations must be True"):
        ppo.make(env, TINY, start=state)
    with pytest.raises(ValueError, match=r"start: parameters of the network must be .*; got "):
        ppo.make(env, TINY, start=state._replace(obs_stats=None))
    with pytest.raises(ValueError, match="start must have params, opt_state; got 3, a int"):
        ppo.make(env, TINY, start=3)


# An optimizer of one's own


def test_an_optimizer_that_settings_describe_gives_the_same_as_one_s_own(key):
    env = envs.make("Probe-value")

    def own(hyper, learning_rate):
        return optax.chain(optax.clip_by_global_norm(hyper.max_grad_norm), optax.adam(learning_rate, eps=1e-5))

    states = []
    for algo in (ppo.make(env, TINY), ppo.make(env, TINY, optimizer=own)):
        state = jax.jit(algo.init, static_argnums=2)(key, None, 4)  # the learning rate falls
        update = jax.jit(algo.update)
        for _ in range(3):
            state, _ = update(state)
        states.append(state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *(s.params for s in states))


def test_any_transformation_will_do_and_hyperparameters_are_swept(key):
    env = envs.make("Probe-policy")
    fixed = ppo.make(env, TINY, optimizer=optax.sgd(0.0))
    state = jax.jit(fixed.init)(key)
    bits.assert_same(jax.jit(fixed.update)(state)[0].params, state.params)
    swept = ppo.make(env, TINY, optimizer=lambda hyper, learning_rate: optax.sgd(learning_rate))
    hypers = jax.tree.map(lambda x: jnp.array([x, x]), swept.hyper)._replace(learning_rate=jnp.array([0.0, 0.1]))
    states = jax.jit(jax.vmap(lambda h: swept.update(swept.init(key, h))[0]))(hypers)
    kernel = states.params["params"]["policy"]["out"]["kernel"]
    bits.assert_same(kernel[0], state.params["params"]["policy"]["out"]["kernel"])
    assert (kernel[0] != kernel[1]).any()


@pytest.mark.slow
def test_a_run_with_an_optimizer_of_one_s_own_is_loaded_with_its_algorithm(tmp_path):
    algo = ppo.make(envs.make("Probe-policy"), TINY, optimizer=optax.adam(1e-3))
    train(algo, tmp_path / "run", eval_episodes=0)
    assert run.load(tmp_path / "run", algo=algo).env_steps == 64
    with pytest.raises(run.RunError, match=r"its optimizer is of its author's; give the algorithm"):
        run.load(tmp_path / "run")
    with pytest.raises(run.RunError, match=r"own was .*optimizer.*, is null"):
        run.load(tmp_path / "run", algo=ppo.make(envs.make("Probe-policy"), TINY))


@pytest.mark.parametrize("precision", ["pure_bfloat16", "float16"])
def test_an_optimizer_of_one_s_own_computes_in_float32(precision, key):
    config = dataclasses.replace(TINY, precision=precision)
    algo = ppo.make(envs.make("Probe-policy"), config, optimizer=lambda hyper, learning_rate: optax.adam(learning_rate))
    state, metrics = jax.jit(lambda key: algo.update(algo.init(key)))(key)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert moments and all(x.dtype == jnp.float32 for x in moments) and jnp.isfinite(metrics["loss"])


@pytest.mark.parametrize("wrong, said", [(3, "got 3"), (lambda hyper, lr: lr, "which gives")])
def test_what_is_no_optimizer_is_refused_before_anything_is_compiled(wrong, said, key):
    algo = ppo.make(envs.make("Probe-value"), TINY, optimizer=wrong)
    with pytest.raises(ValueError, match=f"optimizer must be an optax transformation, or a function .*{said}"):
        run.train(algo, key, 64, progress=False)


def test_the_command_line_starts_from_a_folder(trained, tmp_path, monkeypatch, capsys):
    import processes

    folder = Path(trained[0])
    words = ("--env", "CartPole-v1", "--config.network.hidden", "4", "--start", folder, "--run-dir", tmp_path / "run")
    code, said = processes.refused("ppo", words, monkeypatch, capsys)
    assert code == 1 and "its config.network.hidden is [8], this run's [4]" in said
    words = (*words[:3], "8", "--config.network.activation", "relu", *words[4:])  # parameters alone do not tell
    code, said = processes.refused("ppo", words, monkeypatch, capsys)
    assert code == 1 and "its config.network.activation is tanh, this run's relu" in said
    code, said = processes.refused("ppo", ("--start", tmp_path), monkeypatch, capsys)
    assert code == 1 and "is not the folder of a run" in said


@pytest.mark.slow
def test_the_checkpoint_of_the_best_evaluation_is_kept(tmp_path, monkeypatch):
    told = iter([1.0, 3.0, 2.0, 3.0])  # by the evaluations after each of 4 updates

    def fake(self, states, seed, broken):
        score = {"iqm": next(told), "ci_low": None, "ci_high": None, "per_seed": [1.0, 2.0, 3.0], "unfinished": 0}
        return {"": score | {"mode": "greedy", "sampled": score}}

    monkeypatch.setattr(scores.Scorer, "__call__", fake)
    algo = ppo.make(envs.make("Probe-policy"), TINY)
    every = algo.env_steps_per_update
    result = train(algo, tmp_path / "run", eval_every=every)
    best, last = (run.load(tmp_path / "run", best=best) for best in (True, False))
    assert (best.env_steps, last.env_steps) == (2 * every, 4 * every)
    bits.assert_same(last.state, result.state)
    assert (best.state.updates == 2).all() and [path.name for path in (tmp_path / "run/best").iterdir()] == ["2"]
    train(algo, tmp_path / "plain", eval_episodes=0)
    with pytest.raises(run.RunError, match="plain has no best evaluation: a run keeps one with eval_every"):
        run.load(tmp_path / "plain", best=True)


@pytest.mark.slow
def test_an_episode_of_a_run_is_recorded(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(ppo.make(envs.make("Catch-bsuite"), TINY), tmp_path / "run")
    command.run(["record", "run"])
    assert capsys.readouterr().out == "policy.gif: 9 steps\n" and (tmp_path / "policy.gif").read_bytes()[:3] == b"GIF"
    for words, message in {
        ("--out", "no/policy.gif"): "no such folder: no",
        ("--out", "policy.svg"): "Catch-bsuite is drawn into files .gif or .mp4; got .svg",
        ("--best",): "run has no best evaluation",
        ("--seed", "7"): "seed must be an integer between 0 and",
    }.items():
        with pytest.raises((ValueError, run.RunError), match=message):
            command.run(["record", "run", *words])


@pytest.mark.skipif(importlib.util.find_spec("imageio_ffmpeg") is None, reason="needs imageio-ffmpeg")
def test_pictures_become_an_mp4(tmp_path):
    frames = [np.full((31, 40, 3), shade, np.uint8) for shade in range(0, 250, 10)]
    pictures.animate(frames, str(tmp_path / "a.mp4"))
    assert (tmp_path / "a.mp4").read_bytes()[4:8] == b"ftyp"
    pictures.animate(frames, str(tmp_path / "a.gif"))
    again = pictures.frames_of(str(tmp_path / "a.gif"))
    assert len(again) == 25 and again[3].shape == (31, 40, 3)


def test_what_was_meant_otherwise_is_said_in_one_line(trained, tmp_path):
    folder, _, _ = trained
    loaded = run.load(folder)
    for function in (
        lambda state: run.evaluate(loaded.algo, state, jax.random.key(0), 1),
        lambda state: run.record(loaded.algo, state, jax.random.key(0), tmp_path / "a.gif"),
    ):
        with pytest.raises(ValueError, match=r"the state must be of one seed, as loaded.member\(\) gives it"):
            function(loaded.state)
    with pytest.raises(ValueError, match=r"run.load: env must be a .*Environment; got 'CartPole-v1'"):
        run.load(folder, env="CartPole-v1")
    env = envs.make("Probe-value")
    with pytest.raises(ValueError, match=r"optimizer: optax.adam must be called, as in optax.adam\(1e-3\)"):
        jax.eval_shape(ppo.make(env, TINY, optimizer=optax.adam).init, jax.random.key(0))
    raw = ppo.make(env, TINY)
    with pytest.raises(ValueError, match="start was trained on observations as they are"):
        ppo.make(env, dataclasses.replace(TINY, normalize_observations=True), start=raw.init(jax.random.key(0)))
