"""Group relative policy optimization, GRPO (Shao et al. 2024, https://arxiv.org/abs/2402.03300), of a tiny language model.

The task is addition modulo 7: to the prompt ``5+6=`` the right answer is ``4`` and the end token. A verifier gives reward 1 to that
answer and 0 to any other. Nothing is demonstrated: the model starts from random weights and learns from its own answers alone.

One update answers each of P prompts G times. The group takes the place of a critic: an answer is good if it is better than the others.

    advantage  A_i = (R_i - mean(R)) / (std(R) + eps), over the G answers to one prompt                              section 4.1.2
    policy     L_clip = mean over answers of the mean over tokens of -min(r A, clip(r, 1 - eps, 1 + eps) A)          eq. 3
               where r = pi(token) / pi_old(token), and pi_old is the policy that answered
    total      L = L_clip + beta KL - c entropy,  KL = q - log q - 1 with q = pi_ref(token) / pi(token)              eq. 4, "k3"

The KL term keeps the policy near a reference, here the model at the start; that is what one wants after pretraining, so beta is small
here. The entropy bonus is not in the paper: a policy that starts from nothing must keep exploring.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jrl.equations import token_losses

NUM_SEEDS, NUM_UPDATES = 4, 200
NUM_PROMPTS, GROUP_SIZE = 32, 8  # P and G: an update learns from P * G answers
NUM_EPOCHS = 2  # gradient steps on the answers of an update (the paper's mu)
LEARNING_RATE, MAX_GRAD_NORM = 2e-3, 1.0
CLIP_EPS, KL_WEIGHT, ENTROPY_WEIGHT = 0.2, 1e-3, 0.05  # epsilon, beta, c

MODULUS = 7
PAD, END, ZERO = 0, 1, 2  # tokens: padding, the end of an answer, the residues 0 to 6, plus and equals
PLUS, EQUALS = ZERO + MODULUS, ZERO + MODULUS + 1
VOCAB_SIZE, PROMPT_LENGTH, ANSWER_LENGTH = ZERO + MODULUS + 2, 4, 2
DIM, NUM_LAYERS, NUM_HEADS, HEAD_DIM, FFN_DIM = 64, 1, 4, 16, 128

Array = jax.Array


def draw_prompt(key: Array) -> tuple[Array, Array]:
    """A prompt ``[PROMPT_LENGTH]`` and its right answer ``[ANSWER_LENGTH]``."""
    a, b = jax.random.randint(key, (2,), 0, MODULUS)
    prompt = jnp.stack([ZERO + a, jnp.int32(PLUS), ZERO + b, jnp.int32(EQUALS)])
    return prompt, jnp.stack([ZERO + (a + b) % MODULUS, jnp.int32(END)])


# The model: a decoder with rotary positions, RMSNorm before each part of a layer, and SwiGLU


def init_params(key: Array) -> Any:
    keys = iter(jax.random.split(key, 100))

    def normal(fan_in: int, *shape: int) -> Array:
        return fan_in**-0.5 * jax.random.normal(next(keys), shape)

    layers = []
    for _ in range(NUM_LAYERS):
        layer = {name: normal(DIM, DIM, NUM_HEADS, HEAD_DIM) for name in "qkv"}
        layer |= {name: normal(DIM, DIM, FFN_DIM) for name in ("gate", "up")}
        # What writes into the stream starts smaller, by the number of writers.
        layer["o"] = normal(NUM_HEADS * HEAD_DIM * 2 * NUM_LAYERS, NUM_HEADS, HEAD_DIM, DIM)
        layer["down"] = normal(FFN_DIM * 2 * NUM_LAYERS, FFN_DIM, DIM)
        layers.append(layer | {"attention_norm": jnp.ones(DIM), "ffn_norm": jnp.ones(DIM)})
    return {"embedding": 0.02 * normal(1, VOCAB_SIZE, DIM), "layers": layers, "norm": jnp.ones(DIM)}


def rms_norm(x: Array, weight: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * weight


def rotate(x: Array) -> Array:
    """Rotary positions of heads ``[N, L, H, D]``: each pair of numbers is turned by an angle that grows with the position."""
    a, b = jnp.split(x, 2, axis=-1)
    frequency = 10_000.0 ** (-jnp.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    angle = (jnp.arange(x.shape[1])[:, None] * frequency)[:, None]
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1)


def next_token_logits(params: Any, tokens: Array) -> Array:
    """Logits ``[N, L, V]`` of the token that follows each of ``tokens [N, L]``."""
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        y = rms_norm(x, layer["attention_norm"])
        q, k, v = (jnp.einsum("nld,dhw->nlhw", y, layer[name]) for name in "qkv")
        heads = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + jnp.einsum("nlhw,hwd->nld", heads, layer["o"])
        y = rms_norm(x, layer["ffn_norm"])
        x = x + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"]
    return rms_norm(x, params["norm"]) @ params["embedding"].T


def sample(key: Array, params: Any, prompt: Array) -> tuple[Array, Array]:
    """Answers to prompts ``[N, PROMPT_LENGTH]``: tokens and mask ``[N, ANSWER_LENGTH]``, true up to and including the end token.

    The whole sequence is read again for every token. A cache of keys and values pays for answers longer than these.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(prompt)))  # one for each answer

    def say(t: Array, tokens: Array) -> Array:
        logits = next_token_logits(params, tokens)[:, PROMPT_LENGTH + t - 1]
        said = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in, (0, None))(keys, t), logits)
        return tokens.at[:, PROMPT_LENGTH + t].set(said)

    tokens = jax.lax.fori_loop(0, ANSWER_LENGTH, say, jnp.pad(prompt, [(0, 0), (0, ANSWER_LENGTH)]))
    answer = tokens[:, PROMPT_LENGTH:]
    mask = jnp.cumsum(answer == END, axis=1) - (answer == END) == 0
    return jnp.where(mask, answer, PAD), mask


def log_probs(params: Any, prompt: Array, answer: Array) -> tuple[Array, Array]:
    """``log pi`` of each token of the answers, and the entropy of the policy there, both ``[N, ANSWER_LENGTH]``."""
    logits = next_token_logits(params, jnp.concatenate([prompt, answer[:, :-1]], axis=1))
    log_pi = jax.nn.log_softmax(logits[:, PROMPT_LENGTH - 1 :])
    entropy = -jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1)
    return jnp.take_along_axis(log_pi, answer[..., None], axis=-1)[..., 0], entropy


class State(NamedTuple):
    """The whole run."""

    params: Any
    reference: Any  # parameters of pi_ref
    opt_state: Any
    key: Array
    updates: Array


class Batch(NamedTuple):
    """Answers ``[N, ...]``, as the loss needs them."""

    prompt: Array
    answer: Array
    mask: Array
    old_log_prob: Array
    ref_log_prob: Array
    advantage: Array  # [N]


def optimizer(updates: Array | int) -> optax.GradientTransformation:
    learning_rate = LEARNING_RATE * (1 - updates / NUM_UPDATES)
    return optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adam(learning_rate, eps=1e-5))


def init(key: Array) -> State:
    key_params, key_run = jax.random.split(key)
    params = init_params(key_params)
    return State(params, params, optimizer(0).init(params), key_run, jnp.int32(0))


def loss(params: Any, batch: Batch) -> Array:
    """Equation 3: a clipped surrogate and a KL term at each token, averaged over the tokens of an answer, then over answers."""
    log_prob, entropy = log_probs(params, batch.prompt, batch.answer)
    each = token_losses.clip(log_prob - batch.old_log_prob, batch.advantage, CLIP_EPS, CLIP_EPS)
    each += KL_WEIGHT * token_losses.kl_k3(log_prob, batch.ref_log_prob)
    return token_losses.weighted_sum(token_losses.weights(batch.mask, "sequence_mean"), each - ENTROPY_WEIGHT * entropy)


def update(state: State, _: None = None) -> tuple[State, dict[str, Array]]:
    """Ask, answer, verify, compare within groups, and take a few gradient steps."""
    key, key_answer = jax.random.split(state.key)
    key_draw, key_sample = jax.random.split(key_answer)
    prompt, right = jax.vmap(draw_prompt)(jax.random.split(key_draw, NUM_PROMPTS))
    prompt, right = (jnp.repeat(x, GROUP_SIZE, axis=0) for x in (prompt, right))
    answer, mask = sample(key_sample, state.params, prompt)
    reward = jnp.all(answer == right, axis=1).astype(jnp.float32)
    advantage = token_losses.zscore(reward, GROUP_SIZE, ddof=1, eps=1e-4)
    old, ref = (log_probs(params, prompt, answer)[0] for params in (state.params, state.reference))
    batch = Batch(prompt, answer, mask, old, ref, advantage)
    tx = optimizer(state.updates)

    def step(carry: Any, _: None) -> tuple[Any, Array]:
        params, opt_state = carry
        error, grads = jax.value_and_grad(loss)(params, batch)
        change, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, change), opt_state), error

    (params, opt_state), errors = jax.lax.scan(step, (state.params, state.opt_state), length=NUM_EPOCHS)
    state = state._replace(params=params, opt_state=opt_state, key=key, updates=state.updates + 1)
    return state, {"loss": errors.mean(), "reward": reward.mean()}


def train(key: Array) -> tuple[State, dict[str, Array]]:
    """A whole run: its last state, and the metrics of each update."""
    return jax.lax.scan(update, init(key), length=NUM_UPDATES)


def main() -> None:
    begin = time.perf_counter()
    keys = jax.random.split(jax.random.key(0), NUM_SEEDS)
    _, metrics = jax.block_until_ready(jax.jit(jax.vmap(train))(keys))  # all seeds in one program
    print(f"GRPO on modular addition, {NUM_SEEDS} seeds: {time.perf_counter() - begin:.0f} s, compilation included")
    print("   updates  mean reward  worst seed  best seed")
    for tenth, score in enumerate(metrics["reward"].reshape(NUM_SEEDS, 10, -1).mean(-1).T, start=1):
        print(f"{tenth * NUM_UPDATES // 10:10,} {score.mean():12.3f} {score.min():11.3f} {score.max():10.3f}")


if __name__ == "__main__":
    main()
