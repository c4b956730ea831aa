"""One model over two devices: the same answers and the same step as on one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jrl.algos import grpo
from jrl.lm import tasks
from jrl.nets import transformer
from jrl.numerics import sharding

pytestmark = pytest.mark.two_devices
MODEL = transformer.Config(dim=16, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=32)
CONFIG = grpo.Config(model=MODEL, num_prompts=4, group_size=4, num_minibatches=2, micro_batches=2, kl="k3")


def specs(tree):
    return jax.tree.map(lambda s: s.spec, tree)


def test_parameters_are_cut_by_the_names_of_their_axes():
    mesh = sharding.make_mesh(data=1, model=2)
    config = transformer.Config(dim=16, num_layers=3, num_heads=4, num_kv_heads=1, ffn_dim=24, vocab_size=13)
    shapes = jax.eval_shape(lambda k: transformer.init(k, config), jax.random.key(0))
    found = specs(sharding.shardings(mesh, transformer.axes(config), shapes))
    layer = found["layers"]
    assert layer["q"] == P(None, None, "model", None) and layer["o"] == P(None, "model", None, None)
    assert layer["k"] == P(None, None, None, None, None), "one key head does not divide"
    assert layer["gate"] == P(None, None, "model") and layer["down"] == P(None, "model", None)
    assert found["embedding"] == P(None, None), "13 symbols do not divide"
    with pytest.raises(ValueError, match="the rule of 'ffn' must be one of data, model; got 'expert'"):
        sharding.shardings(mesh, transformer.axes(config), shapes, {"ffn": "expert"})
    with pytest.raises(ValueError, match="a mesh of 2 x 2 devices needs 4; there are 2"):
        sharding.make_mesh(2, 2)


def programs(key, data, model):
    """An update alone and over a mesh, the state, and where that lies."""
    task = tasks.make("reverse", length=3)
    algo = grpo.make(task, CONFIG, grpo.Hyper(learning_rate=1e-2, format_weight=0.5))
    state = jax.jit(algo.init)(key)
    mesh = sharding.make_mesh(data, model)
    axes = transformer.axes(replace(MODEL, vocab_size=len(task.symbols)))
    where = sharding.like(mesh, state.params, sharding.shardings(mesh, axes, state.params), state)
    return jax.jit(algo.update), jax.jit(algo.update, out_shardings=(where, None)), state, where, mesh


@pytest.mark.slow
@pytest.mark.parametrize("data, model", [(2, 1), (1, 2)])
def test_an_update_compiles_for_devices(data, model, key):
    _, program, state, where, mesh = programs(key, data, model)
    with jax.set_mesh(mesh):
        compiled = program.lower(jax.device_put(state, where)).compile()
    assert "all-reduce" in compiled.as_text()
    cut = [s for s in jax.tree.leaves(compiled.output_shardings[0]) if s.spec == P(None, None, "model")]
    assert len(cut) == 8, "gate and up: the parameters, the reference and two moments"


@pytest.mark.slow
@pytest.mark.thorough(1)
@pytest.mark.parametrize("data, model", [(1, 2), (2, 1)])
def test_an_update_over_devices_is_that_of_one(data, model, key):
    alone, program, state, where, mesh = programs(key, data, model)
    state_alone, metrics = alone(state)
    with jax.set_mesh(mesh):
        shared, shared_metrics = program(jax.device_put(state, where))
    for x in (shared.params["layers"]["gate"], shared.frozen["layers"]["gate"]):
        assert x.addressable_shards[0].data.shape[-1] == 32 // model
    for name, value in metrics.items():
        np.testing.assert_allclose(value, shared_metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(state_alone.params), jax.tree.leaves(shared.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_rows_are_laid_over_the_data_axis_and_stay_without_a_mesh():
    x = jnp.zeros((4, 3))
    assert sharding.rows(x) is x
    with jax.set_mesh(sharding.make_mesh(data=2)):
        assert jax.jit(sharding.rows)(x).sharding.spec == P("data")
