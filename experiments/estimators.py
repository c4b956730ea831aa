"""Which policy-gradient estimators of language models are biased, and how noisy they are: exactly, on every answer there is.

python experiments/estimators.py
python experiments/estimators.py --vocabulary 6 --length 5 --group-sizes 2 4 --methods grpo dr_grpo rloo

A tiny policy writes answers of up to ``length`` tokens, token 0 ending one early; an answer is right if more than half of its
symbols are 1. Answers are drawn in groups. An estimate sees of an answer its reward, its length and its gradient: given the
rewards and lengths of a group, its answers are independent, so summing over every such group gives the estimator's mean
and variance without sampling. The equations are those of jrl.equations.token_losses. On-policy, the sampler is the policy; off-policy,
the policy has since taken a step of ``step`` along the true gradient, so that ratios leave 1.

On-policy, REINFORCE and RLOO are unbiased, and Dr. GRPO's centred rewards are but for the factor (G - 1) / G: no weight of
theirs depends on an answer's length. GRPO and GSPO divide by each answer's length and so point elsewhere, however large the group;
dividing by the group's deviation only rescales a prompt where rewards are right or wrong. DAPO, CISPO and REINFORCE++ divide by
the tokens of the group, a bias that fades as groups grow. Off-policy all of them are biased: plain losses and CISPO's
keep the direction, clipped ones lose the tokens that have moved.

Columns: ``factor``, the multiple of the true gradient that is nearest to the mean estimate; ``bias``, the distance of the mean
estimate from the true gradient, over its norm; ``cosine`` of the angle between the two; ``variance``, the trace of the
covariance over the squared norm of the mean; ``z``, how far the mean of sampled groups lies from the exact one, in standard
errors (about 1). It leaves estimators.csv and estimators.png.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrl.equations import token_losses as tl
from jrl.numerics import checks
from jrl.run import cli, memory, plot, report

Array = jax.Array

MOST = 1_000_000  # answers, and groups of kinds
MOST_PARAMETERS = 10_000  # of which every sampled group has a gradient


class Method(NamedTuple):
    """An estimator: ``advantage(reward [G], mask [G, T]) -> [G]``, the weights of tokens, and the token loss
    ``loss(log_prob, log_ratio, advantage, mask) -> [N, T]``, whose gradient is proportional to an advantage of one sign."""

    advantage: Callable[[Array, Array], Array]
    how: Any
    loss: Callable[[Array, Array, Array, Array], Array]

    def weights(self, mask: Array) -> Array:
        return tl.weights(mask, self.how, 1 if self.how == "constant" else None)


def zscore(reward: Array, mask: Array) -> Array:
    return tl.zscore(reward, len(reward), ddof=1, eps=1e-4)


def centred(reward: Array, mask: Array) -> Array:
    return tl.centred(reward, len(reward))


def rloo(reward: Array, mask: Array) -> Array:
    return tl.rloo(reward, len(reward))


def whitened(reward: Array, mask: Array) -> Array:
    """Of REINFORCE++ without a KL: the same number at all of an answer's tokens."""
    zeros = jnp.zeros(mask.shape)
    return tl.reinforce_plus_plus(reward, zeros, zeros, mask, beta=0.0)[:, 0]


def clipped(low: float, high: float) -> Any:
    return lambda log_prob, log_ratio, advantage, mask: tl.clip(log_ratio, advantage, low, high)


def plain(log_prob: Array, log_ratio: Array, advantage: Array, mask: Array) -> Array:
    return tl.policy_gradient(log_prob, advantage)


METHODS = {
    "reinforce": Method(lambda reward, mask: reward, "constant", plain),
    "rloo": Method(rloo, "constant", plain),
    "dr_grpo": Method(centred, "constant", clipped(0.2, 0.2)),
    "grpo": Method(zscore, "sequence_mean", clipped(0.2, 0.2)),
    "dapo": Method(zscore, "token_mean", clipped(0.2, 0.28)),
    "gspo": Method(zscore, "sequence_mean", lambda _, ratio, a, mask: tl.gspo(ratio, a, mask, 0.1, 0.1)),
    "cispo": Method(zscore, "token_mean", lambda log_prob, ratio, a, mask: tl.cispo(log_prob, ratio, a, 1.0, 0.28)),
    "reinforce++": Method(whitened, "token_mean", clipped(0.2, 0.2)),
}


@dataclass(frozen=True)
class Args:
    """Compare policy-gradient estimators by enumeration."""

    # Estimators: reinforce, rloo, dr_grpo, grpo, dapo, gspo, cispo, reinforce++.
    methods: tuple[str, ...] = tuple(METHODS)
    vocabulary: int = 4  # Number of tokens, the end included.
    length: int = 4  # Tokens of the longest answer; vocabulary ** length may be at most 1e6.
    group_sizes: tuple[int, ...] = (2, 4, 8)  # Answers in a group.
    step: float = 0.5  # Step of the policy along the true gradient, off-policy.
    samples: int = 4096  # Groups drawn to check each exact mean.
    seed: int = 0  # Seed of the policy and of the samples.
    run_dir: cli.NamedFolder = Path("runs/estimators")  # Folder for the table and the plot.


class Task(NamedTuple):
    """Every answer: tokens and mask ``[S, T]``, reward ``[S]``, and its kind ``[S]``, one for each reward and length."""

    tokens: Array
    mask: Array
    reward: Array
    kind: Array
    kinds: int


class Estimate(NamedTuple):
    """Of an estimator of the gradient: its mean, shaped as the parameters, and the trace of its covariance."""

    mean: Array
    variance: Array


def every_answer(vocabulary: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """All answers and their masks, ``[S, T]`` each; what follows the end is 0."""
    tokens = np.stack(np.unravel_index(np.arange(vocabulary**length), (vocabulary,) * length), axis=1)
    over = np.cumsum(tokens == 0, axis=1) - (tokens == 0) > 0
    tokens, over = (x[~np.any(over & (tokens > 0), axis=1)] for x in (tokens, over))
    return tokens, ~over


def make_task(vocabulary: int, length: int, reward: Callable[[np.ndarray], np.ndarray] | None = None) -> Task:
    """The task of ``reward(tokens [S, T]) -> [S]``, with few different values; of the script's own rule by default."""
    tokens, mask = every_answer(vocabulary, length)
    values = (2 * (tokens == 1).sum(1) > (tokens > 0).sum(1)).astype(float) if reward is None else reward(tokens)
    kinds, kind = np.unique(np.stack([values, mask.sum(1)]), axis=1, return_inverse=True)
    return Task(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(values), jnp.asarray(kind.ravel()), kinds.shape[1])


def lookup(table: Array, tokens: Array) -> Array:
    """``[S, T]`` of the policy's table ``[T, 1 + V, V]``: by position and by the token before, which is V at first."""
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=table.shape[-1])
    return table[jnp.arange(tokens.shape[1])[None], before, tokens]


def log_prob(params: Array, task: Task) -> Array:
    """Of every answer's tokens, ``[S, T]``, 0 where masked; the parameters ``[T, 1 + V, V]`` are logits."""
    return tl.masked(lookup(jax.nn.log_softmax(params), task.tokens), task.mask)


def probability(params: Array, task: Task) -> Array:
    """Of every answer, ``[S]``."""
    return jnp.exp(log_prob(params, task).sum(1))


def true_gradient(params: Array, task: Task) -> Array:
    """Of the expected reward."""
    return jax.grad(lambda p: jnp.sum(probability(p, task) * task.reward))(params)


def exact(method: Method, params: Array, sampler: Array, task: Task, group_size: int) -> Estimate:
    """Mean and variance of an estimate at ``params`` from one group of answers of the policy ``sampler``.

    In a group each answer i adds ``a_i h(y_i)``: ``|a_i|``, advantage times weight, depends on the kinds in the group; the gradient
    h on the answer and on the sign of ``a_i``. With m and s the mean and the mean square of h given the kind, the estimate has, given
    the kinds, mean ``sum a_i m_i`` and mean square ``|sum a_i m_i|^2 + sum a_i^2 (s_i - |m_i|^2)``; groups of kinds are multinomial.
    """
    share = jax.ops.segment_sum(probability(sampler, task), task.kind, task.kinds)
    mean, square = gradients_by_kind(method, params, sampler, task, share)
    groups, chance = groups_of_kinds(share, group_size)
    first = jnp.asarray(np.unique(np.asarray(task.kind), return_index=True)[1])  # an answer of each kind

    def moments(kinds: Array) -> tuple[Array, Array]:
        mask = task.mask[first[kinds]]
        a = method.advantage(task.reward[first[kinds]], mask) * method.weights(mask)[:, 0]
        sign = jnp.where(a < 0, 1, 0)
        m, s = mean[sign, kinds], square[sign, kinds]
        total = jnp.sum(jnp.abs(a)[:, None] * m, axis=0)
        return total, jnp.sum(total**2) + jnp.sum(a**2 * (s - jnp.sum(m**2, axis=1)))

    def add(carry: tuple[Array, Array], group: tuple[Array, Array]) -> tuple[Any, None]:
        total, square = moments(group[0])
        return (carry[0] + group[1] * total, carry[1] + group[1] * square), None

    (total, second), _ = jax.lax.scan(add, (jnp.zeros(params.size), jnp.zeros(())), (groups, chance))
    return Estimate(total.reshape(params.shape), second - jnp.sum(total**2))


def gradients_by_kind(method: Method, params: Array, sampler: Array, task: Task, share: Array) -> tuple[Array, Array]:
    """Mean ``[2, kinds, size of params]`` and mean square ``[2, kinds]`` of an answer's gradient, given its kind, for advantages 1 and -1."""
    old, new = log_prob(sampler, task), log_prob(params, task)
    chance = probability(sampler, task) / share[task.kind]

    def token_gradient(sign: Array) -> Array:
        """Of minus the loss with respect to the log-probability of each token, ``[S, T]``."""
        advantage = jnp.full(len(new), sign)
        return jax.grad(lambda x: -jnp.sum(tl.masked(method.loss(x, x - old, advantage, task.mask), task.mask)))(new)

    phi = jax.vmap(token_gradient)(jnp.array([1.0, -1.0]))  # [2, S, T]

    def mean(kind: Array) -> Array:
        weight = (jnp.where(task.kind == kind, chance, 0)[:, None] * x for x in phi)

        def policy(w):
            return jax.grad(lambda p: jnp.sum(w * log_prob(p, task)))(params)

        return jnp.stack([policy(w).ravel() for w in weight])

    # Tokens of an answer meet different logits, so squares add up: |e_y - pi|^2 = 1 - 2 pi_y + |pi|^2 at each.
    table = jnp.broadcast_to(jnp.sum(jax.nn.softmax(params) ** 2, -1, keepdims=True), params.shape)
    norm = 1 - 2 * jnp.exp(new) + lookup(table, task.tokens)
    squares = [jax.ops.segment_sum(chance * jnp.sum(x**2 * norm, axis=1), task.kind, task.kinds) for x in phi]
    return jnp.moveaxis(jax.lax.map(mean, jnp.arange(task.kinds)), 1, 0), jnp.stack(squares)


def groups_of_kinds(share: Array, group_size: int) -> tuple[Array, Array]:
    """Every group ``[M, G]`` of kinds, whatever their order, and its probability ``[M]``, for kinds that come up in ``share``."""
    number = math.comb(len(share) + group_size - 1, group_size)
    if number > MOST:
        raise ValueError(
            f"group_sizes: {group_size} answers of {len(share)} kinds make {number:,} groups; at most {MOST:,}"
        )
    groups = np.array(list(itertools.combinations_with_replacement(range(len(share)), group_size)))
    counts = np.stack([(groups == kind).sum(1) for kind in range(len(share))], axis=1)
    factorial = np.array([math.factorial(n) for n in range(group_size + 1)], float)
    orders = factorial[group_size] / factorial[counts].prod(1)
    return jnp.asarray(groups), orders * jnp.prod(share[groups], axis=1)


def sample(
    key: Array, method: Method, params: Array, sampler: Array, task: Task, group_size: int, number: int
) -> tuple[Array, Array]:
    """Mean of the estimates of ``number`` groups, and its standard error, shaped as the parameters; by differentiating losses."""
    drawn = jax.random.categorical(key, jnp.log(probability(sampler, task)), shape=(number, group_size))

    def estimate(rows: Array) -> Array:
        group = task._replace(tokens=task.tokens[rows], mask=task.mask[rows])
        old, advantage = log_prob(sampler, group), method.advantage(task.reward[rows], group.mask)

        def loss(params: Array) -> Array:
            new = log_prob(params, group)
            return tl.weighted_sum(method.weights(group.mask), method.loss(new, new - old, advantage, group.mask))

        return -jax.grad(loss)(params)

    estimates = jax.lax.map(estimate, drawn, batch_size=256)
    return estimates.mean(0), estimates.std(0, ddof=1) / math.sqrt(number)


def compare(truth: Array, estimate: Estimate) -> dict[str, float]:
    """A row of the table."""
    size, norm = jnp.sum(estimate.mean**2), jnp.linalg.norm(truth)
    along = jnp.sum(estimate.mean * truth)
    numbers = {
        "factor": along / norm**2,
        "bias": jnp.linalg.norm(estimate.mean - truth) / norm,
        "cosine": along / (norm * jnp.sqrt(size)),
        "variance": estimate.variance / size,
    }
    return {name: float(x) for name, x in numbers.items()}


def setting(args: Args) -> tuple[Task, dict[str, tuple[Array, Array]]]:
    """The task, and the policies ``(learned, sampler)`` on and off policy."""
    task = make_task(args.vocabulary, args.length)
    shape = (args.length, 1 + args.vocabulary, args.vocabulary)
    params = 0.5 * jax.random.normal(jax.random.key(args.seed), shape, float)
    gradient = true_gradient(params, task)
    return task, {"on": (params, params), "off": (params + args.step * gradient / jnp.linalg.norm(gradient), params)}


def rows_of(args: Args) -> list[dict[str, Any]]:
    """The table, one row for each policy, group size and method."""
    task, policies = setting(args)
    rows: list[dict[str, Any]] = []
    for group_size, name in itertools.product(args.group_sizes, args.methods):
        method, keys = METHODS[name], jax.random.split(jax.random.fold_in(jax.random.key(args.seed), len(rows) + 1))

        @jax.jit
        def measure(key: Array, params: Array, sampler: Array, method: Method = method, g: int = group_size) -> Any:
            drawn = sample(key, method, params, sampler, task, g, args.samples)
            return true_gradient(params, task), exact(method, params, sampler, task, g), *drawn

        for key, (policy, pair) in zip(keys, policies.items(), strict=True):
            truth, estimate, mean, error = measure(key, *pair)
            z = jnp.where(error > 0, (mean - estimate.mean) / error, 0)
            row = {"policy": policy, "group": group_size, "method": name} | compare(truth, estimate)
            rows.append(row | {"z": float(jnp.sqrt(jnp.sum(z**2) / jnp.sum(error > 0)))})
    return sorted(rows, key=lambda row: row["policy"] == "off")


def main(argv: list[str]) -> None:
    args = cli.parse(Args, argv, doc=__doc__)
    check(args)
    with jax.enable_x64(True):
        rows = rows_of(args)
    report.print_table(
        args.run_dir / "estimators.csv",
        [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows],
    )
    panels = []
    for policy, column in itertools.product(("on", "off"), ("cosine", "variance")):
        lines = []
        for name in args.methods:
            y = [row[column] for row in rows if (row["policy"], row["method"]) == (policy, name)]
            lines.append((name, np.array(args.group_sizes), np.array(y)[None]))
        panels.append(
            plot.Panel(f"{policy}-policy: {column}", "group size", column, lines, "x" if column == "cosine" else "xy")
        )
    plot.draw(args.run_dir / "estimators.png", panels)
    print(f"{args.run_dir}/estimators.png")


def check(args: Args) -> None:
    """Raise ``ValueError`` with one line for what cannot be compared."""
    checks.not_empty(methods=args.methods, group_sizes=args.group_sizes)
    for method in args.methods:
        checks.one_of("methods", method, METHODS)
    checks.positive_int("vocabulary", args.vocabulary, 3)
    checks.positive_int("length", args.length, 2)
    numbers = args.length * (1 + args.vocabulary) * args.vocabulary
    if numbers > MOST_PARAMETERS:
        raise ValueError(
            f"length * (1 + vocabulary) * vocabulary, the policy's parameters, must be at most {MOST_PARAMETERS:,}; got {numbers:,}"
        )
    if args.vocabulary**args.length > MOST:
        raise ValueError(f"vocabulary ** length must be at most {MOST:,}; got {args.vocabulary**args.length:,}")
    for group_size in args.group_sizes:
        checks.positive_int("group_sizes", group_size, 2)
    checks.positive_int("samples", args.samples, 2)
    checks.within("step", args.step, 0, math.inf)
    answers = jax.ShapeDtypeStruct((args.samples, max(args.group_sizes), args.length), jnp.int32)
    gradients = jax.ShapeDtypeStruct((args.samples, numbers), jnp.float64)
    memory.refuse_if_too_large("samples and group_sizes", (answers, gradients))
    args.run_dir.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    cli.main(main)
