"""GRPO: every method learns from what it sampled, gradients do not depend on the split, groups without signal teach nothing."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import algorithm, run
from jrl.algos import grpo, ppo_lm, sft
from jrl.attention import mla
from jrl.equations import token_losses
from jrl.lm import groups, tasks
from jrl.lm.policy import language_model
from jrl.lm.sampling import Rollout
from jrl.nets import adapters, decoding, moe, transformer
from jrl.numerics import lora, optim

TASK = tasks.make("modular_addition", modulus=3)
SHAPE = transformer.Config(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=16)
EXPERTS = [replace(SHAPE, experts=moe.Config(4, expert_dim=8, scores=scores)) for scores in ("softmax", "sigmoid")]
TINY = grpo.Config(model=SHAPE, num_prompts=4, group_size=4, optimizer=optim.OptimizerConfig("adam"))


def one_update(config, hyper=grpo.Hyper(close_weight=0.5), seeds=1):
    algo = algorithm.over_seeds(grpo.make(TASK, config, hyper))
    with jax.debug_key_reuse(True):
        state = jax.jit(algo.init)(jax.random.split(jax.random.key(0), seeds))
        return jax.jit(algo.update)(state)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "reinforce++"])  # each loss and advantage there is
def test_every_method_takes_a_step(name):
    config, hyper = grpo.method(name, TINY, grpo.Hyper(close_weight=0.5))
    state, metrics = one_update(config, hyper, seeds=2)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, metrics)))
    # What was sampled is what is scored: before the first step no ratio differs from 1.
    np.testing.assert_allclose(metrics["effective_sample_size"], 1, atol=1e-5)
    assert not np.asarray(metrics["clip_fraction_low"] + metrics["clip_fraction_high"]).any() or name == "gspo"


@pytest.fixture(scope="module")
def answered():
    """A learner of each config, and the same answers and rewards for all."""
    problems = jax.vmap(TASK.draw)(jax.random.split(jax.random.key(1), 4))
    problems = jax.tree.map(lambda x: jnp.repeat(x, 4, 0), problems)

    def learn(config, reward=jax.random.uniform(jax.random.key(3), (16,)), change=lambda rollout: rollout):
        model = language_model(TASK, config.model, "float32")
        learner = grpo.learner(model, config, length=2, end=tasks.END, pad=tasks.PAD)
        hyper = grpo.Hyper(learning_rate=0.01, temperature=0.7, balance_weight=1.0)
        state = jax.jit(learner.init)(jax.random.key(2), model.init(jax.random.key(0)), hyper)
        rollout = change(jax.jit(learner.sample)(state, jax.random.key(4), problems.prompt, problems.valid))
        learned = jax.jit(learner.learn)(state, jax.random.key(5), problems.prompt, problems.valid, rollout, reward)
        return (state, *learned)

    return learn


def close(a, b, atol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "reduction, shape",
    [("sequence_mean", SHAPE), ("token_mean", EXPERTS[0]), ("constant", EXPERTS[1])],
    ids=["sequence_mean", "token_mean-softmax", "constant-sigmoid"],
)
def test_micro_batches_change_no_gradient_and_no_load_of_experts(answered, reduction, shape):
    config = replace(TINY, model=shape, reduction=reduction, kl="k3")
    _, whole, metrics = answered(config)
    _, split, same = answered(replace(config, micro_batches=4))
    np.testing.assert_allclose(metrics["grad_norm"], same["grad_norm"], rtol=1e-4)
    close(whole.params, split.params)
    assert np.asarray(whole.params["layers"].get("bias", 1)).any()


@pytest.mark.slow
def test_recomputed_log_probabilities_are_the_samplers(answered):
    config = replace(TINY, num_epochs=2, num_minibatches=2, top_k=4)
    close(answered(config)[1].params, answered(replace(config, old_log_probs="recomputed"))[1].params)


def test_groups_without_signal_teach_nothing(answered):
    before, after, metrics = answered(TINY, reward=jnp.repeat(jnp.arange(4.0), 4))
    assert metrics["grad_norm"] == 0 and metrics["no_signal"] == 1
    close(before.params, after.params)


def test_dynamic_sampling_goes_by_right_answers_whatever_else_is_rewarded():
    config = replace(TINY, num_prompts=2, group_size=2, oversample=2)
    parts = {"correct": jnp.array([1.0, 1, 0, 0, 0, 1, 1, 0]), "format": jnp.array([0.0, 1, 0, 1, 1, 0, 1, 1])}
    mask = jnp.ones((8, 2), bool)
    assert groups.informative(parts["correct"], mask, config.group_size, config.num_prompts).tolist() == [4, 5, 6, 7]
    # The total reward misleads: it differs within the groups that are all right or all wrong, and is equal in the first mixed one.
    reward = grpo.rewards(config, grpo.Hyper(format_weight=1.0), parts, mask)
    assert token_losses.varied(reward, 2).tolist() == [True, True, False, True]
    # An answer that nobody judged makes no group mixed.
    assert groups.informative(
        parts["correct"], mask.at[4].set(False), config.group_size, config.num_prompts
    ).tolist() == [6, 7, 0, 1]


def test_a_task_with_a_format_learns_from_mixed_groups_first(monkeypatch):
    """The format is worth ten right answers, and of a group that differs in it all may be wrong."""
    learner = grpo.learner

    def show(*args, **kwargs):
        return learner(*args, **kwargs)._replace(learn=lambda state, *batch: (state, {"learned_from": batch[-1]}))

    def verify(problem, tokens, mask):
        return {"correct": (tokens[0] == 1).astype(jnp.float32), "format": (tokens[0] % 2).astype(jnp.float32)}

    monkeypatch.setattr(grpo, "learner", show)
    config = replace(TINY, num_prompts=2, group_size=2, oversample=8)
    algo = grpo.make(TASK._replace(verify=verify), config, grpo.Hyper(format_weight=10.0))
    reward = jax.jit(lambda key: algo.update(algo.init(key))[1])(jax.random.key(0))["learned_from"]
    assert ((np.asarray(reward) == 11).reshape(2, 2).sum(1) == 1).all()


@pytest.mark.parametrize("name", grpo.METHODS)
def test_answers_that_nobody_judged_have_no_part_in_their_group(name):
    config, hyper = grpo.method(name, replace(TINY, group_size=3))
    reward, log_prob, mask = jnp.array([0.0, 1, 99, 3]), jnp.zeros((4, 2)), jnp.ones((4, 2), bool).at[2].set(False)
    found = grpo.advantages(replace(config, group_size=4), hyper, reward, log_prob, log_prob, mask)
    rest = jnp.array([0, 1, 3])
    three = grpo.advantages(config, hyper, reward[rest], log_prob[rest], log_prob[rest], mask[rest])
    np.testing.assert_allclose(found[rest], three, rtol=1e-6)
    assert (found[2] == 0).all()
    metrics = groups.drawn(reward, mask, 4)
    assert (metrics["episodes"], metrics["episode_length"]) == (3, 2)
    np.testing.assert_allclose(metrics["reward"], 4 / 3, rtol=1e-6)


def test_what_stands_behind_the_end_does_not_matter(answered):
    def spoiled(rollout: Rollout) -> Rollout:
        return rollout._replace(tokens=jnp.where(rollout.mask, rollout.tokens, 3))

    close(answered(TINY)[1].params, answered(TINY, change=spoiled)[1].params)


@pytest.mark.slow
def test_a_frozen_base_serves_as_the_reference(answered):
    before, after, metrics = answered(replace(TINY, adapter=adapters.Config("lora", rank=2), kl="exact"))
    close(before.frozen, after.frozen)
    np.testing.assert_allclose(metrics["kl"], 0, atol=1e-6)  # at first the adapters do nothing
    assert sum(x.size for x in jax.tree.leaves(after.params)) < sum(x.size for x in jax.tree.leaves(after.frozen))
    assert any(np.asarray(x).any() for name in after.params for x in [after.params[name]["b"]])


@pytest.mark.slow
def test_runs_with_a_supervised_start_resume_bit_for_bit(tmp_path):
    algo = grpo.make(TASK, replace(TINY, kl="k3", supervised=2, oversample=2), grpo.Hyper())
    steps, options = algo.env_steps_per_update, {"num_seeds": 2, "eval_episodes": 8, "progress": False}
    first = run.train(algo, jax.random.key(0), 3 * steps, run_dir=tmp_path / "a", **options)
    again = run.train(algo, jax.random.key(0), 3 * steps, run_dir=tmp_path / "a", resume=True, **options)
    for a, b in zip(jax.tree.leaves(first.state.params), jax.tree.leaves(again.state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert 0 <= first.summary["eval"]["iqm"] <= 1


@pytest.mark.slow
def test_supervised_learning_learns_from_the_demonstrations():
    algo = sft.make(TASK, sft.Config(model=SHAPE, batch_size=32), sft.Hyper(learning_rate=0.01))
    result = run.train(algo, jax.random.key(0), 150 * algo.env_steps_per_update, num_seeds=2, progress=False)
    loss = np.asarray(result.metrics["loss"])
    # To guess one of three residues and end costs log(3) / 2 a token.
    assert (loss[:, 0] > 1.5).all() and (loss[:, -5:].mean(1) < 0.65).all() and loss[:, -5:].min() < 0.5


def test_adapters_merge_and_name_what_is_there():
    params = transformer.init(jax.random.key(0), replace(SHAPE, vocab_size=5))
    for adapter in (lora.full(), lora.subset("norm$"), lora.lora(2)):
        close(adapter.merge(params, adapter.init(jax.random.key(1), params)), params)
    chosen = lora.subset("norm$").init(jax.random.key(1), params)
    assert set(chosen) == {"norm", "layers/attention_norm", "layers/ffn_norm"}
    with pytest.raises(ValueError, match="no parameter matches 'keys'; there are embedding, layers/attention_norm"):
        lora.lora(2, pattern="keys").init(jax.random.key(1), params)
    trained = lora.lora(2, 4.0, pattern="/k$").init(jax.random.key(1), params)["layers/k"]
    trained = {"a": trained["a"], "b": trained["b"] + 1}
    merged = lora.lora(2, 4.0, pattern="/k$").merge(params, {"layers/k": trained})
    change = np.asarray(merged["layers"]["k"] - params["layers"]["k"]).reshape(16, -1)
    np.testing.assert_allclose(change, 2.0 * np.asarray(trained["a"][0, 0] @ trained["b"][0, 0]), atol=1e-5)


@pytest.mark.parametrize("attention, path, a, b", [
    ("rwkv", "layers/k", (1, 16, 2), (1, 2, 16)),
    ("mla", "layers/latent/up_key", (1, 8, 2), (1, 2, 8)),
    ("dense", "layers/o", (1, 16, 2), (1, 2, 16)),
])  # fmt: skip
def test_adapters_of_every_kind_of_attention_are_those_of_its_matrices(attention, path, a, b):
    latent = mla.Config(latent=8, nope_dim=4, rope_dim=4, value_dim=4)
    config = replace(SHAPE, vocab_size=5, attention=attention, latent=latent, num_kv_heads=2)
    params = transformer.init(jax.random.key(0), config)
    trained = lora.lora(2, pattern="/(k|o|up_key)$").init(jax.random.key(1), params)[path]
    assert (trained["a"].shape, trained["b"].shape) == (a, b)
    with pytest.raises(ValueError, match=r"layers/attention_norm \[1, 16\] is no matrix"):
        lora.lora(2, pattern="attention_norm").init(jax.random.key(1), params)


@pytest.mark.slow
@pytest.mark.parametrize("more", [
    {}, {"dense_layers": 1, "experts": moe.Config(2, expert_dim=8)}, {"attention": "nsa"}, {"attention": "mla"}, {"attention": "rwkv"},
], ids=["dense", "experts", "nsa", "mla", "rwkv"])  # fmt: skip
def test_adapters_beside_the_matrices_compute_what_merged_ones_do(more):
    """A whole sequence, its gradient, and a step behind a cache."""
    latent = mla.Config(latent=8, nope_dim=4, rope_dim=4, value_dim=4)
    config = replace(SHAPE, vocab_size=5, num_layers=2, num_kv_heads=2, latent=latent, **more)
    params, adapter = transformer.init(jax.random.key(0), config), lora.lora(2, 4.0, pattern="/(q|k|v|r|o|gate|up)$")
    trained = adapter.init(jax.random.key(1), params)
    trained = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape, x.dtype), trained)
    tokens = jax.random.randint(jax.random.key(3), (2, 6), 0, 5)

    def computed(trained, combine):
        combined = combine(params, trained)
        cache = decoding.init_cache(config, 2, 8)
        _, cache = decoding.prefill(combined, tokens, cache, config)
        step, _ = decoding.decode(combined, tokens[:, 0], cache, jnp.int32(6), config)
        return transformer.forward(combined, tokens, config), step

    def beside(params, trained):
        return adapter.beside(params, trained, transformer.low_rank(config))

    one, other = (jax.jit(lambda t, c=c: computed(t, c))(trained) for c in (adapter.merge, beside))
    close(one, other, 1e-5)
    slopes = [
        jax.jit(jax.grad(lambda t, c=c: jnp.sum(jnp.sin(computed(t, c)[0]))))(trained) for c in (adapter.merge, beside)
    ]
    close(*slopes, 1e-4)
    there = jax.tree.leaves(beside(params, trained), is_leaf=lambda x: isinstance(x, lora.LowRank))
    assert isinstance(beside(params, trained)["layers"]["o"], lora.LowRank)
    assert sum(isinstance(x, lora.LowRank) for x in there) == {"experts": 10, "mla": 3, "rwkv": 3}.get(
        "experts" if config.dense_layers else config.attention, 6
    )


@pytest.mark.slow
def test_answers_in_slots_are_those_of_all_at_once():
    model = language_model(TASK, SHAPE, "float32")
    params = model.init(jax.random.key(0))
    prompt = jnp.repeat(jax.vmap(TASK.draw)(jax.random.split(jax.random.key(1), 4)).prompt, 4, axis=0)

    def said(slots):
        config = replace(TINY, num_prompts=4, group_size=4, slots=slots)
        learning = grpo.learner(model, config, length=TASK.answer_length, end=tasks.END, pad=tasks.PAD)
        state = learning.init(jax.random.key(2), params, grpo.Hyper())
        return jax.jit(learning.sample)(state, jax.random.key(3), prompt, jnp.ones(prompt.shape, bool))

    close(said(0), said(3), 1e-5)


def test_a_small_change_is_not_rounded_away_beside_a_matrix_of_half_width():
    """One step of 1e-4 on W + AB leaves nearly all weights of bfloat16 as they were."""
    w = jax.random.normal(jax.random.key(0), (64, 64)).astype(jnp.bfloat16)
    a, b = jax.random.normal(jax.random.key(1), (64, 4)), jnp.full((4, 64), 1e-4)
    x = jax.random.normal(jax.random.key(2), (8, 64))
    unchanged = jnp.mean(w + (a @ b).astype(jnp.bfloat16) == w)
    change = lora.product("...d,df->...f", x, lora.LowRank(w, a, b)) - lora.product("...d,df->...f", x, w)
    assert unchanged > 0.8
    np.testing.assert_allclose(change, x @ a @ b, atol=1e-4)


def test_evaluation_samples_as_training_does():
    algo = grpo.make(TASK, replace(TINY, top_k=1))
    state, act = jax.jit(algo.init)(jax.random.key(0)), jax.jit(algo.act)
    sampled, _ = act(state, jnp.int32(2), jax.random.key(1))
    greedy, _ = act(state, jnp.int32(2))
    assert sampled == greedy


@pytest.mark.slow
def test_metrics_are_of_all_that_was_drawn():
    _, metrics = one_update(replace(TINY, oversample=3))
    assert metrics["episodes"] == 48


def test_learning_needs_as_many_answers_as_the_settings_say():
    model = language_model(TASK, SHAPE, "float32")
    learner = grpo.learner(model, TINY, length=2, end=1, pad=0)
    state = learner.init(jax.random.key(0), model.init(jax.random.key(1)), grpo.Hyper())
    prompt, valid = jnp.zeros((8, 4), jnp.int32), jnp.ones((8, 4), bool)
    rollout = jax.jit(learner.sample)(state, jax.random.key(2), prompt, valid)
    with pytest.raises(ValueError, match=r"learn: needs num_prompts . group_size = 16 prompts .*; got 8 and \(8,\)"):
        learner.learn(state, jax.random.key(3), prompt, valid, rollout, jnp.zeros(8))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"truncated_importance": True}, "config.truncated_importance needs config.old_log_probs=recomputed"),
        ({"group_size": 1}, "config.group_size must be an integer of at least 2; got 1"),
        ({"advantage": "mean"}, "config.advantage must be one of zscore, centred, rloo, reinforce"),
        (
            {"micro_batches": 3},
            "config.num_minibatches . micro_batches must divide num_prompts . group_size = 16; got 3",
        ),
        ({"kl": "k3", "kl_in": "reward"}, "config.kl_in=reward takes config.kl=k1"),
        ({"precision": "float8"}, "precision must be one of"),
    ],
)
def test_wrong_settings_are_one_clear_line(wrong, message):
    with pytest.raises(ValueError, match=message):
        grpo.make(TASK, replace(TINY, **wrong))


def test_what_does_not_fit_the_task_is_refused():
    with pytest.raises(ValueError, match=r"config.model.vocab_size must be the 7 symbols of modular_addition-3"):
        grpo.make(TASK, replace(TINY, model=replace(SHAPE, vocab_size=9)))
    with pytest.raises(ValueError, match=r"hyper.temperature must be above 0; got 0"):
        grpo.make(TASK, TINY, grpo.Hyper(temperature=0.0))
    with pytest.raises(ValueError, match="top_k must be between 0 and 7; got 99"):
        grpo.make(TASK, replace(TINY, top_k=99))


AVERAGED = optim.OptimizerConfig("adamw", ema=True)


@pytest.mark.parametrize(
    "algo",
    [
        sft.make(TASK, sft.Config(model=SHAPE, optimizer=AVERAGED)),
        ppo_lm.make(TASK, ppo_lm.Config(model=SHAPE, optimizer=AVERAGED)),
        grpo.make(
            TASK, replace(TINY, optimizer=replace(AVERAGED, accumulate=2), adapter=adapters.Config("lora", rank=2))
        ),
    ],
    ids=["sft", "ppo_lm", "grpo"],
)
def test_evaluation_is_of_the_averaged_parameters(algo):
    """Parameters that have moved answer as their average does, which is still that of the start."""
    state, act = jax.jit(algo.init)(jax.random.key(0)), jax.jit(algo.act)

    def up(tree):
        return jax.tree.map(lambda x: x + 1, tree)

    moved, both = state._replace(params=up(state.params)), state._replace(opt_state=up(state.opt_state))
    start, averaged, later = (act(s, jnp.int32(2))[1].cache for s in (state, moved, both))
    jax.tree.map(np.testing.assert_array_equal, averaged, start)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(later), jax.tree.leaves(start), strict=True))
