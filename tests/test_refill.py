"""Slots that are filled again give the answers of the sampler, in fewer steps."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.lm import refill, sampling
from jrl.lm.model import decoder
from jrl.lm.sampling import Support
from jrl.nets import transformer

SHAPE = transformer.Config(vocab_size=9, dim=16, num_layers=2, num_heads=2, num_kv_heads=1)


def questions(number=11):
    prompt = jax.random.randint(jax.random.key(0), (number, 3), 0, 9)
    valid = jnp.arange(3)[None] >= jax.random.randint(jax.random.key(1), (number, 1), 0, 3)
    return prompt, valid


@pytest.mark.slow
@pytest.mark.parametrize("attention, support", [
    ("dense", Support()), ("dense", Support(0.7, top_k=4)), ("nsa", Support()), ("rwkv", Support()), ("window", Support()),
], ids=["dense", "truncated", "nsa", "rwkv", "window"])  # fmt: skip
def test_answers_are_those_of_the_sampler(attention, support):
    shape = replace(SHAPE, attention=attention, num_kv_heads=2 if attention == "rwkv" else 1, window=4)
    model = decoder(shape)
    params = jax.tree.map(lambda x: 1.3 * x, model.init(jax.random.key(2)))
    prompt, valid = questions()
    more = {"length": 6, "end": [1, 2], "valid": valid, "support": support}
    whole = jax.jit(lambda key: sampling.sample(key, model, params, prompt, **more))(jax.random.key(3))
    found, steps = jax.jit(lambda key: refill.sample(key, model, params, prompt, slots=4, together=2, **more))(
        jax.random.key(3)
    )
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    np.testing.assert_array_equal(found.mask, whole.mask)
    np.testing.assert_allclose(found.log_prob, whole.log_prob, atol=2e-5)
    if support.truncates:
        np.testing.assert_array_equal(found.kept[found.mask], whole.kept[whole.mask])
    assert steps >= (whole.mask.sum() - len(prompt)) / 4  # the first token of each comes with its prompt


def test_steps_are_as_many_as_tokens_over_slots():
    """Ends come at random, after three tokens in the mean, and answers may have 60."""
    model = decoder(SHAPE)
    params = model.init(jax.random.key(2))
    prompt, valid = questions(64)
    more = {"length": 60, "end": [1, 2, 3], "valid": valid}
    found, steps = jax.jit(lambda key: refill.sample(key, model, params, prompt, slots=8, together=1, **more))(
        jax.random.key(3)
    )
    lengths = np.asarray(found.mask.sum(1))
    assert (lengths >= 1).all() and steps < 1.6 * (lengths - 1).sum() / 8 + lengths.max()
    batches = sum(lengths.reshape(8, 8).max(1) - 1)
    assert steps < 0.75 * batches


def test_what_does_not_fit_is_refused():
    model, (prompt, _) = decoder(SHAPE), questions()
    params = model.init(jax.random.key(2))
    for more, message in [
        ({"slots": 0}, "slots must be an integer of at least 1; got 0"),
        ({"slots": 4, "together": 5}, "together must be between 1 and 4; got 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            refill.sample(jax.random.key(0), model, params, prompt, length=2, end=1, **more)
    with pytest.raises(ValueError, match="takes no rows"):
        refill.sample(jax.random.key(0), model._replace(insert=None), params, prompt, slots=2, length=2, end=1)
