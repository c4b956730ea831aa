"""Preferences: pairs of answers, reward models and DPO, by hand and by what every algorithm promises."""

import importlib
from dataclasses import replace
from pathlib import Path

import bits
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import algorithm, run
from jrl.algos import dpo, reward_model, sft
from jrl.lm import pairs as pairs_of
from jrl.lm import tasks
from jrl.lm.policy import Answers, answer, language_model
from jrl.lm.sampling import Support
from jrl.lm.scoring import score
from jrl.nets import adapters, transformer
from jrl.run import loop

TASK = tasks.make("modular_addition", modulus=3)
SHAPE = transformer.Config(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=16)
MODEL = language_model(TASK, SHAPE, "float32")


def shown(number=24, seed=0):
    """Right answers preferred to wrong ones."""
    problems = jax.vmap(TASK.draw)(jax.random.split(jax.random.key(seed), number))
    chosen = jax.vmap(TASK.demonstrate)(problems)
    rejected = chosen.at[:, 0].set(2 + (chosen[:, 0] - 2 + 1 + jnp.arange(number) % 2) % 3)
    return pairs_of.Pairs(problems.prompt, problems.valid, chosen, rejected, jnp.ones(number))


def made_dpo(loss="sigmoid", hyper=dpo.Hyper(), pairs="given", **more):
    config = dpo.Config(model=SHAPE, batch_size=8, loss=loss, **more)
    return dpo.make(TASK, config, hyper, pairs=shown() if pairs == "given" else pairs)


def made_online(**more):
    return made_dpo(pairs=None, **more)


def made_reward(**more):
    return reward_model.make(TASK, shown(), reward_model.Config(**({"model": SHAPE, "batch_size": 8} | more)))


MAKERS = pytest.mark.parametrize("make", [made_dpo, made_online, made_reward], ids=["dpo", "online", "reward"])


def test_the_better_answer_is_preferred_and_ties_do_not_count():
    params = jax.jit(MODEL.init)(jax.random.key(0))

    def reward(answers):
        return answers.rollout.tokens[:, 0].astype(jnp.float32)  # the larger the first token, the better

    draw = jax.jit(lambda key: pairs_of.draw(key, TASK, MODEL, params, 16, reward))
    with jax.debug_key_reuse(True):
        found, answers = draw(jax.random.key(1))
    first, second = found.chosen[:, 0], found.rejected[:, 0]
    assert (first >= second).all()
    np.testing.assert_array_equal(found.weight, first != second)
    assert 0 < found.weight.sum() < 16
    said = jnp.where(answers.rollout.mask, answers.rollout.tokens, 0)
    np.testing.assert_array_equal(found.chosen + found.rejected, said[::2] + said[1::2])
    np.testing.assert_array_equal(found.prompt, answers.problems.prompt[1::2])


def test_labels_of_bradley_and_terry_are_as_uncertain_as_the_rewards_are_close():
    params = MODEL.init(jax.random.key(0))

    def draw(key):
        gain = jnp.tile(jnp.array([1.0, 0.0]), 64)
        found, answers = pairs_of.draw(key, TASK, MODEL, params, 64, lambda _: gain, certainty=1.0)
        wins = (found.chosen == jnp.where(answers.rollout.mask, answers.rollout.tokens, 0)[::2]).all(-1)
        differ = (found.chosen != found.rejected).any(-1)
        return (wins & differ).sum(), differ.sum(), found.weight.min()

    wins, number, weight = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 20))
    np.testing.assert_allclose(wins.sum() / number.sum(), jax.nn.sigmoid(1.0), atol=0.05)
    assert (weight == 1).all()


def test_log_probabilities_are_those_of_the_answers_alone():
    params, pairs = MODEL.init(jax.random.key(0)), shown(6)
    found = pairs_of.log_probs(MODEL, params, pairs)
    for tokens, total, length in (
        (pairs.chosen, found.chosen, found.chosen_length),
        (pairs.rejected, found.rejected, found.rejected_length),
    ):
        said = pairs_of.as_rollout(tokens)
        alone = score(MODEL, params, pairs.prompt, said, valid=pairs.valid).log_prob
        np.testing.assert_allclose(total, jnp.where(said.mask, alone, 0).sum(-1), rtol=1e-5)
        np.testing.assert_array_equal(length, 2)


@pytest.mark.thorough(2)
@pytest.mark.parametrize(
    "loss, wanted",
    [("sigmoid", np.log(2)), ("ipo", 1 / 0.04), ("hinge", 1.0), ("kto", 0.5), ("apo", 1.0)],
)
def test_before_the_first_step_the_policy_is_the_reference(loss, wanted):
    algo = made_dpo(loss)
    update = jax.jit(algo.update)
    state, metrics = update(jax.jit(algo.init)(jax.random.key(0)))
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-4)
    np.testing.assert_allclose([metrics["margin"], metrics["chosen_log_ratio"]], 0, atol=1e-5)
    for _ in range(30):
        state, later = update(state)
    assert later["chosen_log_ratio"] > later["rejected_log_ratio"]


def test_kto_compares_with_answers_to_other_prompts():
    """z is the mean log-ratio of each prompt's mismatched answers (2402.01306, section 4.1), and micro-batches change nothing."""
    rows, hyper = shown(), dpo.Hyper(beta=0.5)
    start = MODEL.init(jax.random.key(0))
    now = jax.tree.map(lambda x: 1.3 * x, start)
    found = []
    for parts in (1, 4):
        learning = dpo.learner(
            MODEL, dpo.Config(model=SHAPE, loss="kto", batch_size=len(rows.prompt), micro_batches=parts)
        )
        reference = learning.reference(start, rows)
        state = learning.init(jax.random.key(1), now, hyper)
        found.append(float(learning.evaluate(state, rows, reference)["loss"]))
    others = rows._replace(chosen=np.roll(rows.chosen, 1, 0), rejected=np.roll(rows.rejected, 1, 0))
    (ours, theirs), (apart_ours, apart_theirs) = (
        [pairs_of.log_probs(MODEL, params, x) for params in (now, start)] for x in (rows, others)
    )
    z = float(jnp.mean((apart_ours.chosen - apart_theirs.chosen + apart_ours.rejected - apart_theirs.rejected) / 2))
    liked, disliked = ours.chosen - theirs.chosen, ours.rejected - theirs.rejected
    each = 1 - jax.nn.sigmoid(0.5 * (liked - max(z, 0))) + 1 - jax.nn.sigmoid(0.5 * (max(z, 0) - disliked))
    np.testing.assert_allclose(found, float(each.mean()) / 2, rtol=1e-4)


@pytest.mark.slow
def test_losses_without_a_reference_keep_none():
    for loss in ("orpo", "simpo"):
        algo = made_dpo(loss, dpo.Hyper(beta=2.0, margin=0.5))
        state = jax.jit(algo.init)(jax.random.key(0))
        assert state.frozen == () and state.reference == ()
        _, metrics = jax.jit(algo.update)(state)
        rows = shown()
        scored = pairs_of.log_probs(MODEL, state.params, rows)
        assert np.isfinite(float(metrics["loss"])) and float(metrics["accuracy"]) <= 1
        each = dpo.losses_of(algo.config, state.hyper, scored, (jnp.zeros(24), jnp.zeros(24)))
        m_w, m_l = scored.chosen / 2, scored.rejected / 2  # two tokens each
        if loss == "simpo":
            np.testing.assert_allclose(each, -jax.nn.log_sigmoid(2.0 * (m_w - m_l) - 0.5), rtol=1e-5)
        else:
            odds = m_w - jnp.log1p(-jnp.exp(m_w)) - m_l + jnp.log1p(-jnp.exp(m_l))
            np.testing.assert_allclose(each, -2.0 * jax.nn.log_sigmoid(odds), rtol=1e-4)


@pytest.mark.slow
def test_every_pair_is_learned_from_once_in_an_epoch_and_in_a_new_order_in_the_next():
    """With a learning rate of 0 the losses of an epoch have the mean of all pairs."""
    params = MODEL.init(jax.random.key(5))
    config = dpo.Config(model=SHAPE, batch_size=8, loss="simpo")
    algo = dpo.make(TASK, config, dpo.Hyper(learning_rate=0.0), pairs=shown(), start=params)
    state = jax.jit(algo.init)(jax.random.key(0))
    _, metrics = jax.jit(lambda s: jax.lax.scan(lambda s, _: algo.update(s), s, length=6))(state)
    scored = pairs_of.log_probs(MODEL, params, shown())
    nothing = jnp.zeros(24), jnp.zeros(24)
    wanted = dpo.losses_of(config, state.hyper, scored, nothing).mean()
    losses = np.asarray(metrics["loss"])
    np.testing.assert_allclose([losses[:3].mean(), losses[3:].mean()], wanted, rtol=1e-5)
    assert not np.allclose(losses[:3], losses[3:])


@pytest.mark.thorough(1)
@MAKERS
def test_keys_are_not_reused_and_a_seed_does_not_depend_on_those_beside_it(make):
    algo = make()
    keys = jax.random.split(jax.random.key(0), 2)
    with jax.debug_key_reuse(True):
        alone, _ = jax.jit(algo.update)(jax.jit(algo.init)(keys[1]))
    both = algorithm.over_seeds(algo)
    together, _ = jax.jit(both.update)(jax.jit(both.init)(keys))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[1], y, atol=1e-5), together.params, alone.params)


@pytest.mark.slow
@MAKERS
def test_a_run_is_resumed_bit_for_bit(make, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHUNK_SECONDS", 0.0)  # one update at a time
    algo = make()
    more, steps = {"num_seeds": 2, "progress": False, "eval_episodes": 0}, 10 * algo.env_steps_per_update
    whole = run.train(algo, jax.random.key(0), steps, **more)
    run.train(algo, jax.random.key(0), steps, **more, run_dir=tmp_path, on_chunk=lambda chunk: True)
    resumed = run.train(algo, jax.random.key(0), steps, **more, run_dir=tmp_path, resume=True)
    bits.assert_same(resumed.state, whole.state)


def test_matrices_beside_the_frozen_model_learn_preferences():
    algo = made_dpo(adapter=adapters.Config("lora", rank=2), hyper=dpo.Hyper(learning_rate=0.02))
    state, metrics = jax.jit(lambda k: run.train_fn(algo, 12 * algo.env_steps_per_update)(k))(jax.random.key(0))
    assert set(state.params) >= {"layers/q", "layers/o"} and metrics["loss"][-1] < metrics["loss"][0]


@pytest.mark.slow
def test_a_reward_sees_the_whole_answer_and_nothing_behind_its_end():
    algo = made_reward()
    state = jax.jit(algo.init)(jax.random.key(0))
    head = jax.random.normal(jax.random.key(1), state.params["head"].shape)
    params, pairs = state.params | {"head": head}, shown(6)

    def scored(tokens):
        return reward_model.scores(MODEL, params, pairs.prompt, pairs.valid, pairs_of.as_rollout(tokens))[0]

    reward = scored(pairs.chosen)
    early = pairs.chosen.at[:, 0].set(tasks.END)  # it ends at once: what stands behind does not count
    np.testing.assert_allclose(scored(early), scored(early.at[:, 1].set(4)), atol=1e-5)
    assert np.abs(scored(pairs.chosen.at[:, 1].set(3)) - reward).min() > 1e-4  # the last token counts
    answers = answer(jax.random.key(2), TASK, MODEL, params["body"], 3, 2, Support())
    found = reward_model.reward_of(algo, state._replace(params=params), TASK)(answers)
    said = jnp.where(answers.rollout.mask, answers.rollout.tokens, 0)
    problems = answers.problems
    wanted = reward_model.scores(MODEL, params, problems.prompt, problems.valid, pairs_of.as_rollout(said))[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert isinstance(answers, Answers) and np.abs(found).max() > 0


def test_what_does_not_fit_is_refused():
    for message, make in {
        r"pairs.chosen must be \[24, 2\] for modular_addition-3; got \[24, 3\]": lambda: dpo.make(
            TASK, pairs=shown()._replace(chosen=jnp.zeros((24, 3), jnp.int32))
        ),
        "pairs must be a jrl.lm.pairs.Pairs": lambda: dpo.make(TASK, pairs=(1, 2)),
        "config.batch_size must be at most the 24 pairs; got 32": lambda: dpo.make(
            TASK, dpo.Config(batch_size=32), pairs=shown()
        ),
        "reward ranks those that are drawn": lambda: dpo.make(TASK, pairs=shown(), reward=lambda answers: 0),
        "hyper.beta must be": lambda: made_dpo(hyper=dpo.Hyper(beta=0.0)),
        "loss must be one of": lambda: made_dpo("dpo"),
        "held_out must be": lambda: made_reward(held_out=1.0),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.slow
def test_preferences_teach_what_demonstrations_would():
    """Offline and online DPO and its kin, from a policy that is right one time in three. All rank what they were shown; without a reference, or
    where the likelihood of what was chosen is not learned, probability may go to what nobody showed."""
    begin = sft.make(TASK, sft.Config(model=SHAPE))
    start, _ = jax.jit(run.train_fn(begin, 150 * begin.env_steps_per_update))(jax.random.key(0))
    pairs = shown(512)

    def trained(algo, updates):
        state, metrics = jax.jit(run.train_fn(algo, updates * algo.env_steps_per_update))(jax.random.key(1))
        score = float(run.evaluate(algo, state, jax.random.key(2), 64).returns.mean())
        return score, float(metrics["accuracy"][-20:].mean())

    for loss, beta, weight in (
        ("sigmoid", 0.1, 0.2),
        ("ipo", 0.3, 0.0),
        ("kto", 0.3, 0.0),
        ("orpo", 0.5, 0.0),
        ("simpo", 2.0, 0.5),
        ("apo", 0.3, 0.0),
    ):
        config = dpo.Config(model=SHAPE, loss=loss)
        hyper = dpo.Hyper(learning_rate=1e-3, beta=beta, likelihood_weight=weight)
        score, accuracy = trained(dpo.make(TASK, config, hyper, pairs=pairs, start=start.params), 200)
        assert accuracy > 0.95 and score > 0.7, loss
    hyper = dpo.Hyper(learning_rate=3e-3, likelihood_weight=0.2)
    online, _ = trained(dpo.make(TASK, dpo.Config(model=SHAPE), hyper, start=start.params), 600)
    assert online > 0.8
    model = reward_model.make(TASK, pairs, reward_model.Config(model=replace(SHAPE, num_layers=2)))
    _, metrics = jax.jit(run.train_fn(model, 400 * model.env_steps_per_update))(jax.random.key(3))
    assert np.asarray(metrics["held_out_accuracy"])[-20:].mean() > 0.9


def test_the_gold_reward_of_the_comparison_is_how_near_a_sum_comes(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "experiments")
    alignment = importlib.import_module("alignment")
    problem = jax.vmap(alignment.TASK.draw)(jax.random.split(jax.random.key(0), 64))
    target, shown = problem.answer
    digits = np.asarray(problem.prompt[:, :2]) - alignment.ZERO
    np.testing.assert_array_equal(10 * digits[:, 0] + digits[:, 1], target)
    one = jax.tree.map(lambda x: x[0], problem)._replace(answer=(jnp.int32(27), shown[0]))
    for said, gold in (([9, 9, 9], 1.0), ([9, 9], 1 / 3), ([9, 9, 9, 9, 9], 0.0), ([9, 9, 8], 1 - 1 / 13.5), ([], 0.0)):
        tokens = jnp.array([alignment.ZERO + d for d in said] + [tasks.END] * (9 - len(said)), jnp.int32)
        parts = alignment.TASK.verify(one, tokens, tasks.answer_mask(tokens))
        np.testing.assert_allclose(parts["correct"], gold, atol=1e-6)
    endless = jnp.full(9, alignment.ZERO + 3, jnp.int32)
    assert alignment.TASK.verify(one, endless, jnp.ones(9, bool))["correct"] == 0
    parts = jax.vmap(alignment.TASK.verify)(problem, shown, jax.vmap(tasks.answer_mask)(shown))
    assert (parts["format"] == 1).all() and 0.2 < parts["correct"].mean() < 0.8  # the demonstrators stop too soon
    row = alignment.row_of(
        "dpo", {x: np.array([[0.2, 0.6, 0.4]] * 3) for x in ("gold", "learned", "kl", "length")}, 1e4
    )
    assert (row["gold, best"], row["gold, end"], row["tokens drawn"]) == (
        "0.60 (0.60 to 0.60)",
        "0.40 (0.40 to 0.40)",
        "10,000",
    )
