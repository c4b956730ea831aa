"""Reward models from labels of steps and outcomes, the labels that continuations give, and choosing among answers by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.algos import process_reward, sft
from jrl.algos.process_reward import Labelled
from jrl.equations import preferences
from jrl.lm import rollouts, tasks
from jrl.lm.policy import Answers, answer, language_model
from jrl.lm.sampling import Rollout, Support
from jrl.lm.tasks import answer_mask
from jrl.nets import adapters, transformer

TASK = tasks.make("reverse", length=3)
SHAPE = transformer.Config(dim=16, num_layers=1, num_heads=2, num_kv_heads=1)
MODEL = language_model(TASK, SHAPE, "float32")


def rolled(tokens):
    tokens = jnp.asarray(tokens)
    return Rollout(tokens, answer_mask(tokens), jnp.zeros(tokens.shape), None)


@pytest.fixture(scope="module")
def problems():
    return jax.vmap(TASK.draw)(jax.random.split(jax.random.key(0), 8))


@pytest.fixture(scope="module")
def policy():
    algo = sft.make(TASK, sft.Config(SHAPE, batch_size=32), sft.Hyper(learning_rate=5e-3))
    state = jax.jit(algo.init)(jax.random.key(0))
    return jax.jit(lambda s: jax.lax.scan(lambda s, _: (algo.update(s)[0], None), s, length=150)[0])(state).params


def test_calibration_error_of_hand_worked_bins():
    p, label = jnp.array([0.05, 0.15, 0.95, 0.95]), jnp.array([0.0, 1.0, 1.0, 0.0])
    # Bins: 0.05 against 0, 0.15 against 1, two of 0.95 against one half.
    wanted = (0.05 + 0.85 + 2 * 0.45) / 4
    np.testing.assert_allclose(preferences.calibration_error(p, label, jnp.ones(4)), wanted, rtol=1e-5)
    weight = jnp.array([1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(preferences.calibration_error(p, label, weight), 0.05, rtol=1e-5)


@pytest.mark.slow
def test_continuations_keep_what_was_said_and_are_as_if_they_were_sampled_there(problems, policy):
    """From the first token on they are the sampler's, and behind a right beginning a good policy ends right."""
    shown = jax.vmap(TASK.demonstrate)(problems)
    for begun in (0, 2, TASK.answer_length):
        said = rollouts.continued(
            jax.random.key(1), TASK, MODEL, policy, problems, shown, jnp.full(8, begun), Support(temperature=0.2)
        )
        np.testing.assert_array_equal(said[:, :begun], shown[:, :begun])
        right = jax.vmap(TASK.verify)(problems, said, answer_mask(said))["correct"]
        assert right.mean() >= (1 if begun == TASK.answer_length else 0.6)


@pytest.mark.slow
def test_the_value_of_a_step_is_how_often_it_still_ends_right(problems, policy):
    shown = jax.vmap(TASK.demonstrate)(problems)
    wrong = shown.at[:, 1].set(jnp.where(shown[:, 1] == 2, 3, 2))  # the second token is wrong
    for tokens, test in (
        (shown, lambda v: v.mean() > 0.6),
        (wrong, lambda v: (v[:, 1:] == 0).all() and 0.05 < v[:, 0].mean() < 0.6),
    ):
        answers = Answers(problems, rolled(tokens), jax.vmap(TASK.verify)(problems, tokens, answer_mask(tokens)))
        values = jax.jit(lambda key, a: rollouts.step_values(key, TASK, MODEL, policy, a, 8))(
            jax.random.key(2), answers
        )
        assert values.shape == tokens.shape and test(np.asarray(values))


def labelled(policy, kind, number=256):
    answers = answer(jax.random.key(3), TASK, MODEL, policy, number, 1, Support(2.0))
    said, problems = answers.rollout, answers.problems
    right = jnp.cumprod(jnp.where(said.mask, said.tokens == jax.vmap(TASK.demonstrate)(problems), True), axis=1)
    weight = said.mask.astype(jnp.float32) if kind == "process" else process_reward.last_token(said.mask)
    return Labelled(problems.prompt, problems.valid, said, right.astype(jnp.float32), weight)


@pytest.mark.slow
@pytest.mark.parametrize("kind, change", [
    ("process", {}), ("outcome", {"loss": "squared"}), ("process", {"adapter": adapters.Config("lora", rank=4), "micro_batches": 2}),
], ids=["process", "outcome", "lora"])  # fmt: skip
def test_labels_are_learned(kind, change, policy):
    config = process_reward.Config(SHAPE, batch_size=256, **change)
    learning, batch = process_reward.learner(MODEL, config), labelled(policy, kind)
    state = learning.init(jax.random.key(4), policy, process_reward.Hyper(learning_rate=0.01))
    first = learning.evaluate(state, batch)
    state, _ = jax.jit(lambda s: jax.lax.scan(lambda s, _: learning.learn(s, batch), s, length=120))(state)
    last = learning.evaluate(state, batch)
    assert last["loss"] < 0.7 * first["loss"] and last["accuracy"] > 0.85 and last["calibration_error"] < 0.2


@pytest.mark.slow
def test_a_seed_among_others_learns_as_alone(policy):
    learning, batch = (
        process_reward.learner(MODEL, process_reward.Config(SHAPE, batch_size=256)),
        labelled(policy, "process"),
    )

    def learned(key):
        state = learning.init(key, MODEL.init(key), process_reward.Hyper())
        return learning.learn(state, batch)[0].params

    keys = jax.random.split(jax.random.key(7), 2)
    together, alone = jax.jit(jax.vmap(learned))(keys), jax.jit(learned)(keys[1])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[1], y, atol=1e-5), together, alone)


@pytest.mark.slow
def test_a_reward_at_a_token_has_seen_it_and_nothing_behind(policy, problems):
    head = jax.random.normal(jax.random.key(5), (16,))
    params, shown = {"body": policy, "head": head}, jax.vmap(TASK.demonstrate)(problems)

    def scored(tokens):
        return process_reward.logits(MODEL, params, problems.prompt, problems.valid, rolled(tokens))[0]

    one, other = scored(shown), scored(shown.at[:, 1].set(jnp.where(shown[:, 1] == 2, 3, 2)))
    np.testing.assert_allclose(one[:, 0], other[:, 0], atol=1e-5)
    assert np.abs(one[:, 1] - other[:, 1]).min() > 1e-4


def test_ends_of_steps():
    said = rolled([[3, 5, 4, 5, 1, 0]])
    np.testing.assert_array_equal(process_reward.step_ends(said, jnp.array([5])), [[0, 1, 0, 1, 1, 0]])
    np.testing.assert_array_equal(process_reward.last_token(said.mask), [[0, 0, 0, 0, 1, 0]])


def test_the_best_and_the_most_frequent_answer():
    said = rolled([[3, 1], [4, 1], [4, 1], [5, 1], [5, 1], [3, 1]])
    np.testing.assert_array_equal(rollouts.majority(said, 3), [1, 3])
    weight = jnp.array([0.9, 0.4, 0.4, 0.1, 0.2, 0.1])
    np.testing.assert_array_equal(rollouts.majority(said, 3, weight), [0, 3])
    np.testing.assert_array_equal(rollouts.best_of(jnp.array([0.1, 0.9, 0.2, 0.3, 0.1, 0.7]), 3), [1, 5])


@pytest.mark.slow
def test_a_search_by_steps_finds_what_its_scorer_likes(policy, problems):
    """A scorer that counts the right tokens so far: every answer is found, even at a high temperature."""

    def worth(problems, said):
        shown = jax.vmap(TASK.demonstrate)(problems)
        return jnp.sum(jnp.where(said.mask, jnp.where(said.tokens == shown, 1.0, -5.0), 0), axis=1)

    search = jax.jit(
        lambda key: rollouts.step_beam(key, TASK, MODEL, policy, worth, problems, 3, 6, 1, Support(temperature=1.5))
    )
    found = search(jax.random.key(6))
    assert found.answers.parts["correct"].mean() > 0.8
    assert (found.drawn <= 18 * TASK.answer_length).all() and (found.drawn >= 18).all()
