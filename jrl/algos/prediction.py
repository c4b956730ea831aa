"""Prediction with linear features: each method is a function of the weights and a stream of transitions.

The derivation is in ``td.py`` beside this; numbers of equations are those of Sutton & Barto, 2nd ed.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jrl.equations import returns
from jrl.numerics import checks
from jrl.numerics.precision import exact

Array = jax.Array
Trace = Literal["accumulating", "replacing", "dutch"]


class Stream(NamedTuple):
    """Transitions in the order they happened, episodes one after another, leading axis ``[T]``.

    Attributes:
        x_tm1: features of the state left, float32 ``[T, d]`` (one-hot for a table).
        r_t: reward.
        discount_t: gamma, or 0 where the episode terminated.
        x_t: features of the state reached, before any reset, ``[T, d]``.
        continue_t: 0 where the episode ended, terminated or truncated; else 1.
    """

    x_tm1: Array
    r_t: Array
    discount_t: Array
    x_t: Array
    continue_t: Array


Path = tuple[Array, Array]  # the weights after the last transition [d], and after each [T, d]


@exact
def td(w: Array, stream: Stream, alpha: Array | float) -> Path:
    """TD(0) (6.2, 9.7): ``w += alpha (r + discount v(s') - v(s)) x``."""

    def step(w: Array, t: Stream) -> tuple[Array, Array]:
        delta = returns.td_error(w @ t.x_tm1, t.r_t, t.discount_t, w @ t.x_t)
        w = w + alpha * delta * t.x_tm1
        return w, w

    return jax.lax.scan(step, w, stream)


@exact
def n_step_td(w: Array, stream: Stream, alpha: Array | float, n: int) -> Path:
    """n-step TD (7.2): the target sums n rewards, fewer at the end of an episode, and bootstraps from the weights of then.

    The book updates a state n steps late, and those left over when the episode ends: in the order in which they were
    visited, each after the one before, which is the order here.
    """
    reward, discount, last = returns.n_step_transitions(stream.r_t, stream.discount_t, stream.continue_t, n)

    def step(w: Array, t: tuple[Array, ...]) -> tuple[Array, Array]:
        x, reward, discount, x_last = t
        w = w + alpha * (reward + discount * (w @ x_last) - w @ x) * x
        return w, w

    return jax.lax.scan(step, w, (stream.x_tm1, reward, discount, stream.x_t[last]))


@exact
def monte_carlo(w: Array, stream: Stream, alpha: Array | float) -> Path:
    """Every-visit constant-alpha Monte Carlo (6.1): the target is the return; an unfinished one bootstraps at the end."""
    return n_step_td(w, stream, alpha, len(stream.r_t))


@exact
def td_lambda(
    w: Array, stream: Stream, alpha: Array | float, lambda_: Array | float, trace: Trace = "accumulating"
) -> Path:
    """TD(lambda) by eligibility traces, the backward view.

    accumulating: ``e <- gamma lambda e + x``                                          (12.5)
    replacing:    ``e <- x`` where x is not 0 (1 for a table), else ``gamma lambda e``  (12.12)
    dutch:        ``e <- gamma lambda e + (1 - alpha gamma lambda e . x) x``, with the true online update (12.11).

    Raises ``ValueError`` for another trace.
    """
    checks.one_of("trace", trace, get_args(Trace))

    def step(carry: tuple[Array, Array, Array], t: Stream) -> tuple[tuple[Array, Array, Array], Array]:
        w, e, v_old = carry
        v, v_next = w @ t.x_tm1, w @ t.x_t
        delta = returns.td_error(v, t.r_t, t.discount_t, v_next)
        match trace:
            case "accumulating":
                e = e + t.x_tm1
                w = w + alpha * delta * e
            case "replacing":
                e = jnp.where(t.x_tm1 != 0, t.x_tm1, e)
                w = w + alpha * delta * e
            case "dutch":
                e = e + (1 - alpha * e @ t.x_tm1) * t.x_tm1
                w = w + alpha * (delta + v - v_old) * e - alpha * (v - v_old) * t.x_tm1
        # Decayed here, by the discount between this state and the next; forgotten where the episode ends.
        e = e * t.discount_t * lambda_ * t.continue_t
        return (w, e, v_next * t.continue_t), w

    (w, _, _), path = jax.lax.scan(step, (w, jnp.zeros_like(w), jnp.float32(0)), stream)
    return w, path


@exact
def lambda_return(w: Array, stream: Stream, alpha: Array | float, lambda_: Array | float) -> Array:
    """The offline lambda-return algorithm (12.4) on one episode, the forward view: the weights after it, ``[d]``.

    The targets are lambda returns with the weights of before the episode. A transition after the end (``r_t = 0``, features
    0) changes nothing, so that episodes may be padded.
    """
    target = returns.lambda_returns(stream.r_t, stream.discount_t, stream.x_t @ w, stream.continue_t, lambda_)

    def step(w: Array, t: tuple[Array, Array]) -> tuple[Array, None]:
        x, g = t
        return w + alpha * (g - w @ x) * x, None

    return jax.lax.scan(step, w, (stream.x_tm1, target))[0]


@exact
def gradient_td(
    w: Array,
    stream: Stream,
    alpha: Array | float,
    beta: Array | float,
    rho_t: Array,
    method: Literal["tdc", "gtd2", "semi"] = "tdc",
) -> Path:
    """Off-policy TD(0) with linear features and importance ratios ``rho_t = pi(a|s) / b(a|s)``, ``[T]``.

    semi: ``w += alpha rho delta x``                                                    (11.2), which may diverge
    gtd2: ``w += alpha rho (x - discount x') (x . u)``                                  (section 11.7)
    tdc:  ``w += alpha rho (delta x - discount x' (x . u))``                            (section 11.7)

    with ``u += beta rho (delta - x . u) x``, a running least-squares estimate of ``E[x x]^-1 E[rho delta x]``.
    Raises ``ValueError`` for another method.
    """
    checks.one_of("method", method, ("tdc", "gtd2", "semi"))

    def step(carry: tuple[Array, Array], t: tuple[Stream, Array]) -> tuple[tuple[Array, Array], Array]:
        (w, u), (now, rho) = carry, t
        x, x_next = now.x_tm1, now.discount_t * now.x_t
        delta = returns.td_error(w @ x, now.r_t, now.discount_t, w @ now.x_t)
        match method:
            case "semi":
                change = delta * x
            case "gtd2":
                change = (x - x_next) * (x @ u)
            case "tdc":
                change = delta * x - x_next * (x @ u)
        w = w + alpha * rho * change
        u = u + beta * rho * (delta - x @ u) * x
        return (w, u), w

    (w, _), path = jax.lax.scan(step, (w, jnp.zeros_like(w)), (stream, rho_t))
    return w, path
