"""SAC and TD3: their equations by hand, what they promise as every algorithm does, and that they learn."""

import bits
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import algorithm, envs, nets, run
from jrl.algos import off_policy, sac, td3
from jrl.equations import distributions
from jrl.equations.distributions import NormalParams
from jrl.experience import replay
from jrl.run import loop

RANK_PROMOTION = "allow"  # gymnax promotes ranks
SMALL = {
    "num_envs": 2,
    "num_gradient_steps": 2,
    "batch_size": 8,
    "capacity": 200,
    "learning_starts": 6,
    "network": nets.ContinuousConfig(hidden=(8,)),
}
MODULES = pytest.mark.parametrize("module", [sac, td3], ids=["sac", "td3"])


def made(module, env="Pendulum-v1", **more):
    hyper = module.Hyper(learning_rate=1e-2) if "hyper" not in more else more.pop("hyper")
    return module.make(envs.make(env) if isinstance(env, str) else env, module.Config(**(SMALL | more)), hyper)


def test_the_log_probability_of_a_squashed_action():
    action, log_prob = distributions.squashed(NormalParams(jnp.zeros(1), jnp.zeros(1)), jnp.array([0.5]))
    np.testing.assert_allclose(action, np.tanh([0.5]), rtol=1e-6)
    np.testing.assert_allclose(log_prob, -1.04394 + 0.24023, atol=1e-5)  # log N(0.5) - log(1 - tanh(0.5)^2)
    key = jax.random.key(0)
    params = NormalParams(*(0.3 * jax.random.normal(key, (2, 7, 3))))
    action, log_prob = distributions.squashed(params, jax.random.normal(key, (7, 3)))
    np.testing.assert_allclose(log_prob, distributions.tanh_normal(3).log_prob(params, action), rtol=1e-4, atol=1e-3)
    far = distributions.squashed(NormalParams(jnp.full(1, 20.0), jnp.zeros(1)), jnp.zeros(1))
    assert np.isfinite(far[1])
    slope = jax.grad(lambda mean: distributions.squashed(NormalParams(mean, jnp.zeros(1)), jnp.zeros(1))[1])(
        jnp.ones(1)
    )
    np.testing.assert_allclose(slope, 2 * np.tanh([1.0]), rtol=1e-5)  # of -log(1 - tanh(u)^2)


def fake_batch(reward, discount):
    """Two transitions, of which the second counts for nothing."""
    obs = jnp.zeros((2, 3))
    return replay.Batch(
        obs,
        jnp.zeros((2, 1)),
        jnp.array([reward, 7.0]),
        jnp.array([discount, 0.9]),
        obs,
        jnp.array([1.0, 0.0]),
        jnp.zeros(2, jnp.int32),
    )


@MODULES
def test_one_step_of_the_critics_by_hand(module, monkeypatch):
    """Linear critics with values 2 and 3 of a state, and a policy whose next action does not matter."""
    monkeypatch.setattr(off_policy, "sample", lambda parts, state, key: fake_batch(1.0, 0.5))
    algo = made(
        module,
        network=nets.ContinuousConfig(hidden=()),
        batch_size=2,
        learning_starts=0,
        hyper=module.Hyper(learning_rate=0.0),
    )
    state = jax.jit(algo.init)(jax.random.key(0))
    biased = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            jnp.full_like(x, {"head_0": 2.0, "head_1": 3.0}[path[1].key])
            if path[-1].key == "bias"
            else jnp.zeros_like(x)
        ),
        state.critic_params,
    )
    targets = {"policy": state.params, "critics": biased} if module is td3 else biased
    if module is sac:  # the temperature of 1e-20 leaves the plain value
        state = state._replace(params=state.params | {"log_alpha": jnp.float32(-46)})
    state = state._replace(critic_params=biased, target_params=targets, updates=jnp.int32(5))
    _, metrics = jax.jit(algo.update)(state)
    y = 1 + 0.5 * min(2, 3)
    np.testing.assert_allclose(metrics["critic_loss"], 0.5 * ((2 - y) ** 2 + (3 - y) ** 2), rtol=1e-5)
    np.testing.assert_allclose(metrics["q"], 2.5, rtol=1e-6)


def test_a_policy_of_more_entropy_than_is_wanted_lowers_the_temperature():
    algo = made(sac, learning_starts=0)

    @jax.jit
    def learned(target_entropy):
        hyper = sac.Hyper(target_entropy=target_entropy)
        return algo.update(algo.update(algo.init(jax.random.key(0), hyper))[0])[0].params["log_alpha"]

    for wanted, sign in ((-5.0, -1), (5.0, 1)):  # the entropy of a fresh policy is near that of a uniform one, log 2
        assert np.sign(learned(wanted)) == sign


def test_td3_moves_its_policy_and_targets_at_every_other_critic_step():
    algo = made(td3, num_gradient_steps=1, learning_starts=0, policy_delay=2)
    state, update = jax.jit(algo.init)(jax.random.key(0)), jax.jit(algo.update)
    state, _ = update(state)  # the first row of the replay is no transition yet
    moved = []
    for _ in range(5):
        new, _ = update(state)
        same = [
            all(jax.tree.leaves(jax.tree.map(lambda x, y: (x == y).all(), getattr(new, name), getattr(state, name))))
            for name in ("critic_params", "params", "target_params")
        ]
        moved.append([not s for s in same])
        state = new
    assert moved == [[True, True, True], [True, False, False]] * 2 + [[True, True, True]]


@MODULES
def test_nothing_is_learned_and_actions_are_random_before_learning_starts(module):
    algo = made(module, learning_starts=6)  # 2 environments: the third update learns
    state, update = jax.jit(algo.init)(jax.random.key(0)), jax.jit(algo.update)
    begun = state.critic_params
    for step in range(3):
        state, metrics = update(state)
        same = all(jax.tree.leaves(jax.tree.map(lambda x, y: (x == y).all(), state.critic_params, begun)))
        assert same == (step < 2) and (metrics["critic_loss"] == 0) == (step < 2)
    actions = state.buffer.action[:, :2]
    assert (
        actions.dtype == np.float32 and actions.shape[-1] == 1 and np.abs(actions).max() > 0.2
    )  # policies begin near 0


@MODULES
@pytest.mark.slow
def test_truncation_bootstraps(module):
    """Reward 1 a step, truncated at 20, never terminated: V = 1 / (1 - gamma), where a merged ``done`` would give less than 9.9."""
    probe = envs.make("Probe-truncation")
    space = envs.Box((-1.0,), (1.0,))
    env = probe._replace(action_space=space, step=lambda key, state, action: probe.step(key, state, jnp.int32(0)))
    config = {"target_entropy": 0.0, "temperature": 1e-6} if module is sac else {}
    hyper = module.Hyper(learning_rate=1e-2, gamma=0.9, tau=0.05, **config)
    algo = made(
        module,
        envs.strict(env),
        batch_size=32,
        learning_starts=50,
        network=nets.ContinuousConfig(hidden=(16,)),
        hyper=hyper,
    )
    state = jax.jit(run.train_fn(algo, 4_000))(jax.random.key(0))[0]
    parts = off_policy.make_parts(algo.env, algo.config, module.__name__, width=1)
    obs = jax.tree.map(lambda x: x[None], algo.env.reset(jax.random.key(1))[0])
    value = nets.outputs(parts.critics, state.critic_params, (obs, jnp.zeros((1, 1))))
    np.testing.assert_allclose(value, 10.0, rtol=0.1)


@pytest.mark.slow
@MODULES
def test_keys_are_not_reused_and_a_seed_does_not_depend_on_those_beside_it(module):
    algo = made(module)
    keys = jax.random.split(jax.random.key(0), 3)
    with jax.debug_key_reuse(True):
        jax.jit(algo.update)(jax.jit(algo.init)(keys[0]))
    train = run.train_fn(algo, 5 * algo.env_steps_per_update)
    state, _ = jax.jit(jax.vmap(train))(keys)
    alone, _ = jax.jit(train)(keys[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-5), state.params, alone.params)


@pytest.mark.slow
@MODULES
def test_a_run_is_resumed_bit_for_bit_and_loaded_and_gone_on_from(module, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHUNK_SECONDS", 0.0)  # one update at a time
    algo = made(module, learning_starts=2)
    more = {"num_seeds": 2, "progress": False, "eval_episodes": 0}
    steps = 6 * algo.env_steps_per_update
    whole = run.train(algo, jax.random.key(0), steps, **more, run_dir=tmp_path / "whole")
    half = run.train(algo, jax.random.key(0), steps, **more, run_dir=tmp_path / "half", on_chunk=lambda chunk: True)
    assert not half.finished
    resumed = run.train(algo, jax.random.key(0), steps, **more, run_dir=tmp_path / "half", resume=True)
    bits.assert_same(resumed.state, whole.state)
    loaded = run.load(tmp_path / "whole")
    bits.assert_same(loaded.state, whole.state)
    begun = module.make(algo.env, algo.config, start=loaded.member(1)).init(jax.random.key(5))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[1]), begun.params, whole.state.params)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[1]), begun.critic_params, whole.state.critic_params)
    with pytest.raises(ValueError, match=r"start: .*params must have the shapes"):
        other = module.Config(**(SMALL | {"network": nets.ContinuousConfig(hidden=(4,))}))
        jax.eval_shape(module.make(algo.env, other, start=loaded.member(1)).init, jax.random.key(0))


@pytest.mark.thorough(1)
@MODULES
def test_hyperparameters_are_data_and_precision_is_a_setting(module):
    algo = algorithm.over_hypers(made(module, learning_starts=0, precision="pure_bfloat16"))
    hypers = jax.tree.map(lambda x: jnp.full(2, x), module.Hyper())._replace(gamma=jnp.array([0.5, 0.9]))
    state, metrics = jax.jit(lambda key: algo.update(algo.init(key, hypers)))(jax.random.key(0))
    assert metrics["critic_loss"].shape == (2,) and np.isfinite(metrics["critic_loss"]).all()
    assert {x.dtype for x in jax.tree.leaves(state.critic_params)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state.target_params)} == {jnp.dtype(jnp.float32)}


@MODULES
def test_wrong_settings_and_spaces_are_refused(module):
    name = module.__name__.rpartition(".")[2]
    endless = envs.make("Pendulum-v1")._replace(action_space=envs.Box((-np.inf,), (1.0,)))
    for message, make in {
        rf"{name} needs real actions \(Box\); CartPole-v1 has Discrete": lambda: made(module, "CartPole-v1"),
        rf"{name} needs finite bounds of actions; Pendulum-v1 has Box": lambda: made(module, endless),
        "config.learning_starts must be at most capacity": lambda: made(module, learning_starts=201),
        "what is learned from single transitions has no memory": lambda: made(
            module, network=nets.ContinuousConfig(gru=4)
        ),
        "config.num_critics must be an integer of at least 1; got 0": lambda: made(module, num_critics=0),
        "hyper.gamma must be": lambda: made(module, hyper=module.Hyper(gamma=1.5)),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


@MODULES
@pytest.mark.slow
def test_the_pendulum_is_swung_up(module):
    from jrl.algos import presets

    preset = {"sac": presets.SAC, "td3": presets.TD3}[module.__name__.rpartition(".")[2]]["Pendulum-v1"]
    algo = module.make(envs.make("Pendulum-v1"), preset.config, preset.hyper)
    result = run.train(algo, jax.random.key(0), 12_000, num_seeds=2, progress=False)
    assert result.summary["eval"]["iqm"] > -200
