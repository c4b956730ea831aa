"""What every algorithm of a language model promises."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jrl import run
from jrl.algos import grpo, ppo_lm, sft
from jrl.lm import tasks
from jrl.nets import adapters, transformer
from jrl.numerics import optim
from jrl.run import checkpoint, folders

TASK = tasks.make("modular_addition", modulus=3)
SHAPE = transformer.Config(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=16)
CONFIGS = {
    "sft": sft.Config(SHAPE, batch_size=2),
    "ppo_lm": ppo_lm.Config(SHAPE, num_answers=4),
    **{
        name: grpo.method(name, grpo.Config(SHAPE, num_prompts=2, group_size=2, supervised=1))[0]
        for name in ("grpo", "dapo", "reinforce++")
    },
}
MODULES = {"sft": sft, "ppo_lm": ppo_lm}


def make(name, config=None, task=TASK):
    return MODULES.get(name, grpo).make(task, config or CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_length_of_a_run_may_be_traced(name):
    state = jax.eval_shape(make(name).init, jax.random.key(0), None, jax.ShapeDtypeStruct((), jnp.int32))
    assert (state.num_updates.shape, state.num_updates.dtype) == ((), jnp.int32)


@pytest.mark.parametrize(
    "name, message",
    [
        ("dapo", "accumulate must be 1 .*; got 2: take config.micro_batches, which add up exactly"),
        ("ppo_lm", "accumulate must be 1 .*; got 2: take fewer config.num_minibatches"),
        ("sft", "accumulate must be 1 .*; got 2: take a larger config.batch_size"),
    ],
)
def test_means_over_tokens_are_not_accumulated(name, message):
    """Two micro-batches of 1 and 3 tokens: the mean of their means weighs the first token 1/2, the mean over all 1/4."""
    with pytest.raises(ValueError, match=message):
        make(name, replace(CONFIGS[name], optimizer=optim.OptimizerConfig("adamw", accumulate=2)))


def test_means_over_answers_are_accumulated():
    assert make("grpo", replace(CONFIGS["grpo"], optimizer=optim.OptimizerConfig(accumulate=2))).name == "grpo"


@pytest.mark.thorough(1)
@pytest.mark.parametrize("name", ["sft", "ppo_lm", "grpo"])
def test_a_raw_key_will_do(name):
    """One of ``jax.random.PRNGKey``, wherever a key is taken."""
    algo, raw = make(name), jax.ShapeDtypeStruct((2,), jnp.uint32)
    state = jax.eval_shape(algo.init, raw)
    jax.eval_shape(algo.update, state)
    jax.eval_shape(algo.act, state, jax.ShapeDtypeStruct((), jnp.int32), raw)
    jax.eval_shape(run.train_fn(algo, 10 * algo.env_steps_per_update), raw)


@pytest.mark.parametrize(
    "name, part", [("grpo", "episode_return"), ("grpo", "loss"), ("grpo", "reward"), ("ppo_lm", "policy_loss"), ("ppo_lm", "kl")]
)  # fmt: skip
def test_a_part_may_not_hide_a_metric(name, part):
    def verify(*args):
        return TASK.verify(*args) | {part: jnp.float32(0)}

    algo = make(name, task=TASK._replace(verify=verify))
    with pytest.raises(ValueError, match=f"verify's parts may not have the name of a metric: {part}"):
        jax.eval_shape(lambda key: algo.update(algo.init(key)), jax.random.key(0))


def dtypes(function, *args):
    found = jax.tree.leaves_with_path(jax.eval_shape(function, *args))
    return {jax.tree_util.keystr(path): (x.shape, x.dtype) for path, x in found}


VARIANTS = {
    "parts": {"micro_batches": 2, "kl": "exact", "adapter": adapters.Config("lora", rank=2), "top_k": 3, "overlong": 1, "oversample": 2},
    "recomputed": {"old_log_probs": "recomputed", "truncated_importance": True, "kl": "k3", "min_p": 0.1, "precision": "bfloat16"},
    "constant": {"reduction": "constant", "advantage": "rloo", "loss": "gspo", "top_p": 0.9},
}  # fmt: skip


@pytest.mark.thorough(3)
@pytest.mark.parametrize("name", [*CONFIGS, *VARIANTS])
def test_with_float64_at_hand_everything_stays_as_it_is(name):
    config = replace(CONFIGS["grpo"], **VARIANTS[name]) if name in VARIANTS else CONFIGS[name]

    def found():
        algo = make(name, config)
        key = jax.eval_shape(jax.random.key, 0)
        state = jax.eval_shape(algo.init, key)
        token = jax.ShapeDtypeStruct((), jnp.int32)
        return dtypes(lambda s, k, t: (s, algo.update(s), algo.act(s, t, k)), state, key, token)

    usual = found()
    with jax.enable_x64(True):
        assert found() == usual


@pytest.mark.parametrize("name", tasks.names())
def test_tasks_have_the_same_types_with_float64_at_hand(name):
    def found():
        task = tasks.make(name)

        def one(key):
            problem = task.draw(key)
            tokens = task.demonstrate(problem)
            return problem, tokens, task.verify(problem, tokens, tasks.answer_mask(tokens))

        return dtypes(one, jax.eval_shape(jax.random.key, 0))

    usual = found()
    with jax.enable_x64(True):
        assert found() == usual


def test_settings_that_change_no_mathematics_may_change_on_resume(tmp_path):
    config = CONFIGS["grpo"]
    algo = make("grpo", config)

    def settings(config):
        return folders.settings(make("grpo", config), jax.random.key(0), 100, 1, {"": algo.hyper}, 1)

    model = replace(config.model, remat=True, implementation="reference")
    free, other = replace(config, model=model, micro_batches=2), replace(config, num_epochs=2)
    checkpoint.same_config(settings(config), settings(free), tmp_path)
    with pytest.raises(checkpoint.RunError, match=r"another configuration: config.num_epochs was 1, is 2$"):
        checkpoint.same_config(settings(config), settings(other), tmp_path)
