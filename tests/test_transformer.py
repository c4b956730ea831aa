"""The decoder: one token after another is the whole sequence, and its parts by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import envs, nets
from jrl.attention import dsa, mla, nsa
from jrl.attention.rotary import rms_norm, rope
from jrl.nets import decoding, moe, transformer

SMALL = transformer.Config(
    vocab_size=11, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, qkv_bias=True, qk_norm=True
)
SPARSE = nsa.Config(block=4, stride=2, select_block=4, selected=4, window=5)
KINDS = {
    "dense": SMALL,
    "window": dataclasses.replace(SMALL, attention="window", window=5, tie_embeddings=False),
    "nsa": dataclasses.replace(SMALL, attention="nsa", sparse=SPARSE, head_dim=6),
    "shared": dataclasses.replace(SMALL, attention="nsa", sparse=SPARSE, shared_kv=True),
    "mla": dataclasses.replace(
        SMALL, attention="mla", latent=mla.Config(latent=8, nope_dim=6, rope_dim=4, value_dim=5)
    ),
    "dsa": dataclasses.replace(
        SMALL,
        attention="dsa",
        latent=mla.Config(latent=8, nope_dim=6, rope_dim=4, value_dim=5),
        indexer=dsa.Config(heads=2, dim=6, rope_dim=4, top_k=5),
    ),
    "rwkv": dataclasses.replace(SMALL, attention="rwkv"),
    "experts": dataclasses.replace(SMALL, experts=moe.Config(experts=4, expert_dim=8, scores="sigmoid", shared=1)),
}


def close(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def start(config, key):
    """Parameters away from zero biases and unit norms, and tokens."""
    params = transformer.init(key, config)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(5), x.shape), params)
    return params, jax.random.randint(jax.random.key(1), (2, 27), 0, config.vocab_size)


@pytest.mark.thorough(3)
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_the_logits_of_the_whole_sequence(kind, key):
    config = KINDS[kind]
    params, tokens = start(config, key)
    whole = jax.jit(lambda p, t: transformer.forward(p, t, config))(params, tokens)
    assert whole.shape == (2, 27, 11) and whole.dtype == jnp.float32

    def step(cache, x):
        logits, cache = decoding.decode(params, x[1], cache, x[0], config)
        return cache, logits

    cache = decoding.init_cache(config, 2, 27)
    _, steps = jax.jit(lambda: jax.lax.scan(step, cache, (jnp.arange(27), tokens.T)))()
    close(jnp.moveaxis(steps, 0, 1), whole)
    later = tokens.at[:, 20:].set(3)
    np.testing.assert_array_equal(
        transformer.forward(params, later, config)[:, :20], transformer.forward(params, tokens, config)[:, :20]
    )


@pytest.mark.thorough(1)
@pytest.mark.parametrize("kind", ["dense", "window", "mla", "rwkv"])
def test_packed_sequences_are_as_if_alone(kind, key):
    config = KINDS[kind]
    params, tokens = start(config, key)
    ids = jnp.broadcast_to(jnp.arange(27)[None] >= 10, tokens.shape).astype(jnp.int32)
    positions = jnp.where(ids == 1, jnp.arange(27)[None] - 10, jnp.arange(27)[None])
    packed = transformer.forward(params, tokens, config, positions=positions, segment_ids=ids)
    close(packed[:, :10], transformer.forward(params, tokens[:, :10], config))
    close(packed[:, 10:], transformer.forward(params, tokens[:, 10:], config))
    cache = decoding.init_cache(config, 2, 27)
    for t in range(27):
        logits, cache = decoding.decode(params, tokens[:, t], cache, jnp.int32(t), config, start=10 if t >= 10 else 0)
    close(logits, packed[:, -1])


def test_padding_changes_nothing(key):
    params, tokens = start(SMALL, key)
    padded = jnp.pad(tokens, [(0, 0), (6, 0)])
    valid, positions = jnp.arange(33)[None] >= jnp.full((2, 1), 6), jnp.broadcast_to(jnp.arange(33)[None] - 6, (2, 33))
    close(
        transformer.forward(params, padded, SMALL, positions=positions, valid=valid)[:, 6:],
        transformer.forward(params, tokens, SMALL),
    )


def test_rotary_positions_by_hand_and_relative():
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    out = rope(x, jnp.array([[2]]), 100.0)[0, 0, 0]
    angle = np.array([2.0, 0.2])
    wanted = [np.cos(angle) * [1, 2] - np.sin(angle) * [3, 4], np.cos(angle) * [3, 4] + np.sin(angle) * [1, 2]]
    close(out, np.concatenate(wanted), 1e-5)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i, j):
        return jnp.sum(rope(q, jnp.array([[i]]), 1e4) * rope(k, jnp.array([[j]]), 1e4))

    close(score(7, 3), score(104, 100), 1e-4)


def test_norm_and_feed_forward_by_hand():
    close(rms_norm(jnp.array([3.0, 4.0]), jnp.array([1.0, 2.0]), 0.0), np.array([3, 8]) / np.sqrt(12.5), 1e-6)
    layer = {
        "ffn_norm": jnp.ones(2),
        "gate": jnp.array([[1.0], [0.0]]),
        "up": jnp.array([[0.0], [2.0]]),
        "down": jnp.array([[1.0, -1.0]]),
    }
    x = np.array([3, 4]) / np.sqrt(12.5)
    inner = x[0] / (1 + np.exp(-x[0])) * 2 * x[1]
    config = dataclasses.replace(SMALL, norm_eps=0.0)
    close(transformer.ffn(layer, jnp.array([3.0, 4.0]), config), [inner, -inner], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_axes_name_every_parameter(kind, key):
    config = KINDS[kind]
    names, params = transformer.axes(config), jax.eval_shape(lambda: transformer.init(key, config))
    jax.tree.map(lambda p, n: None if p.ndim == len(n) else pytest.fail(f"{p.shape} {n}"), params, names)


@pytest.mark.thorough(3)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "experts"])
def test_a_prompt_at_once_is_its_tokens_one_by_one(kind, key):
    """Padded on the left, with what follows it."""
    config = KINDS[kind]
    params, tokens = start(config, key)
    valid, begin = jnp.arange(27)[None] >= jnp.array([[0], [6]]), jnp.array([0, 6])
    step = jax.jit(lambda cache, token, t: decoding.decode(params, token, cache, t, config, start=begin))
    at_once = jax.jit(lambda cache: decoding.prefill(params, tokens[:, :18], cache, config, valid=valid[:, :18]))
    one_by_one = decoding.init_cache(config, 2, 27)
    for t in range(18):
        logits, one_by_one = step(one_by_one, tokens[:, t], t)
    found, cache = at_once(decoding.init_cache(config, 2, 27))
    close(found, logits)
    for t in range(18, 27):
        logits, one_by_one = step(one_by_one, tokens[:, t], t)
        found, cache = step(cache, tokens[:, t], t)
        close(found, logits)


@pytest.mark.parametrize("kind", ["dense", "mla", "nsa"])
def test_a_prompt_longer_than_its_cache_is_refused(kind, key):
    config = KINDS[kind]
    tokens = jnp.zeros((1, 20), jnp.int32)

    def call(params):
        return decoding.prefill(params, tokens, decoding.init_cache(config, 1, 8), config)

    with pytest.raises(ValueError, match="prefill: 20 tokens do not fit in a cache for 8"):
        jax.eval_shape(call, jax.eval_shape(lambda: transformer.init(jax.random.key(0), config)))


@pytest.mark.slow
def test_remat_changes_no_gradient(key):
    params, tokens = start(SMALL, key)

    def loss(config):
        return jax.grad(lambda p: transformer.forward(p, tokens, config).std())(params)

    close(loss(SMALL), loss(dataclasses.replace(SMALL, remat=True)), 1e-5)


@pytest.mark.slow
def test_a_vision_transformer_is_a_torso(key):
    config = nets.Config(torso="vit", patch=3, vit_dim=8, vit_layers=1, vit_heads=2, hidden=(8,))
    net = nets.actor_critic(config, jax.ShapeDtypeStruct((10, 10, 4), jnp.bool_), envs.Discrete(3))
    params, obs = net.init(key), jax.random.bernoulli(key, 0.3, (5, 10, 10, 4))
    _, out = net.step(params, (), obs, jnp.zeros(5, bool))
    assert out.policy.shape == (5, 3) and out.value.shape == (5,)
    swapped = obs.at[:, :3, :3].set(obs[:, 3:6, 3:6]).at[:, 3:6, 3:6].set(obs[:, :3, :3])
    assert (net.step(params, (), swapped, jnp.zeros(5, bool))[1].value != out.value).any()  # patches know their place
    alone = net.step(params, (), obs[2:3], jnp.zeros(1, bool))[1].value
    close(alone, out.value[2:3], 1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: transformer.Config(num_heads=4, num_kv_heads=3),
            "num_heads must be a multiple of num_kv_heads = 3; got 4",
        ),
        (lambda: transformer.Config(dim=30), "dim must be a multiple of num_heads = 4, or give head_dim; got 30"),
        (lambda: transformer.Config(dim=12), "head_dim must be even"),
        (lambda: transformer.Config(rope_theta=0.0), "rope_theta must be at least 1; got 0"),
        (lambda: transformer.Config(rope_theta=float("nan")), "rope_theta must be at least 1; got nan"),
        (lambda: transformer.Config(norm_eps=-1.0), "norm_eps must be between 0 and 1; got -1"),
        (lambda: transformer.Config(attention="flash"), "transformer.attention must be one of dense, window, nsa"),
        (lambda: transformer.Config(causal=False, attention="nsa"), "causal=False needs transformer.attention=dense"),
        (
            lambda: nets.actor_critic(nets.Config(torso="vit"), jax.ShapeDtypeStruct((4,), float), envs.Discrete(2)),
            "network.torso=vit needs",
        ),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_step_writes_its_token_in_place():
    """A loop of decoding needs no second cache: its memory is that of the cache, and of what one layer computes."""
    config = transformer.Config(vocab_size=8, dim=16, num_layers=6, num_heads=2, num_kv_heads=2, ffn_dim=16)
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))
    cache = jax.eval_shape(lambda: decoding.init_cache(config, 4, 512))

    def run(params, cache):
        def step(carry):
            t, token, cache = carry
            logits, cache = decoding.decode(params, token, cache, t, config)
            return t + 1, jnp.argmax(logits, -1).astype(jnp.int32), cache

        return jax.lax.while_loop(lambda c: c[0] < 512, step, (jnp.int32(0), jnp.zeros(4, jnp.int32), cache))[1]

    room = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    needed = jax.jit(run, donate_argnums=1).lower(params, cache).compile().memory_analysis().temp_size_in_bytes
    assert needed < 1.6 * room  # the cache, and the rows of one layer of six
