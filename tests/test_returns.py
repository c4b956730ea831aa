"""Returns against hand-worked values, identities, and rlax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl.equations import returns

# Three steps: an ordinary one, a truncated one (its value counts, nothing leaks over it), a terminated one.
V_TM1 = jnp.array([1.0, 2.0, 3.0])
R = jnp.array([1.0, 10.0, 100.0])
V = jnp.array([2.0, 5.0, 7.0])
DISCOUNT = 0.5 * (1 - jnp.array([0.0, 0.0, 1.0]))
CONTINUE = 1 - jnp.array([0.0, 1.0, 1.0])


def random_trajectory(seed, length=9, ends=True):
    rng = np.random.default_rng(seed)
    r, v_tm1, v, log_rho = (jnp.array(rng.normal(size=length), jnp.float32) for _ in range(4))
    if not ends:
        v = jnp.concatenate([v_tm1[1:], v[-1:]])
        return v_tm1, r, jnp.full(length, 0.9), v, jnp.ones(length), log_rho
    terminated, truncated = rng.random((2, length)) < 0.25
    return v_tm1, r, 0.9 * (1 - jnp.float32(terminated)), v, 1 - jnp.float32(terminated | truncated), log_rho


def test_td_errors_by_hand():
    assert returns.td_error(V_TM1, R, DISCOUNT, V).tolist() == [1 + 0.5 * 2 - 1, 10 + 0.5 * 5 - 2, 100 - 3]


def test_gae_by_hand():
    d0, d1, d2 = 1.0, 10.5, 97.0
    wanted = [d0 + 0.5 * 0.8 * d1, d1, d2]  # the truncated step takes nothing from the next episode
    np.testing.assert_allclose(returns.gae(V_TM1, R, DISCOUNT, V, CONTINUE, 0.8), wanted, rtol=1e-6)


def test_lambda_returns_by_hand():
    g1 = 10 + 0.5 * 5.0
    wanted = [1 + 0.5 * (0.2 * 2 + 0.8 * g1), g1, 100.0]
    np.testing.assert_allclose(returns.lambda_returns(R, DISCOUNT, V, CONTINUE, 0.8), wanted, rtol=1e-6)


def test_n_step_returns_by_hand():
    r, v = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([10.0, 20.0, 30.0, 40.0])
    discount, go_on = jnp.full(4, 0.5), jnp.array([1.0, 1.0, 0.0, 1.0])
    wanted = [1 + 1 + 0.25 * 20, 2 + 1.5 + 0.25 * 30, 3 + 15, 4 + 20]
    np.testing.assert_allclose(returns.n_step_returns(r, discount, v, go_on, 2), wanted)


def test_vtrace_by_hand():
    log_rho = jnp.log(jnp.array([0.5, 2.0, 3.0]))
    targets, advantages = returns.vtrace(V_TM1, R, DISCOUNT, V, CONTINUE, log_rho, lambda_=0.8)
    e1, e2 = 10.5, 97.0
    e0 = 0.5 * 1.0 + 0.5 * 0.8 * 0.5 * e1
    np.testing.assert_allclose(targets, [1 + e0, 2 + e1, 3 + e2], rtol=1e-6)
    np.testing.assert_allclose(advantages, [0.5 * (1 + 0.5 * (2 + e1) - 1), 10 + 2.5 - 2, 97], rtol=1e-6)


def test_retrace_by_hand():
    q, log_rho = jnp.array([4.0, 6.0]), jnp.log(jnp.array([0.5, 2.0]))
    g2, g1 = 100.0, 10 + 0.5 * 5.0
    wanted = [1 + 0.5 * (2 + 0.8 * 0.5 * (g1 - 4)), g1, g2]
    np.testing.assert_allclose(returns.retrace(q, V, R, DISCOUNT, CONTINUE, log_rho, 0.8), wanted, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_identities(seed):
    v_tm1, r, discount, v, go_on, _ = random_trajectory(seed)

    def close(a, b):
        return np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    # GAE needs the bootstrap value only where a trace is cut, so mid-episode v_t must be the next v_tm1 for the identity.
    following = jnp.where(go_on.at[-1].set(0) > 0, jnp.append(v_tm1[1:], v[-1]), v)
    gae = returns.gae(v_tm1, r, discount, following, go_on, 0.7)
    close(gae + v_tm1, returns.lambda_returns(r, discount, following, go_on, 0.7))
    close(returns.gae(v_tm1, r, discount, v, go_on, 0.0), returns.td_error(v_tm1, r, discount, v))
    close(returns.lambda_returns(r, discount, v, go_on, 0.0), returns.n_step_returns(r, discount, v, go_on, 1))
    close(returns.discounted_returns(r, discount, v, go_on), returns.n_step_returns(r, discount, v, go_on, 99))
    on_policy, _ = returns.vtrace(v_tm1, r, discount, following, go_on, jnp.zeros_like(r), lambda_=0.7)
    close(on_policy, returns.lambda_returns(r, discount, following, go_on, 0.7))


def test_nothing_leaks_over_a_reset():
    v_tm1, r, discount, v, _, log_rho = random_trajectory(0, ends=False)
    cut = jnp.ones_like(r).at[4].set(0)
    later = r.at[5:].add(100)
    for f in (
        lambda r: returns.gae(v_tm1, r, discount, v, cut, 0.9),
        lambda r: returns.n_step_returns(r, discount, v, cut, 3),
        lambda r: returns.lambda_returns(r, discount, v, cut, 0.9),
        lambda r: returns.vtrace(v_tm1, r, discount, v, cut, log_rho)[0],
        lambda r: returns.vtrace(v_tm1, r, discount, v, cut, log_rho)[1],
        lambda r: returns.retrace(v_tm1[1:], v, r, discount, cut, log_rho[1:], 0.9),
    ):
        assert f(r)[:5].tolist() == f(later)[:5].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_against_rlax(seed):
    rlax = pytest.importorskip("rlax")
    v_tm1, r, discount, v, go_on, log_rho = random_trajectory(seed, ends=False)
    discount = discount * jnp.float32(np.random.default_rng(seed).random(len(r)) < 0.8)

    def close(a, b):
        return np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)

    close(returns.lambda_returns(r, discount, v, go_on, 0.8), rlax.lambda_returns(r, discount, v, 0.8))
    close(returns.n_step_returns(r, discount, v, go_on, 3), rlax.n_step_bootstrapped_returns(r, discount, v, 3))
    values = jnp.append(v_tm1, v[-1])
    wanted = rlax.truncated_generalized_advantage_estimation(r, discount, 0.8, values)
    close(returns.gae(v_tm1, r, discount, v, go_on, 0.8), wanted)
    wanted = rlax.vtrace_td_error_and_advantage(v_tm1, v, r, discount, jnp.exp(log_rho), 0.9)
    targets, _ = returns.vtrace(v_tm1, r, discount, v, go_on, log_rho, 0.9)
    close(targets, wanted.errors + v_tm1)
    q = jnp.sin(jnp.arange(len(r), dtype=jnp.float32))
    errors = rlax.retrace_continuous(q, q[1:], v, r, discount, log_rho[1:], 0.9)
    close(returns.retrace(q[1:], v, r, discount, go_on, log_rho[1:], 0.9) - q, errors)
    # rlax bootstraps the advantage from lambda-mixed targets; with lambda 1 both follow the paper
    wanted = rlax.vtrace_td_error_and_advantage(v_tm1, v, r, discount, jnp.exp(log_rho), 1.0)
    close(returns.vtrace(v_tm1, r, discount, v, go_on, log_rho, 1.0)[1], wanted.pg_advantage)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"gae: .*v_t \(2,\)"):
        returns.gae(V_TM1, R, DISCOUNT, V[:2], CONTINUE, 0.9)
    with pytest.raises(ValueError, match="n must be at least 1"):
        returns.n_step_returns(R, DISCOUNT, V, CONTINUE, 0)


def test_vmap_and_jit_agree():
    batch = jnp.stack([R, R + 1])

    def f(r):
        return returns.gae(V_TM1, r, DISCOUNT, V, CONTINUE, 0.9)

    np.testing.assert_allclose(jax.jit(jax.vmap(f))(batch)[1], f(batch[1]), rtol=1e-6)
