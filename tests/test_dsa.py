"""DeepSeek sparse attention: the indexer, what it picks, both implementations, its loss, and decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.attention import dsa, mla
from jrl.attention.rotary import rms_norm
from jrl.nets import transformer

LATENT = mla.Config(latent=12, query_latent=10, nope_dim=8, rope_dim=4, value_dim=6)
CONFIG = dsa.Config(heads=3, dim=8, rope_dim=4, top_k=5)
HEADS, DIM, LENGTH = 4, 16, 23


@pytest.fixture(scope="module")
def made():
    keys = jax.random.split(jax.random.key(0), 3)
    params, index = mla.init(keys[0], LATENT, DIM, HEADS), dsa.init(keys[1], CONFIG, LATENT, DIM)
    return params, index, jax.random.normal(keys[2], (2, LENGTH, DIM))


SEGMENTS = jnp.repeat(jnp.array([[0, 1, 2]]), jnp.array([7, 9, 7]), axis=1, total_repeat_length=LENGTH).repeat(
    2, axis=0
)
VALID = jnp.arange(LENGTH)[None] >= jnp.array([[0], [6]])


def test_scores_of_the_indexer_by_hand():
    q, k = jnp.array([[[[1.0, 0.0], [0.0, -1.0]]]]), jnp.array([[[2.0, 1.0], [-1.0, -3.0]]])
    found = dsa.scores(q, jnp.array([[[0.5, 2.0]]]), k)
    # Key 0: 0.5 * 2 + 2 * relu(-1); key 1: 0.5 * relu(-1) + 2 * 3.
    np.testing.assert_allclose(found, [[[1.0, 6.0]]])


def test_the_largest_visible_scores_are_picked():
    found, visible = jnp.array([5.0, 1.0, 3.0, 4.0]), jnp.array([False, True, True, True])
    at, there = dsa.picked(found, visible, 2)
    assert at.tolist() == [3, 2] and there.all()
    at, there = dsa.picked(found, jnp.array([False, True, False, False]), 2)
    assert at[0] == 1 and there.tolist() == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"segment_ids": SEGMENTS}, {"valid": VALID}], ids=["plain", "segments", "valid"])
@pytest.mark.parametrize("chunk", [4, 100])
def test_gathered_latents_give_what_all_scores_give_and_so_do_slopes(made, more, chunk):
    params, index, x = made

    def computed(params, x, implementation):
        return dsa.attend(params, index, x, CONFIG, LATENT, implementation=implementation, chunk=chunk, **more)

    one, other = computed(params, x, "xla"), computed(params, x, "reference")
    np.testing.assert_allclose(one, other, atol=1e-5)
    slopes = [
        jax.grad(lambda p, x, i=i: jnp.sum(jnp.sin(computed(p, x, i))), (0, 1))(params, x) for i in ("xla", "reference")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), *slopes)
    if "valid" in more:
        assert (one[1, :6] == 0).all()


@pytest.mark.parametrize("more", [{}, {"segment_ids": SEGMENTS}], ids=["plain", "segments"])
def test_with_room_for_all_tokens_it_is_latent_attention(made, more):
    params, index, x = made
    whole = dsa.Config(heads=3, dim=8, rope_dim=4, top_k=LENGTH)
    found = dsa.attend(params, index, x, whole, LATENT, **more)
    np.testing.assert_allclose(found, mla.attend(params, x, LATENT, **more), atol=1e-5)


@pytest.mark.slow
def test_it_is_that_of_float64(made):
    params, index, x = made
    narrow = dsa.attend(params, index, x, CONFIG, LATENT)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda y: jnp.asarray(np.asarray(y), jnp.float64), (params, index, x))
        np.testing.assert_allclose(narrow, dsa.attend(*wide, CONFIG, LATENT, implementation="reference"), atol=1e-5)


@pytest.mark.parametrize("start", [0, 4])
def test_a_token_behind_the_cache_sees_what_it_sees_in_the_sequence(made, start):
    params, index, x = made
    valid = jnp.arange(LENGTH)[None] >= start
    places = jnp.broadcast_to(jnp.arange(LENGTH)[None] - start, (2, LENGTH))
    wanted = dsa.attend(params, index, x, CONFIG, LATENT, positions=places, valid=jnp.broadcast_to(valid, (2, LENGTH)))
    cache = dsa.init_cache(CONFIG, LATENT, 2, LENGTH)
    step = jax.jit(lambda x, cache, t: dsa.decode_step(params, index, x, cache, t, CONFIG, LATENT, start=start))
    for t in range(start, LENGTH):
        found, cache = step(x[:, t], cache, jnp.int32(t))
        np.testing.assert_allclose(found, wanted[:, t], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True])
def test_the_indexer_learns_where_attention_goes_and_nothing_else_does(made, sparse):
    params, index, x = made

    def loss(params, index, x):
        return dsa.index_loss(params, index, x, CONFIG, LATENT, sparse=sparse)

    slopes = jax.grad(loss, (0, 1, 2))(params, index, x)
    assert all(not np.any(y) for y in jax.tree.leaves((slopes[0], slopes[2]))) and all(
        map(np.any, jax.tree.leaves(slopes[1]))
    )
    step = jax.jit(lambda index: jax.tree.map(lambda p, g: p - 0.3 * g, index, jax.grad(loss, 1)(params, index, x)))

    def share(index):
        """Of attention's weight, on the tokens that are picked."""
        places = jnp.broadcast_to(jnp.arange(LENGTH)[None], (2, LENGTH))
        c, key = mla.latents(params, x, places, LATENT)
        sees = dsa._visible(2, LENGTH, None, None)
        p = dsa._weights(dsa._absorbed(params, x, places, LATENT), c, key, sees, LATENT).mean(1)
        at, there = dsa.picked(dsa.scores(*dsa.index(params, index, x, places, CONFIG, LATENT)), sees, CONFIG.top_k)
        return jnp.sum(jnp.where(there, jnp.take_along_axis(p, at, axis=-1), 0), -1).mean()

    first, before = loss(params, index, x), share(index)
    for _ in range(200):
        index = step(index)
    assert loss(params, index, x) < 0.7 * first and first > 0
    if not sparse:
        assert share(index) > before + 0.05


def test_what_does_not_fit_is_refused(made):
    with pytest.raises(ValueError, match=r"dsa.rope_dim must be even and at most dsa.dim = 8; got 10"):
        dsa.Config(dim=8, rope_dim=10)
    with pytest.raises(ValueError, match="implementation must be one of xla, reference; got 'cudnn'"):
        dsa.attend(*made, CONFIG, LATENT, implementation="cudnn")


def test_indexers_of_a_decoder_learn_from_their_loss_alone():
    config = transformer.Config(
        11, dim=DIM, num_heads=HEADS, attention="dsa", latent=LATENT, indexer=dsa.Config(2, 6, 4, top_k=5)
    )
    params = transformer.init(jax.random.key(0), config)
    x = jax.random.normal(jax.random.key(1), (2, 20, DIM))
    positions = jnp.broadcast_to(jnp.arange(20)[None], (2, 20))

    def loss(params, sparse):
        return transformer.index_loss(params, x, config, sparse=sparse, positions=positions)

    grads = jax.jit(jax.grad(loss), static_argnums=1)(params, False)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.any(g)) == ("indexer" in jax.tree_util.keystr(path))
    later = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
    assert loss(later, False) < loss(params, False)
    [attention] = jax.tree.leaves(
        jax.grad(lambda p: transformer.blocks(p, x, config).sum())(params)["layers"]["indexer"]["key"]
    )
    assert not jnp.any(attention)
    layer = jax.tree.map(lambda p: p[0], params["layers"])
    one = dataclasses.replace(config, num_layers=1)
    y = rms_norm(x, layer["attention_norm"], config.norm_eps)
    np.testing.assert_allclose(
        transformer.index_loss(jax.tree.map(lambda p: p[:1], params), x, one),
        dsa.index_loss(layer["latent"], layer["indexer"], y, config.indexer, LATENT, sparse=True),
        rtol=1e-5,
    )
    with pytest.raises(ValueError, match=r"index_loss needs transformer\.attention=dsa; got mla"):
        transformer.index_loss(params, x, dataclasses.replace(config, attention="mla"))
