"""Sampling: caches against whole sequences, truncation, padding, ends, and rows that do not depend on each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.attention import dsa, mla, nsa
from jrl.lm import model as model_file
from jrl.lm import sampling, scoring
from jrl.lm.model import decoder
from jrl.lm.sampling import Support, kept, sample
from jrl.lm.scoring import score
from jrl.nets import mixers, transformer

END, PAD = 1, 0
SHAPE = {"vocab_size": 11, "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 16}
SPARSE = nsa.Config(4, 2, 4, 3, window=4)
LATENT = mla.Config(latent=8, query_latent=8, nope_dim=8, rope_dim=4, value_dim=8)


def model_of(kind="dense"):
    more = {"sparse": SPARSE, "latent": LATENT, "indexer": dsa.Config(heads=2, dim=8, rope_dim=4, top_k=4)}
    return decoder(transformer.Config(**SHAPE, attention=kind, window=5, **more))


def prompts(batch=4, width=6):
    prompt = jax.random.randint(jax.random.key(1), (batch, width), 2, 11)
    valid = jnp.arange(width)[None] >= jnp.array([0, 2, 3, 5])[:batch, None]
    return jnp.where(valid, prompt, PAD), valid


@pytest.fixture(scope="module")
def dense():
    model = model_of()
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))  # far from uniform
    run = jax.jit(partial(sample, model=model, length=8, end=END), static_argnames=("length", "support", "end", "pad"))
    return model, params, run


@pytest.mark.thorough(2)
@pytest.mark.parametrize("kind", ["dense", "window", "nsa", "mla", "dsa", "rwkv"])
def test_what_was_sampled_is_what_is_scored(kind):
    model = model_of(kind)
    params, (prompt, valid) = model.init(jax.random.key(0)), prompts()
    rollout = jax.jit(lambda k, p: sample(k, model, p, prompt, length=8, end=END, valid=valid))(
        jax.random.key(2), params
    )
    scored = jax.jit(lambda p: score(model, p, prompt, rollout, valid=valid))(params)
    np.testing.assert_allclose(
        np.where(rollout.mask, scored.log_prob, 0), np.where(rollout.mask, rollout.log_prob, 0), atol=2e-5
    )


@pytest.mark.slow
def test_answers_to_one_prompt_read_it_once(dense):
    """The same answers as to the prompt repeated; a model that cannot repeat its cache reads it again."""
    model, params, run = dense
    prompt, valid = prompts(2)
    twice = {"prompt": jnp.repeat(prompt, 3, axis=0), "valid": jnp.repeat(valid, 3, axis=0)}
    wanted = run(jax.random.key(2), params=params, **twice)
    for able in (model, model._replace(repeat=None)):
        found = sample(jax.random.key(2), able, params, prompt, length=8, end=END, valid=valid, copies=3)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, wanted)
    read = []

    def prefill(*args):
        read.append(args[1].shape)
        return model.prefill(*args)

    jax.eval_shape(
        lambda k: sample(k, model._replace(prefill=prefill), params, prompt, length=8, end=END, copies=3),
        jax.random.key(0),
    )
    assert read == [(2, 6)]
    with pytest.raises(ValueError, match="copies must be"):
        sample(jax.random.key(2), model, params, prompt, length=8, end=END, copies=0)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("kind", ["window", "nsa", "dense", "mla", "dsa", "rwkv"])
def test_a_cache_that_grows_with_the_answer_changes_nothing(kind, monkeypatch):
    model, (prompt, valid) = model_of(kind), prompts()
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))
    found = []
    for long in (100, 4):
        monkeypatch.setattr(sampling, "LONG", long)
        run = jax.jit(lambda key: sample(key, model, params, prompt, length=21, end=-1, valid=valid))
        found.append(run(jax.random.key(2)))
    assert sampling.rooms(6, 21) == [12, 17, 27]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), *found)
    assert found[0].mask.all()  # nothing ends them: they go through all stages


@pytest.mark.slow
def test_a_few_rows_are_scored_at_once_where_all_do_not_fit(dense, monkeypatch):
    model, params, run = dense
    prompt, valid = prompts()
    rollout = run(jax.random.key(2), params=params, prompt=prompt, valid=valid)
    scores = []
    for at_once in (2**25, 2 * 8 * 11 + 5, 1):  # all, two rows, one row
        monkeypatch.setattr(scoring, "AT_ONCE", at_once)
        scores.append(score(model, params, prompt, rollout, valid=valid))
    for other in scores[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), other, scores[0])


def test_padding_is_turned_behind_and_back_and_so_are_slopes():
    x, steps = jnp.arange(12.0).reshape(2, 6), jnp.array([2, 0])
    np.testing.assert_array_equal(model_file.turned(x, -steps)[0], [2, 3, 4, 5, 0, 1])
    np.testing.assert_array_equal(model_file.turned(model_file.turned(x, -steps), steps), x)
    slope = jax.grad(lambda x: jnp.sum(model_file.turned(x, steps) * jnp.arange(6.0)[None]))(x)
    np.testing.assert_array_equal(slope, [[2, 3, 4, 5, 0, 1], [0, 1, 2, 3, 4, 5]])


def test_attention_while_training_has_no_segments():
    """cuDNN refuses them: padding stands behind the tokens instead, which do not see it."""
    asked = []

    def attend(q, k, v, **options):
        asked.append((options["segment_ids"], options["valid"]))
        return q

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mixers, "attend", attend)
        model = model_of()
        prompt, valid = prompts()
        jax.eval_shape(
            lambda p: model.hidden_and_load(p, prompt, valid, valid), jax.eval_shape(model.init, jax.random.key(0))
        )
    assert asked == [(None, None)]


@pytest.mark.parametrize(
    "support", [Support(0.5), Support(2.0, top_k=3), Support(1.0, top_p=0.7), Support(0.8, min_p=0.2)]
)
def test_temperature_and_truncation_are_part_of_the_policy(dense, support):
    model, params, run = dense
    prompt, valid = prompts()
    rollout = run(jax.random.key(2), params=params, prompt=prompt, valid=valid, support=support)
    scored = score(model, params, prompt, rollout, valid=valid, support=support)
    np.testing.assert_allclose(scored.log_prob[rollout.mask], rollout.log_prob[rollout.mask], atol=2e-5)
    # Under other parameters a token keeps the set that it was drawn from, so that no ratio is infinite.
    other = score(model, jax.tree.map(lambda x: -x, params), prompt, rollout, valid=valid, support=support)
    assert np.isfinite(other.log_prob[rollout.mask]).all()
    assert (np.asarray(other.entropy) >= -1e-6).all()


def test_rows_do_not_depend_on_the_rows_beside_them_nor_on_padding(dense):
    _, params, run = dense
    prompt, valid = prompts()
    both = run(jax.random.key(2), params=params, prompt=prompt, valid=valid)
    some = run(jax.random.key(2), params=params, prompt=prompt[:2], valid=valid[:2])
    np.testing.assert_array_equal(both.tokens[:2], some.tokens)
    wider = run(
        jax.random.key(2),
        params=params,
        prompt=jnp.pad(prompt, ((0, 0), (3, 0))),
        valid=jnp.pad(valid, ((0, 0), (3, 0))),
    )
    np.testing.assert_array_equal(both.tokens, wider.tokens)
    np.testing.assert_allclose(both.log_prob, wider.log_prob, atol=2e-5)


@pytest.mark.parametrize("pad", [PAD, END])
def test_the_end_is_in_the_mask_and_padding_follows(dense, pad):
    _, params, run = dense
    prompt, valid = prompts()
    rollout = run(jax.random.key(5), params=params, prompt=prompt, valid=valid, end=4, pad=pad)
    for tokens, mask in zip(np.asarray(rollout.tokens), np.asarray(rollout.mask), strict=True):
        ends = np.flatnonzero((tokens == 4) & mask)
        length = ends[0] + 1 if len(ends) else 8
        assert mask.tolist() == [True] * length + [False] * (8 - length)
        assert (tokens[length:] == pad).all()


def test_what_truncation_keeps():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))

    def keeps(**kw):
        return np.asarray(kept(logits, Support(**kw))).tolist()

    assert keeps(top_k=2) == [True, True, False, False]
    assert keeps(top_p=0.7) == [True, True, False, False]
    assert keeps(top_p=0.5) == [True, False, False, False]
    assert keeps(top_p=0.01) == [True, False, False, False]
    assert keeps(min_p=0.25) == [True, True, True, False]
    assert keeps(top_k=3, top_p=0.95, min_p=0.4) == [True, True, False, False]


def test_frequencies_are_those_of_the_distribution(dense):
    model, params, run = dense
    n = 4096
    prompt = jnp.broadcast_to(prompts()[0][:1], (n, 6))
    rollout = run(jax.random.key(3), params=params, prompt=prompt, length=1)
    p = jax.nn.softmax(model.prefill(params, prompt[:1], jnp.ones((1, 6), bool), 7)[0][0])
    found = np.bincount(np.asarray(rollout.tokens[:, 0]), minlength=11) / n
    np.testing.assert_allclose(found, p, atol=5 * np.sqrt(0.25 / n))


def test_wrong_arguments_are_one_clear_line(dense):
    model, params, _ = dense
    prompt = prompts()[0]
    for wrong, message in (
        ({"length": 0}, "length must be an integer of at least 1; got 0"),
        ({"support": Support(0.0)}, "temperature must be above 0; got 0"),
        ({"support": Support(top_k=12)}, "top_k must be between 0 and 11; got 12"),
        ({"support": Support(top_p=1.5)}, "top_p must be between 0 and 1; got 1.5"),
        ({"valid": jnp.ones((4, 5), bool)}, r"sample: prompt must be \[N, P\] and valid like it"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(jax.random.key(0), model, params, prompt, **({"length": 4, "end": END} | wrong))
