"""Groups of answers to one prompt, which stand side by side: rewards ``[N]`` are those of ``N / group_size`` groups."""

import jax
import jax.numpy as jnp

from jrl.equations import token_losses
from jrl.numerics import checks

Array = jax.Array


def scores(parts: dict[str, Array], group_size: int) -> dict[str, Array]:
    """Mean parts, and the chance that one answer, or one of half a group, is right."""
    right = parts["correct"].reshape(-1, group_size).sum(1)
    k = min(group_size, max(2, group_size // 2))
    own = {
        "episode_return": parts["correct"].mean(),
        f"pass_at_{k}": token_losses.pass_at_k(group_size, right, k).mean(),
    }
    checks.apart("verify's parts", parts, own)
    return own | {name: x.mean() for name, x in parts.items()}


def drawn(reward: Array, mask: Array, group_size: int) -> dict[str, Array]:
    """Statistics of the answers that count (some token is not masked): mean reward, share of groups without two rewards to compare,
    number and mean length."""
    counts = mask.any(1)
    number = counts.sum(dtype=jnp.float32)
    return {
        "reward": jnp.sum(reward, where=counts) / jnp.maximum(number, 1),
        "no_signal": 1 - token_losses.varied(reward, group_size, counts).mean(dtype=jnp.float32),
        "episodes": number,
        "episode_length": mask.sum(dtype=jnp.float32) / jnp.maximum(number, 1),
    }


def informative(correct: Array, mask: Array, group_size: int, num_groups: int) -> Array:
    """Rows of ``num_groups`` groups, first those whose answers are neither all right nor all wrong, int32 ``[num_groups * group_size]``.

    This is DAPO's dynamic sampling, ``0 < right answers < G`` (2503.14476, eq. 11): it goes by the verifier's ``correct [N]`` alone,
    whatever else is rewarded. Where that is more than right and wrong, two answers differ in it. Answers whose tokens are all masked
    do not count.
    """
    informative = token_losses.varied(correct, group_size, mask.any(1))
    order = jnp.argsort(~informative, stable=True)[:num_groups]
    return (order[:, None] * group_size + jnp.arange(group_size)[None]).ravel()
