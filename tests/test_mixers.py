"""Latent attention and RWKV one token at a time; and every kind of mixing gives the same behind padding and in a packed row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jrl.attention import dsa, mla, nsa, rwkv
from jrl.attention.rotary import rms_norm, rope
from jrl.nets import decoding, moe, transformer

LATENT = mla.Config(latent=6, nope_dim=4, rope_dim=2, value_dim=5)


def close(a, b, tolerance=1e-10):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def grads(f, *args):
    return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(3 * f(*a))), tuple(range(len(args)))))(*args)


@pytest.mark.parametrize("config", [LATENT, dataclasses.replace(LATENT, query_latent=7)])
def test_latent_attention_and_its_gradients(config):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(float), mla.init(jax.random.key(0), config, 8, 3))
        x = jax.random.normal(jax.random.key(1), (1, 9, 8), float)
        at = jnp.arange(9)[None]

        def wanted(params, x):
            source = rms_norm(x @ params["query_down"], params["query_norm"], 1e-6) if config.query_latent else x
            q = jnp.einsum("btd,dhw->bthw", source, params["query"])
            latent = rms_norm(x @ params["down"], params["norm"], 1e-6)
            shared = rope((x @ params["key"])[:, :, None], at, 1e4)
            k = jnp.einsum("btr,rhw->bthw", latent, params["up_key"])
            k = jnp.concatenate([k, jnp.repeat(shared, 3, axis=2)], -1)
            q = jnp.concatenate([q[..., :4], rope(q[..., 4:], at, 1e4)], -1)
            return oracles.dense(q, k, jnp.einsum("btr,rhw->bthw", latent, params["up_value"]))

        def ours(params, x):
            return mla.attend(params, x, config)

        close(jax.jit(ours)(params, x), jax.jit(wanted)(params, x), 1e-6)  # rotary angles are float32
        close(grads(ours, params, x), grads(wanted, params, x), 1e-6)


@pytest.mark.parametrize("start", [0, 6])
def test_absorbed_decoding_is_a_row_of_latent_attention(start):
    params = mla.init(jax.random.key(0), LATENT, 8, 3)
    x = jax.random.normal(jax.random.key(1), (2, 15, 8))
    at = np.broadcast_to(np.arange(15)[None], (2, 15))
    attend, latents, queries = (jax.jit(f, static_argnames="config") for f in (mla.attend, mla.latents, mla.queries))
    whole = np.asarray(attend(params, x, config=LATENT, segment_ids=(at >= start).astype(np.int32)))
    cache = mla.init_cache(LATENT, 2, 15)
    latent, key = jax.device_get(latents(params, x, at, config=LATENT))
    nope, turned = jax.device_get(queries(params, x, at, config=LATENT))

    @jax.jit
    def step(cache, t, latent, key, nope, turned):
        cache = mla.write(cache, latent, key, t)
        return cache, mla.decode_step(params, nope, turned, cache, t, LATENT, start=start)

    for t in range(15):
        cache, row = step(cache, jnp.int32(t), *(x[:, t] for x in (latent, key, nope, turned)))
        if t >= start:
            close(row, whole[:, t], 2e-5)
    assert cache.latent.shape == (2, 15, 6) and cache.key.shape == (2, 15, 2)


mix = jax.jit(rwkv.mix, static_argnames="chunk")  # one program where operations one by one would be dozens


def tokens(length, batch=2, heads=2, dim=3, value_dim=4, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(jax.dtypes.canonicalize_dtype(float))

    r, k, w = (normal(batch, length, heads, dim) for _ in range(3))
    return r, k, normal(batch, length, heads, value_dim), -np.exp(w), normal(heads, dim)


def by_hand(r, k, v, log_w, u, first):
    """Equations 18 and 19, one token, head and row at a time."""
    out = []
    for b in range(r.shape[0]):
        for h in range(r.shape[2]):
            state, ys = jnp.zeros((r.shape[3], v.shape[3])), []
            for t in range(r.shape[1]):
                state = jnp.zeros_like(state) if first[b][t] else state
                new = jnp.outer(k[b, t, h], v[b, t, h])
                ys.append(r[b, t, h] @ (state + u[h][:, None] * new))
                state = jnp.exp(log_w[b, t, h])[:, None] * state + new
            out.append(jnp.stack(ys))
    return jnp.moveaxis(jnp.stack(out).reshape(r.shape[0], r.shape[2], r.shape[1], -1), 1, 2)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_rwkv_in_chunks_and_its_gradients(chunk):
    with jax.enable_x64(True):
        args = tokens(11)
        first = np.zeros((2, 11), bool)
        first[0, [0, 5, 6]] = True

        def ours(*a):
            return rwkv.mix(*a, first=jnp.array(first), chunk=chunk)[0]

        def wanted(*a):
            return by_hand(*a, first)

        close(jax.jit(ours)(*args), jax.jit(wanted)(*args))
        close(grads(ours, *args), grads(wanted, *args))


def test_the_recurrence_is_the_sequence_and_the_state_carries_on():
    r, k, v, log_w, u = tokens(20)
    first = np.arange(20)[None] == np.array([[20], [13]])
    whole, end = jax.device_get(mix(r, k, v, log_w, u, first=first, chunk=8))

    def step(state, x):
        y, state = rwkv.recur(*x[:4], u, state, x[4])
        return state, y

    rows = jax.tree.map(lambda x: np.moveaxis(x, 1, 0), (r, k, v, log_w, first))
    state, y = jax.lax.scan(step, jnp.zeros((2, 2, 3, 4)), rows)
    close((np.moveaxis(y, 0, 1), state), (whole, end), 2e-5)

    def head(x):
        return x[:, :7]

    def tail(x):
        return x[:, 7:]

    _, middle = mix(*map(head, (r, k, v, log_w)), u, first=head(first))
    rest, _ = mix(*map(tail, (r, k, v, log_w)), u, middle, tail(first))
    close(rest, whole[:, 7:], 2e-5)


def test_a_strong_decay_overflows_nothing():
    r, k, v, log_w, u = tokens(40)
    y, state = mix(r, k, v, 200 * log_w, u)
    assert np.isfinite(y).all() and np.isfinite(state).all()
    g = jax.grad(lambda w: mix(r, k, v, w, u)[0].sum())(200 * log_w)
    assert jnp.isfinite(g).all()


@pytest.mark.slow
def test_a_decay_that_fades_all_at_once_leaves_the_rest_exact():
    r, k, v, _, u = tokens(40)
    strong = jax.random.bernoulli(jax.random.key(9), 0.3, r.shape)
    grad = jax.jit(jax.grad(lambda w: rwkv.mix(r, k, v, w, u)[0].sum()))
    wanted = jax.jit(lambda w: by_hand(r, k, v, w, u, np.zeros((2, 40), bool)))
    for fade in (-50.0, -1e6, -3e38):
        log_w = jnp.where(strong, fade, -1e-3)
        np.testing.assert_allclose(rwkv.mix(r, k, v, log_w, u)[0], wanted(log_w), atol=2e-4)
        g = grad(log_w)
        assert jnp.isfinite(g).all()


# A sequence is the same alone, behind padding, and in a packed row

SHAPE = transformer.Config(11, dim=16, num_heads=2, num_kv_heads=1, ffn_dim=16, window=5, latent=LATENT)
DECODERS = {
    "dense": {},
    "dense in blocks": {"implementation": "xla"},
    "experts": {"experts": moe.Config(4, expert_dim=8)},
    "window": {"attention": "window"},
    "mla": {"attention": "mla"},
    "dsa": {"attention": "dsa", "indexer": dsa.Config(heads=2, dim=4, rope_dim=2, top_k=5)},
    "rwkv": {"attention": "rwkv"},
    "nsa": {"attention": "nsa", "sparse": nsa.Config(4, 2, 4, 4, window=5)},
    "nsa, blocks longer than padding": {
        "attention": "nsa",
        "sparse": nsa.Config(8, 8, 16, 3, window=5, pooling="mean"),
    },
}
LENGTH, PADDING, SEGMENTS = 40, np.array([0, 1, 3, 5, 8, 13]), np.array([5, 1, 9, 25])


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request):
    """Shape, parameters, a sequence, and its logits with neither padding nor neighbours."""
    config = dataclasses.replace(SHAPE, **DECODERS[request.param])
    params = jax.tree.map(lambda x: 3 * x, transformer.init(jax.random.key(0), config))  # far from uniform
    tokens = jax.random.randint(jax.random.key(1), (LENGTH,), 0, 11)
    return config, params, tokens, jax.jit(lambda p: transformer.forward(p, tokens[None], config)[0])(params)


def padded(tokens, length):
    """The first tokens behind each number of pads ``[6, length]``, and their positions, below 0 for padding."""
    at = np.arange(length)[None] - PADDING[:, None]
    return jnp.where(at >= 0, tokens[np.maximum(at, 0)], 0), at


def test_padding_and_packing_change_no_logits(decoder):
    config, params, tokens, alone = decoder
    rows, at = padded(tokens, LENGTH)
    inside = np.concatenate([np.arange(n) for n in SEGMENTS])  # the packed row: so many first tokens of the sequence
    ids = np.concatenate([at >= 0, np.repeat(np.arange(4), SEGMENTS)[None]])
    at = np.concatenate([at, inside[None]])
    rows = jnp.concatenate([rows, tokens[inside][None]])
    forward = jax.jit(
        lambda p: transformer.forward(p, rows, config, positions=jnp.array(at), segment_ids=jnp.array(ids))
    )
    out = np.asarray(forward(params))
    np.testing.assert_allclose(out[at >= 0], alone[at[at >= 0]], atol=2e-4, rtol=2e-4)


def test_padding_changes_no_logits_of_the_cache(decoder):
    """For a prompt that is read at once, and for one that is read token by token."""
    config, params, tokens, alone = decoder
    rows, at = padded(tokens, LENGTH)
    empty = decoding.init_cache(config, len(PADDING), LENGTH)
    prefill = jax.jit(
        lambda cache: decoding.prefill(params, rows[:, :16], cache, config, valid=jnp.array(at[:, :16] >= 0))
    )
    step = jax.jit(lambda x, cache, t: decoding.decode(params, x, cache, t, config, start=jnp.array(PADDING)))

    last, filled = prefill(empty)
    for begin, cache, out in ((0, empty, []), (16, filled, [last])):
        for t in range(begin, LENGTH):
            logits, cache = step(rows[:, t], cache, jnp.int32(t))
            out.append(logits)
        read = at.T[-len(out) :]
        np.testing.assert_allclose(np.stack(out)[read >= 0], alone[read[read >= 0]], atol=2e-4, rtol=2e-4)
