"""A language model of a user's own in place of the decoder that settings describe."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import algorithm
from jrl.algos import grpo, sft
from jrl.lm import own, tasks
from jrl.lm.model import decoder
from jrl.lm.policy import language_model
from jrl.nets import transformer

RANK_PROMOTION = "allow"  # as in a user's own process
TASK = tasks.make("modular_addition", modulus=3)
VOCABULARY = len(TASK.symbols)
SHAPE = transformer.Config(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=16, vocab_size=VOCABULARY)
TINY = grpo.Config(model=replace(SHAPE, vocab_size=0), num_prompts=4, group_size=4)
DECODER = decoder(SHAPE)


def whole_pass(params, tokens, valid):
    return DECODER.head(params, DECODER.hidden_and_load(params, tokens, valid, valid)[0])


@pytest.mark.slow
def test_a_model_without_a_cache_answers_and_learns_as_the_same_one_with_a_cache():
    def updated(model):
        algo = algorithm.over_seeds(grpo.make(TASK, TINY, grpo.Hyper(close_weight=0.5), model=model))
        return jax.jit(lambda keys: algo.update(algo.init(keys)))(jax.random.split(jax.random.key(0), 2))

    (a, metrics), (b, _) = updated(None), updated(own.language_model(DECODER.init, whole_pass, VOCABULARY))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), a.params, b.params)
    np.testing.assert_allclose(metrics["effective_sample_size"], 1, atol=1e-5)


def test_it_reads_one_token_at_a_time_as_it_reads_all_at_once(key):
    model = own.language_model(DECODER.init, whole_pass, VOCABULARY)
    params = model.init(key)
    prompt = jax.random.randint(key, (2, 4), 0, VOCABULARY)
    valid = jnp.array([[True] * 4, [False, False, True, True]])
    found = []
    for each in (model, DECODER):
        logits, cache = each.prefill(params, prompt, valid, 6)
        said = [logits]
        for t in range(2):
            logits, cache = each.step(params, jnp.array([1, 2]), cache, jnp.int32(4 + t), jnp.array([0, 2]))
            said.append(logits)
        found.append(jnp.stack(said))
    np.testing.assert_allclose(*found, atol=1e-5)


class Bag(nn.Module):
    """The mean of what was read so far, and the last token, through one layer."""

    @nn.compact
    def __call__(self, tokens, valid):
        x = nn.Embed(VOCABULARY, 16)(tokens) * valid[..., None]
        place = nn.Embed(8, 16)(jnp.arange(tokens.shape[1]) - jnp.argmax(valid, axis=1)[:, None])
        x = jnp.cumsum(nn.tanh(nn.Dense(32)(x * place)), axis=1)
        return nn.Dense(VOCABULARY)(nn.relu(nn.Dense(64)(x)))


def test_a_module_of_flax_learns_by_demonstrations():
    bag = Bag()
    example = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    model = own.language_model(lambda key: bag.init(key, *example), bag.apply, VOCABULARY)
    algo = sft.make(TASK, sft.Config(batch_size=32), sft.Hyper(learning_rate=1e-2), model=model)
    many = jax.jit(lambda state: jax.lax.scan(lambda s, _: algo.update(s), state, length=150))
    _, metrics = many(jax.jit(algo.init)(jax.random.key(0)))
    assert metrics["loss"][-1] < 0.3 * metrics["loss"][0]


def test_precision_reaches_it(key):
    model = language_model(TASK, SHAPE, "pure_bfloat16", own.language_model(DECODER.init, whole_pass, VOCABULARY))
    params = model.init(key)
    assert params["embedding"].dtype == jnp.bfloat16
    assert model.prefill(params, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool), 3)[0].dtype == jnp.float32


def test_what_is_no_model_of_the_task_is_refused():
    wrong = {
        "has 7 symbols, the model a vocabulary of 5": own.language_model(DECODER.init, whole_pass, 5),
        r"must give logits \[batch, 7\] for the token after a prompt": own.language_model(
            DECODER.init, lambda params, tokens, valid: jnp.zeros((*tokens.shape, 3)), VOCABULARY
        ),
        "make: model must be a jrl.lm.model.Model": "gpt",
    }
    for message, model in wrong.items():
        with pytest.raises(ValueError, match=message.replace("7", str(VOCABULARY))):
            grpo.make(TASK, TINY, model=model)
