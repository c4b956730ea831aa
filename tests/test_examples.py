"""The single files of ``examples/`` give the numbers of ``jrl`` at equal settings, and are short enough to read."""

import ast
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from processes import ROOT

from jrl.algos import dqn, grpo, ppo
from jrl.attention import nsa
from jrl.lm import tasks
from jrl.nets import ValueConfig, transformer
from jrl.numerics import optim

RANK_PROMOTION = "allow"  # the examples add biases as one writes them
FILES = sorted((ROOT / "examples").glob("*.py"))
ALLOWED = {"jax", "optax", "jrl.equations", "jrl.envs"} | sys.stdlib_module_names


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def imports(path):
    """What a file imports, ``jrl`` to the room: ``from jrl import envs`` is ``jrl.envs``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "jrl":
            yield from (f"jrl.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".")
            yield ".".join(parts[:2]) if parts[0] == "jrl" else parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_at_most_200_lines_and_imports_only_jax_optax_equations_and_environments(path):
    assert len(path.read_text().splitlines()) <= 200
    assert set(imports(path)) <= ALLOWED


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_trains_many_seeds_in_one_program(path):
    example = load(path.stem)
    state, metrics = jax.eval_shape(jax.vmap(example.train), jax.random.split(jax.random.key(0), 3))
    assert {x.shape for x in jax.tree.leaves(metrics)} == {(3, example.NUM_UPDATES)}
    assert {x.shape[0] for x in jax.tree.leaves(state)} == {3}


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def agree(example, mine, algo, theirs, params_of, metrics, num_updates=3):
    """Updates of the example and of jrl from one state: the same metrics, parameters and moments of Adam, and the same next key.

    What is drawn from keys is the same to the bit. Sums are not: they are added in another order in another program. Adam's first
    moment is a mean of gradients, so that these agree too.
    """
    with jax.debug_key_reuse(True):
        mine, found = jax.jit(lambda s: jax.lax.scan(example.update, s, length=num_updates))(mine)
    theirs, expected = jax.jit(lambda s: jax.lax.scan(lambda s, _: algo.update(s), s, length=num_updates))(theirs)
    for name, its_name in metrics.items():
        close(found[name][-1], expected[its_name][-1])
    moments = [[optax.tree.get(state.opt_state, name) for state in (mine, theirs)] for name in ("mu", "nu")]
    for a, b in [(mine.params, theirs.params), *moments]:
        jax.tree.map(close, a, params_of(b))
    np.testing.assert_array_equal(*map(jax.random.key_data, (mine.key, theirs.key)))
    return mine, theirs


def dense(*layers):
    """Layers of flax in the examples' layout."""
    return [(layer["kernel"], layer["bias"]) for layer in layers]


def test_three_updates_of_ppo_are_those_of_jrl(monkeypatch):
    example = load("ppo")
    config = ppo.Config(
        num_envs=example.NUM_ENVS,
        num_steps=example.NUM_STEPS,
        num_epochs=example.NUM_EPOCHS,
        num_minibatches=example.NUM_MINIBATCHES,
        value_clip=False,
    )
    hyper = ppo.Hyper(
        learning_rate=example.LEARNING_RATE,
        gamma=example.GAMMA,
        gae_lambda=example.LAMBDA,
        clip_eps=example.CLIP_EPS,
        entropy_weight=example.ENTROPY_WEIGHT,
        value_weight=example.VALUE_WEIGHT,
        max_grad_norm=example.MAX_GRAD_NORM,
    )
    algo = ppo.make(example.ENV, config, hyper)

    def params_of(tree):
        p = tree["params"]
        return {
            "policy": dense(p["actor"]["Dense_0"], p["actor"]["Dense_1"], p["policy"]["out"]),
            "value": dense(p["critic"]["Dense_0"], p["critic"]["Dense_1"], p["value"]),
        }

    key = jax.random.key(3)
    theirs = jax.jit(algo.init)(key, hyper, example.NUM_UPDATES)
    monkeypatch.setattr(example, "init_params", lambda key: params_of(theirs.params))
    mine = jax.jit(example.init)(key)
    mine, theirs = agree(example, mine, algo, theirs, params_of, {"loss": "loss", "episodes": "episodes"})
    close(mine.obs, theirs.actors.obs)


def test_a_truncated_episode_of_ppo_keeps_the_value_of_its_last_observation(monkeypatch):
    example = load("ppo")
    monkeypatch.setattr(example, "value", lambda params, obs: obs)
    monkeypatch.setattr(example, "LAMBDA", 1.0)
    terminated = jnp.array([[True, False], [False, True]])  # [T, B]; a step that does not terminate truncates
    first, last, reward = jnp.zeros((2, 2)), jnp.full((2, 2), 10.0), jnp.ones((2, 2))
    steps = example.Step(first, None, None, reward, terminated, ~terminated, last)
    advantage, target = example.advantages(None, steps)
    np.testing.assert_allclose(advantage, [[1.0, 1 + 0.99 * 10], [1 + 0.99 * 10, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(target, advantage)


def test_the_updates_of_dqn_are_those_of_jrl_once_the_replay_is_full(monkeypatch):
    example = load("dqn")
    monkeypatch.setattr(example, "NUM_UPDATES", 30)
    monkeypatch.setattr(example, "REPLAY_LENGTH", 20)
    monkeypatch.setattr(example, "LEARNING_STARTS", 20 * example.NUM_ENVS)
    monkeypatch.setattr(example, "TARGET_EVERY", 11)
    config = dqn.Config(
        num_envs=example.NUM_ENVS,
        batch_size=example.BATCH_SIZE,
        # A row of jrl's replay finds its next observation in the row after it, so that the newest row cannot be drawn.
        capacity=(example.REPLAY_LENGTH + 1) * example.NUM_ENVS,
        learning_starts=example.LEARNING_STARTS,
        target_every=example.TARGET_EVERY,
        double=False,
        loss="squared",
        network=ValueConfig(hidden=(example.WIDTH, example.WIDTH), norm="none"),
    )
    hyper = dqn.Hyper(
        learning_rate=example.LEARNING_RATE,
        gamma=example.GAMMA,
        epsilon_start=example.EPSILON_START,
        epsilon_end=example.EPSILON_END,
        epsilon_fraction=example.EPSILON_FRACTION,
        max_grad_norm=example.MAX_GRAD_NORM,
    )
    algo = dqn.make(example.ENV, config, hyper)

    def params_of(tree):
        return dense(tree["params"]["torso"]["Dense_0"], tree["params"]["torso"]["Dense_1"], tree["params"]["values"])

    key = jax.random.key(3)
    theirs = jax.jit(algo.init)(key, hyper, example.NUM_UPDATES)
    monkeypatch.setattr(example, "init_params", lambda key: params_of(theirs.params))
    mine = jax.jit(example.init)(key)
    metrics = {"loss": "objective", "episodes": "episodes"}
    mine, theirs = agree(example, mine, algo, theirs, params_of, metrics, num_updates=24)
    close(mine.obs, theirs.actors.obs)
    jax.tree.map(close, mine.target_params, params_of(theirs.target_params))


@pytest.mark.slow
def test_three_updates_of_grpo_are_those_of_jrl():
    example = load("grpo")
    config = grpo.Config(
        model=transformer.Config(
            dim=example.DIM,
            num_layers=example.NUM_LAYERS,
            num_heads=example.NUM_HEADS,
            num_kv_heads=example.NUM_HEADS,
            head_dim=example.HEAD_DIM,
            ffn_dim=example.FFN_DIM,
        ),
        num_prompts=example.NUM_PROMPTS,
        group_size=example.GROUP_SIZE,
        num_epochs=example.NUM_EPOCHS,
        kl="k3",
        optimizer=optim.OptimizerConfig("adam"),
    )
    hyper = grpo.Hyper(
        learning_rate=example.LEARNING_RATE,
        clip_low=example.CLIP_EPS,
        clip_high=example.CLIP_EPS,
        kl_weight=example.KL_WEIGHT,
        entropy_weight=example.ENTROPY_WEIGHT,
        max_grad_norm=example.MAX_GRAD_NORM,
    )
    algo = grpo.make(tasks.make("modular_addition", modulus=example.MODULUS), config, hyper)

    def params_of(tree):
        """Layers of ``transformer`` are stacked, and have keys and values by branch."""
        stacked = tree["layers"] | {name: tree["layers"][name][:, 0] for name in "kv"}
        layers = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(example.NUM_LAYERS)]
        return {"embedding": tree["embedding"], "layers": layers, "norm": tree["norm"]}

    theirs = jax.jit(algo.init)(jax.random.key(3), hyper, example.NUM_UPDATES)
    params = params_of(theirs.params)
    mine = example.State(params, params, example.optimizer(0).init(params), theirs.key, theirs.updates)
    agree(example, mine, algo, theirs, params_of, {"loss": "loss", "reward": "reward"})


def test_the_decoder_of_nsa_gives_the_logits_of_jrl(monkeypatch):
    example = load("nsa")
    monkeypatch.setattr(example, "NUM_LAYERS", 1)
    sizes = (example.BLOCK, example.STRIDE, example.SELECT_BLOCK, example.SELECTED)
    config = transformer.Config(
        vocab_size=example.VOCAB_SIZE,
        dim=example.DIM,
        num_layers=example.NUM_LAYERS,
        num_heads=example.NUM_HEADS,
        num_kv_heads=example.KV_HEADS,
        head_dim=example.HEAD_DIM,
        ffn_dim=example.FFN_DIM,
        attention="nsa",
        sparse=nsa.Config(*sizes, initial=1, local=1, window=example.WINDOW),
    )
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(example.init_params, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.float32(0.2 * draw.normal(size=x.shape)), shapes)
    tokens = draw.integers(0, example.VOCAB_SIZE, (2, example.LENGTH))

    def phi(p):
        return p | {"b_in": jnp.zeros(p["w_in"].shape[1]), "b_out": jnp.zeros(p["w_out"].shape[1])}

    [layer] = params["layers"]
    layer = layer | {
        "compress": {"k": phi(layer["phi_k"]), "v": phi(layer["phi_v"])},
        "branch_gate_bias": jnp.zeros((example.NUM_HEADS, 3)),
    }
    stacked = params | {"layers": jax.tree.map(lambda x: x[None], layer)}
    expected = jax.jit(lambda: transformer.forward(stacked, tokens, config))()
    np.testing.assert_allclose(jax.jit(example.next_token_logits)(params, tokens), expected, atol=2e-6)
