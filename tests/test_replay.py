"""Replay: what is stored, how n-step transitions are put together, and how often each is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import envs
from jrl.algorithm import over_seeds
from jrl.algos import dqn, r2d2
from jrl.experience import replay, rollout
from jrl.run.memory import state_bytes

SPEC = jax.ShapeDtypeStruct((2,), jnp.uint8)


def jitted(store):
    """A replay whose functions are compiled as a whole, where operations one by one would be dozens of programs."""
    return store._replace(**{name: jax.jit(getattr(store, name)) for name in ("init", "add", "sample", "update")})


def make(*args, **kwargs):
    return jitted(replay.make(*args, **kwargs))


def make_sequences(*args, **kwargs):
    return jitted(replay.make_sequences(*args, **kwargs))


def step(obs, action=0, reward=0.0, terminated=False, truncated=False, next_obs=0):
    """One step of one environment, whose observations are (number, number)."""

    def see(x):
        return np.full((1, 2), x, np.uint8)

    return replay.Step(
        see(obs),
        np.array([action], np.int32),
        np.array([reward], np.float32),
        np.array([terminated]),
        np.array([truncated]),
        see(next_obs),
    )


def filled(steps, capacity=16, **kwargs):
    store = make(SPEC, 1, capacity, kwargs.pop("batch_size", 256), **kwargs)
    buffer = store.init()
    for s in steps:
        buffer = store.add(buffer, s)
    return store, buffer


def drawn(store, buffer, gamma=0.5):
    """Transitions by the number of their first observation: (reward, discount, next observation)."""
    batch = jax.device_get(store.sample(buffer, jax.random.key(0), gamma))
    seen = {}
    for i in np.flatnonzero(batch.weight > 0):
        seen[int(batch.obs[i, 0])] = (float(batch.reward[i]), float(batch.discount[i]), int(batch.next_obs[i, 0]))
    return seen


# 0 -> 1 -> 2 (terminated); 10 -> 11 -> 12, truncated at 13; 20 -> 21 -> (22 to come)
HISTORY = [
    step(0, reward=1.0, next_obs=1),
    step(1, reward=2.0, next_obs=2),
    step(2, reward=4.0, terminated=True, next_obs=3),
    step(10, reward=1.0, next_obs=11),
    step(11, reward=2.0, next_obs=12),
    step(12, reward=4.0, truncated=True, next_obs=13),
    step(20, reward=1.0, next_obs=21),
    step(21, reward=2.0, next_obs=22),
]


@pytest.mark.parametrize("prioritized", [False, True])
def test_one_step_transitions(prioritized):
    assert drawn(*filled(HISTORY, prioritized=prioritized)) == {
        0: (1, 0.5, 1),
        1: (2, 0.5, 2),
        2: (4, 0, 10),  # nothing follows a termination: the discount is 0
        10: (1, 0.5, 11),
        11: (2, 0.5, 12),
        12: (4, 0.5, 13),  # the last observation of a truncated episode, not the first of the next
        20: (1, 0.5, 21),  # 21 waits for what follows it
    }


@pytest.mark.parametrize("prioritized", [False, True])
def test_three_step_transitions_stop_where_episodes_do(prioritized):
    assert drawn(*filled(HISTORY, n_step=3, prioritized=prioritized)) == {
        0: (1 + 0.5 * 2 + 0.25 * 4, 0, 10),
        1: (2 + 0.5 * 4, 0, 10),
        2: (4, 0, 10),
        10: (1 + 0.5 * 2 + 0.25 * 4, 0.125, 13),
        11: (2 + 0.5 * 4, 0.25, 13),
        12: (4, 0.5, 13),
        20: (1, 0.5, 21),
    }


def test_both_flags_terminate_and_old_rows_are_overwritten():
    steps = [step(i, reward=float(i), truncated=i % 3 == 2, terminated=i % 3 == 2, next_obs=i + 1) for i in range(40)]
    store, buffer = filled(steps, capacity=8)
    assert int(store.size(buffer)) == 8 and buffer.obs.dtype == jnp.uint8
    seen = drawn(store, buffer)
    assert set(seen) == set(range(32, 39))
    assert seen[35] == (35, 0, 36) and seen[36] == (36, 0.5, 37)


def test_environments_are_drawn_alike_and_keep_apart():
    store = make(SPEC, 3, 30, 3000)

    def see(x):
        return np.stack([np.full(2, x + 100 * e, np.uint8) for e in range(3)])

    buffer = store.init()
    no = np.zeros(3, bool)
    for i in range(6):
        truncated = np.array([False, i == 2, False])
        buffer = store.add(buffer, replay.Step(see(i), np.arange(3), np.zeros(3), no, truncated, see(50)))
    batch = jax.device_get(store.sample(buffer, jax.random.key(0), 0.9))
    env = np.asarray(batch.obs[:, 0]) // 100
    assert (np.asarray(batch.next_obs[:, 0]) // 100 == env).all()
    np.testing.assert_allclose(np.bincount(env, minlength=3) / 3000, 1 / 3, atol=0.04)
    after = {
        (int(o), int(n)) for o, n, w in zip(batch.obs[:, 0], batch.next_obs[:, 0], batch.weight, strict=True) if w > 0
    }
    assert (102, 150) in after and (2, 3) in after and (102, 103) not in after
    assert (np.asarray(batch.weight)[np.asarray(batch.obs[:, 0]) == 150] == 0).all()


# Priorities


def test_the_tree_sums_and_finds():
    values = jnp.array([1.0, 0.0, 3.0, 0.5, 0.0, 2.5, 0.0, 1.0])
    tree = replay.set_leaves(jnp.zeros(16), jnp.arange(8), values)
    assert tree[1] == 8 and tree[2] == 4.5 and tree[3] == 3.5
    tree = replay.set_leaves(tree, jnp.array([2, 2**30]), jnp.array([1.0, 9.0]))
    assert tree[1] == 6
    found = replay.find_leaves(tree, jnp.array([0.0, 0.99, 1.0, 1.99, 2.0, 2.49, 2.5, 4.99, 5.0, 5.99, 6.0]))
    assert found.tolist() == [0, 0, 2, 2, 3, 3, 5, 5, 7, 7, 7]


def test_draws_follow_priorities_and_weights_undo_them():
    store, buffer = filled([step(i, next_obs=i + 1) for i in range(9)], prioritized=True, batch_size=8000)
    rows = jnp.arange(8)
    priority = jnp.array([1.0, 2, 3, 4, 5, 6, 7, 8])
    buffer = store.update(buffer, rows, priority)
    buffer = store.update(buffer, jnp.array([8, replay.NOWHERE]), jnp.array([0.0, 99.0]))
    assert buffer.largest == 8
    batch = jax.device_get(store.sample(buffer, jax.random.key(0), 0.9, 1.0))
    share = np.bincount(np.asarray(batch.obs[:, 0]), minlength=8)[:8] / 8000
    np.testing.assert_allclose(share, np.asarray(priority) / 36, atol=0.002)
    # (1 / (N P))^beta over its largest: with beta = 1 inverse to the priority.
    for i in range(8000):
        if i % 500 == 0:
            np.testing.assert_allclose(batch.weight[i], 1 / (1 + int(batch.obs[i, 0])), rtol=1e-4)
    half = store.sample(buffer, jax.random.key(0), 0.9, 0.5)
    np.testing.assert_allclose(half.weight[-1], (1 / 8) ** 0.5, rtol=1e-4)


def test_new_rows_get_the_largest_priority():
    store, buffer = filled(HISTORY[:3], prioritized=True)
    buffer = store.update(buffer, jnp.array([1]), jnp.array([7.0]))
    buffer = store.add(buffer, HISTORY[3])
    leaves = buffer.tree.shape[0] // 2
    assert buffer.tree[leaves : leaves + 4].tolist() == [1, 7, 7, 0]  # the newest waits for what follows it


def test_a_ring_that_wraps_draws_no_row_that_is_gone():
    store, buffer = filled([step(i, next_obs=i + 1) for i in range(29)], capacity=8, prioritized=True)
    assert set(drawn(store, buffer)) == set(range(21, 28))
    leaves = buffer.tree.shape[0] // 2
    assert (buffer.tree[leaves:] > 0).sum() == 7 and buffer.tree[1] == 7


# Stacked frames


def stacked_run(num_steps, frames, key, truncate=5, terminate=7):
    """Steps of an environment that numbers its observations, frames stacked by the wrapper, and the unstacked numbers."""

    def reset(key):
        return (jnp.zeros((2, 1), jnp.uint8), jnp.int32(0))

    def one(key, t, action):
        t = t + 1
        return jnp.full((2, 1), t, jnp.uint8), t, 1.0, t >= terminate, t >= truncate

    env = envs.wrappers.frame_stack(envs.strict(envs.Environment("Count", reset, one, envs.Discrete(2))), frames)

    def act(memory, obs, first, noise):
        return (memory, jnp.zeros(3, jnp.int32), ())

    _, steps, _ = rollout.collect(env, rollout.start(env, key, 3, ()), act, (), key, num_steps)
    return envs.observation_spec(env), steps


@pytest.mark.thorough(3)
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("truncate, terminate", [(5, 7), (9, 4), (30, 30)])
def test_frames_are_stored_once_and_stacked_as_the_wrapper_does(prioritized, truncate, terminate, key):
    spec, steps = stacked_run(40, 4, key, truncate, terminate)
    whole = make(spec, 3, 60, 500, 3, prioritized)
    once = make(spec, 3, 60, 500, 3, prioritized, num_frames=4)
    assert once.init().obs.shape == (3, 20, 2, 1) and whole.init().obs.shape == (3, 20, 2, 4)
    batches = []
    for store in (whole, once):

        def add(b, s, store=store):
            return (store.add(b, s), None)

        seen = replay.Step(
            steps.obs, jnp.zeros((40, 3), jnp.int32), steps.reward, steps.terminated, steps.truncated, steps.next_obs
        )
        buffer, _ = jax.lax.scan(add, store.init(), seen)
        batches.append(jax.device_get((buffer, store.sample(buffer, key, 0.9))))
    (full, _), (buffer, batch) = batches
    at = np.asarray(batch.rows) // 20, np.asarray(batch.rows) % 20
    drawable = np.asarray(batch.weight) > 0
    assert len(set(np.asarray(batch.rows)[drawable].tolist())) > 30
    np.testing.assert_array_equal(np.asarray(full.obs)[at[0][drawable], at[1][drawable]], batch.obs[drawable])
    # Within an episode the observation after n steps ends with a count n higher.
    steps_on = np.round(np.log(np.maximum(batch.discount[drawable], 1e-9)) / np.log(0.9)).astype(int)
    alive = np.asarray(batch.discount[drawable]) > 0

    def newest(x):
        return np.asarray(x[drawable, 0, -1]).astype(int)[alive]

    np.testing.assert_array_equal(newest(batch.next_obs) - newest(batch.obs), steps_on[alive])


def test_a_ring_that_is_just_full_stacks_no_frame_of_the_other_end():
    store = make(jax.ShapeDtypeStruct((3,), jnp.uint8), 1, 10, 300, num_frames=3)
    buffer = store.init()
    no, zero = np.zeros(1, bool), np.zeros(1)
    for i in range(10):

        def see(x):
            return np.maximum([[x - 2, x - 1, x]], 0).astype(np.uint8)

        buffer = store.add(buffer, replay.Step(see(i), zero.astype(int), zero, no, no, see(i + 1)))
    batch = jax.device_get(store.sample(buffer, jax.random.key(0), 0.9))
    for row in np.asarray(batch.obs)[np.asarray(batch.weight) > 0]:
        assert row.tolist() == [row[2] - 2, row[2] - 1, row[2]]


def test_stacks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="last axis of observations must hold num_frames = 3 frames"):
        replay.make(SPEC, 1, 16, 8, num_frames=3)


# Sequences


@pytest.mark.parametrize("prioritized", [False, True])
def test_sequences_are_rows_in_order(prioritized):
    store = make_sequences(SPEC, 1, 16, 400, 4, prioritized)
    buffer = store.init()
    for s in HISTORY:
        buffer = store.add(buffer, s)
    seq = jax.device_get(store.sample(buffer, jax.random.key(0)))
    drawn = {tuple(seq.obs[:, i, 0].tolist()): i for i in np.flatnonzero(seq.weight > 0)}
    assert set(drawn) == {
        (0, 1, 2, 10),
        (1, 2, 10, 11),
        (2, 10, 11, 12),
        (10, 11, 12, 13),
        (11, 12, 13, 20),
        (12, 13, 20, 21),
    }
    i = drawn[(12, 13, 20, 21)]
    assert seq.kind[:, i].tolist() == [replay.TRUNCATED, replay.FINAL, replay.MID, replay.MID]
    assert seq.first[:, i].tolist() == [False, False, True, False] and seq.reward[:, i].tolist() == [4, 0, 1, 2]
    i = drawn[(0, 1, 2, 10)]
    assert seq.first[:, i].tolist() == [True, False, False, True]
    assert seq.kind[:, i].tolist() == [replay.MID, replay.MID, replay.TERMINATED, replay.MID]
    if prioritized:
        changed = store.update(buffer, seq.rows, jnp.where(seq.rows == 3, 50.0, 1.0))
        again = jax.device_get(store.sample(changed, jax.random.key(1)))
        np.testing.assert_allclose((again.rows == 3).mean(), 50 / 55, atol=0.01)


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("ends", [{11}, {3}, {4}, {3, 11}])
def test_a_ring_of_sequences_that_wrapped_knows_where_episodes_begin(prioritized, ends):
    store = make_sequences(SPEC, 1, 8, 300, 3, prioritized)
    buffer = store.init()
    for i in range(12):
        buffer = store.add(buffer, step(i, terminated=i in ends, next_obs=i + 1))
    seq = jax.device_get(store.sample(buffer, jax.random.key(0)))
    rows = np.flatnonzero(np.asarray(seq.weight) > 0)
    assert {int(seq.obs[0, i, 0]) for i in rows} == {5, 6, 7, 8, 9}
    for i in rows:
        assert seq.first[:, i].tolist() == [int(o) - 1 in ends for o in seq.obs[:, i, 0]]


def test_a_priority_that_is_no_number_spoils_nothing():
    store, buffer = filled(HISTORY[:4], prioritized=True)
    buffer = store.update(buffer, jnp.array([0, 1]), jnp.array([jnp.nan, jnp.inf]))
    assert jnp.isfinite(buffer.tree).all() and buffer.largest == 1


# Cost


@pytest.mark.parametrize("prioritized", [False, True])
def test_nothing_copies_the_buffer(prioritized):
    """Adding and sampling in a scan, over seeds, needs less than a tenth of the buffer besides it."""
    spec = jax.ShapeDtypeStruct((10, 10, 4), jnp.bool_)
    store = make(spec, 4, 20_000, 32, 3, prioritized)

    def run(buffer, key):
        def body(buffer, key):
            obs = jnp.ones((4, 10, 10, 4), bool)
            no = jnp.zeros(4, bool)
            buffer = store.add(buffer, replay.Step(obs, jnp.zeros(4, jnp.int32), jnp.ones(4), no, ~no, obs))
            batch = store.sample(buffer, key, 0.9)
            return store.update(buffer, batch.rows, batch.reward), batch.reward.sum() + batch.obs.sum()

        return jax.lax.scan(body, buffer, jax.random.split(key, 10))

    seeds = 3
    buffers = jax.eval_shape(jax.vmap(lambda _: store.init()), jnp.zeros(seeds))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), seeds))
    compiled = jax.jit(jax.vmap(run), donate_argnums=0).lower(buffers, keys).compile()
    used = compiled.memory_analysis()
    assert store.bytes > 400 * 20_000
    assert used.temp_size_in_bytes < 0.1 * seeds * store.bytes
    assert used.alias_size_in_bytes >= seeds * store.bytes


@pytest.mark.slow
@pytest.mark.parametrize("module, make", [(dqn, dqn.Config), (r2d2, r2d2.Config)])
def test_a_whole_update_copies_neither_rows_nor_priorities(module, make):
    """Rows of a few numbers, where a copy of the priorities alone would show."""
    config = make(num_envs=4, capacity=200_000, prioritized=True)
    algo = over_seeds(module.make(envs.make("Probe-policy"), config))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    state = jax.eval_shape(algo.init, keys)

    def run(state):
        return jax.lax.scan(lambda s, _: algo.update(s), state, length=4)

    with jax.numpy_rank_promotion("allow"):
        used = jax.jit(run, donate_argnums=0).lower(state).compile().memory_analysis()
    assert used.temp_size_in_bytes < 0.1 * state_bytes(state.buffer)


def test_too_small_and_too_large_are_refused():
    with pytest.raises(
        ValueError, match="capacity must be at least 20, n_step \\+ num_frames \\+ 1 rows for each environment; got 10"
    ):
        replay.make(SPEC, 4, 10, 8, 3)
    with pytest.raises(ValueError, match=r"a buffer of \d+\.\d GiB is larger than the device's \d+\.\d GiB"):
        replay.make(jax.ShapeDtypeStruct((1000, 1000), jnp.float32), 1, 1_000_000, 8)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1; got 0"):
        replay.make(SPEC, 1, 10, 0)


def test_the_count_of_rows_does_not_grow_for_ever():
    store, buffer = filled([step(i, next_obs=i + 1) for i in range(40)], capacity=16, batch_size=64)
    assert buffer.written.item() < 32 and store.size(buffer) == 16
    assert set(drawn(store, buffer)) == set(range(24, 39))
