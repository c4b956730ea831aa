"""What every parameter of the library is, and that optimizers and adapters treat each layer, expert and branch as one of its own."""

import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrl import nets
from jrl.attention import mla, nsa
from jrl.envs.types import Box, Discrete
from jrl.nets import moe, transformer
from jrl.nets.action_values import ValueConfig, action_values
from jrl.nets.memory import AttentionConfig
from jrl.numerics import lora, optim, parameters
from jrl.numerics.optim import Hyper, OptimizerConfig

# One line a parameter: its path, its kind, the axes that stack, and each matrix (inputs x outputs) or vector.

SWIGLU = """
layers/ffn_norm          norms       3     10
layers/gate              weights     3     10 x 7
layers/up                weights     3     10 x 7
layers/down              weights     3     7 x 10
"""
PROJECTIONS = """
layers/attention_norm    norms       3     10
layers/q                 weights     3     10 x 8
layers/k                 weights     3 1   10 x 4
layers/v                 weights     3 1   10 x 4
layers/o                 weights     3     8 x 10
"""
ENDS = """
embedding                embeddings        11 x 10
norm                     norms             10
head                     weights           10 x 11
"""
COMPRESSION = """
layers/compress/k/position embeddings 3    4 x 4
layers/compress/k/w_in     weights    3    16 x 8
layers/compress/k/b_in     biases     3    8
layers/compress/k/w_out    weights    3    8 x 4
layers/compress/k/b_out    biases     3    4
"""
DECODER = transformer.Config(11, dim=10, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4, ffn_dim=7,
                             tie_embeddings=False)  # fmt: skip
BIASED = replace(DECODER, qkv_bias=True, out_bias=True, ffn_bias=True, qk_norm=True)
EXPERTS = replace(DECODER, experts=moe.Config(5, 2, 6, shared=2, scores="sigmoid"), dense_layers=1)
SPARSE = replace(DECODER, attention="nsa", sparse=nsa.Config(4, 2, 4, 3, window=4), qkv_bias=True)
LATENT = replace(DECODER, attention="mla", latent=mla.Config(9, 6, nope_dim=4, rope_dim=2, value_dim=5))
RECURRENT = replace(DECODER, attention="rwkv")

DECODERS = {
    "biases and norms of queries and keys": (BIASED, ENDS + PROJECTIONS + SWIGLU + """
layers/q_bias            biases      3     8
layers/k_bias            biases      3 1   4
layers/v_bias            biases      3 1   4
layers/o_bias            biases      3     10
layers/gate_bias         biases      3     7
layers/up_bias           biases      3     7
layers/down_bias         biases      3     10
layers/q_norm            norms       3     4
layers/k_norm            norms       3     4
"""),
    "experts": (EXPERTS, ENDS + (PROJECTIONS + SWIGLU).replace("layers/", "first/").replace(" 3 ", " 1 ") +
        PROJECTIONS.replace(" 3 ", " 2 ") + """
layers/ffn_norm          norms       2     10
layers/router            weights     2     10 x 5
layers/bias              biases      2     5
layers/gate              weights     2 5   10 x 6
layers/up                weights     2 5   10 x 6
layers/down              weights     2 5   6 x 10
layers/shared_gate       weights     2     10 x 12
layers/shared_up         weights     2     10 x 12
layers/shared_down       weights     2     12 x 10
"""),
    "nsa": (SPARSE, ENDS + PROJECTIONS.replace(" 3 1 ", " 3 3 ") + SWIGLU + COMPRESSION + COMPRESSION.replace("/k/", "/v/") + """
layers/q_bias            biases      3     8
layers/k_bias            biases      3 3   4
layers/v_bias            biases      3 3   4
layers/branch_gate       weights     3     10 x 6
layers/branch_gate_bias  biases      3     6
"""),
    "mla": (LATENT, ENDS + SWIGLU + """
layers/attention_norm    norms       3     10
layers/o                 weights     3     10 x 10
layers/latent/down       weights     3     10 x 9
layers/latent/norm       norms       3     9
layers/latent/key        weights     3     10 x 2
layers/latent/up_key     weights     3     9 x 8
layers/latent/up_value   weights     3     9 x 10
layers/latent/query_down weights     3     10 x 6
layers/latent/query_norm norms       3     6
layers/latent/query      weights     3     6 x 12
"""),
    "rwkv": (RECURRENT, ENDS + SWIGLU + PROJECTIONS.replace(" 3 1 ", " 3   ").replace("10 x 4", "10 x 8").replace("/q ", "/r ") + """
layers/g                 weights     3     10 x 8
layers/shift             biases      3 5   10
layers/shift_all         biases      3     10
layers/shift_down        weights     3 5   10 x 8
layers/shift_up          weights     3 5   8 x 10
layers/decay             biases      3     8
layers/decay_down        weights     3     10 x 16
layers/decay_up          weights     3     16 x 8
layers/bonus             biases      3     8
layers/head_norm         norms       3     8
layers/head_norm_bias    norms       3     8
"""),
}  # fmt: skip

VECTOR, IMAGE = jax.ShapeDtypeStruct((4,), jnp.float32), jax.ShapeDtypeStruct((6, 6, 3), jnp.float32)
TOWER = """
params/shared/Dense_0/kernel weights     4 x 8
params/shared/Dense_0/bias   biases      8
"""
HEADS = """
params/policy/out/kernel     weights     8 x 3
params/policy/out/bias       biases      3
params/value/kernel          weights     8 x 1
params/value/bias            biases      1
"""
TINY = nets.Config(hidden=(8,), shared=True)
NETWORKS = {
    "convolutions and norms": (
        nets.actor_critic(replace(TINY, channels=(5,), norm="layer"), IMAGE, Box((-1.0,) * 3, (1.0,) * 3)),
        HEADS + TOWER.replace("4 x 8", "80 x 8") + """
params/shared/Conv3x3_0/kernel   weights     27 x 5
params/shared/Conv3x3_0/bias     biases      5
params/shared/LayerNorm_0/scale  norms       5
params/shared/LayerNorm_0/bias   norms       5
params/shared/LayerNorm_1/scale  norms       8
params/shared/LayerNorm_1/bias   norms       8
params/policy/log_std            biases      3
"""),
    "vit": (
        nets.actor_critic(replace(TINY, torso="vit", vit_dim=6, vit_layers=2, vit_heads=1), IMAGE, Discrete(3)),
        HEADS + TOWER.replace("4 x 8", "6 x 8") + """
params/shared/vit/patches/kernel weights     12 x 6
params/shared/vit/patches/bias   biases      6
params/shared/vit/position       embeddings  9 x 6
params/shared/vit/blocks/norm    norms       6
params/shared/vit/blocks/layers/attention_norm norms   2   6
params/shared/vit/blocks/layers/ffn_norm       norms   2   6
params/shared/vit/blocks/layers/q              weights 2   6 x 6
params/shared/vit/blocks/layers/k              weights 2 1 6 x 6
params/shared/vit/blocks/layers/v              weights 2 1 6 x 6
params/shared/vit/blocks/layers/o              weights 2   6 x 6
params/shared/vit/blocks/layers/gate           weights 2   6 x 12
params/shared/vit/blocks/layers/up             weights 2   6 x 12
params/shared/vit/blocks/layers/down           weights 2   12 x 6
"""),
    "a recurrent memory": (
        nets.actor_critic(replace(TINY, gru=8), VECTOR, Discrete(3)),
        HEADS + TOWER + "".join(f"""
params/shared_gru/GRUCell_0/{name}/kernel weights 8 x 8
""" for name in ("in", "ir", "iz", "hn", "hr", "hz")) + "".join(f"""
params/shared_gru/GRUCell_0/{name}/bias biases 8
""" for name in ("in", "ir", "iz", "hn"))),
    "a memory of attention": (
        nets.actor_critic(replace(TINY, attention=AttentionConfig("dense", num_layers=2, num_heads=4, num_kv_heads=2)), VECTOR, Discrete(3)),
        HEADS + TOWER + """
params/shared_attention/blocks/norm                  norms   8
params/shared_attention/blocks/layers/attention_norm norms   2   8
params/shared_attention/blocks/layers/ffn_norm       norms   2   8
params/shared_attention/blocks/layers/q              weights 2   8 x 8
params/shared_attention/blocks/layers/k              weights 2 1 8 x 4
params/shared_attention/blocks/layers/v              weights 2 1 8 x 4
params/shared_attention/blocks/layers/o              weights 2   8 x 8
params/shared_attention/blocks/layers/gate           weights 2   8 x 16
params/shared_attention/blocks/layers/up             weights 2   8 x 16
params/shared_attention/blocks/layers/down           weights 2   16 x 8
"""),
    "noisy, dueling action values": (
        action_values(ValueConfig(hidden=(8, 7), dueling=True, noisy=True), VECTOR, Discrete(3), 5),
        """
params/torso/Dense_0/kernel      weights 4 x 8
params/torso/Dense_0/bias        biases  8
params/torso/LayerNorm_0/scale   norms   8
params/torso/LayerNorm_0/bias    norms   8
params/LayerNorm_0/scale         norms   7
params/LayerNorm_0/bias          norms   7
params/LayerNorm_1/scale         norms   7
params/LayerNorm_1/bias          norms   7
""" + "".join(f"""
params/{name}/kernel       weights {rows} x {columns}
params/{name}/kernel_sigma biases  {rows} x {columns}
params/{name}/bias         biases  {columns}
params/{name}/bias_sigma   biases  {columns}
""" for name, rows, columns in (
            ("values_hidden", 8, 7), ("baseline_hidden", 8, 7), ("values", 7, 15), ("baseline", 7, 5)
        ))),
}  # fmt: skip


def decoder_shapes(config):
    return jax.eval_shape(lambda key: transformer.init(key, config), jax.random.key(0))


def shapes_and_table(name):
    if name in DECODERS:
        config, table = DECODERS[name]
        return decoder_shapes(config), table
    network, table = NETWORKS[name]
    return jax.eval_shape(network.init, jax.random.key(0)), table


TREES = {name: shapes_and_table(name) for name in (*DECODERS, *NETWORKS)}


def listed(table):
    """``{path: (kind, batch, matrix or vector)}``, sizes as tuples."""
    found = {}
    for path, kind, *sizes in (line.split() for line in table.splitlines() if line):
        last = 3 if "x" in sizes else 1
        found[path] = kind, *(tuple(int(n) for n in part if n != "x") for part in (sizes[:-last], sizes[-last:]))
    return found


def by_path(tree):
    return {"/".join(parameters.names(path)): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def description(path, x):
    batch, rows, columns = ([x.shape[i] for i in axes] for axes in parameters.axes_of(path.split("/"), x))
    matrix = (math.prod(rows), math.prod(columns)) if columns else (math.prod(rows),)
    return parameters.kind_of(path.split("/"), x), tuple(batch), matrix


@pytest.mark.parametrize("name", [*DECODERS, *NETWORKS])
def test_every_parameter_is_known_by_its_path(name):
    shapes, table = TREES[name]
    assert {path: description(path, x) for path, x in by_path(shapes).items()} == listed(table)


@pytest.mark.parametrize("name", DECODERS)
def test_what_stacks_is_what_the_names_of_axes_say(name):
    config, _ = DECODERS[name]
    shapes = decoder_shapes(config)
    axes = jax.tree.map(lambda _, names: " ".join(names), shapes, transformer.axes(config))
    for path, names in by_path(axes).items():
        x = by_path(shapes)[path]
        stacking = itertools.takewhile(("layers", "experts", "branch", "mixed").__contains__, names.split())
        wanted = 1 if path == "layers/bias" else len(list(stacking))  # a router's bias is one vector over the experts
        assert len(parameters.axes_of(path.split("/"), x).batch) == wanted, path


def test_what_trains_may_be_a_part_of_the_model_or_stand_beside_it():
    """An adapter's tree has whole paths as its keys; PPO's has the model below ``actor`` and below ``critic/body``."""
    config, table = DECODERS["nsa"]
    shapes, known = decoder_shapes(config), listed(table)
    part = jax.eval_shape(lora.subset("bias$|norm$|position$").init, jax.random.key(0), shapes)
    assert {path: description(path, x) for path, x in by_path(part).items()} == {path: known[path] for path in part}
    both = {"actor": shapes, "critic": {"body": shapes, "head": jax.ShapeDtypeStruct((10,), jnp.float32)}}
    for prefix in ("actor/", "critic/body/"):
        for path, x in by_path(shapes).items():
            assert description(prefix + path, x) == known[path]
    assert description("critic/head", by_path(both)["critic/head"]) == ("biases", (), (10,))


@pytest.mark.parametrize("name", DECODERS)
def test_adapters_have_matrices_for_each_matrix_of_the_model(name):
    config, table = DECODERS[name]
    wanted = {path: what for path, what in listed(table).items() if what[0] == "weights"}
    adapter = lora.lora(2, pattern="^(" + "|".join(wanted) + ")$")
    trained = jax.eval_shape(adapter.init, jax.random.key(0), decoder_shapes(config))
    assert trained.keys() == wanted.keys()
    for path, (_, batch, (rows, columns)) in wanted.items():
        assert description(f"{path}/a", trained[path]["a"]) == ("weights", batch, (rows, 2))
        assert description(f"{path}/b", trained[path]["b"]) == ("weights", batch, (2, columns))


def test_an_adapter_of_a_convolution_is_one_of_its_matrix():
    params = jax.eval_shape(NETWORKS["convolutions and norms"][0].init, jax.random.key(0))
    trained = jax.eval_shape(lora.lora(2, pattern="Conv3x3_0/kernel").init, jax.random.key(0), params)
    assert trained["params/shared/Conv3x3_0/kernel"]["a"].shape == (27, 2)


@pytest.mark.parametrize("kind", ["biases", "norms"])
def test_biases_and_norms_have_no_adapters(kind):
    for config, table in DECODERS.values():
        for path, (found, *_) in listed(table).items():
            if found == kind:
                with pytest.raises(ValueError, match=rf"lora: {path} \[.*\] is no matrix"):
                    lora.lora(2, pattern=f"^{path}$").init(jax.random.key(0), decoder_shapes(config))


# What optimizers make of it


@pytest.mark.parametrize("name", TREES)
def test_weights_decay_and_biases_norms_and_embeddings_do_not(name):
    shapes, table = TREES[name]
    decayed = {path for path, yes in by_path(optim.decays(OptimizerConfig().no_decay)(shapes)).items() if yes}
    assert decayed == {path for path, (kind, *_) in listed(table).items() if kind == "weights"}


@pytest.mark.parametrize("name", TREES)
def test_muon_steps_all_matrices_but_embeddings_and_output_heads(name):
    shapes, table = TREES[name]
    state = jax.eval_shape(optim.make(OptimizerConfig("muon", clip="none")).init, shapes)
    of_muon = {path.partition("/mu/")[2] for path in by_path(state) if "/muon/" in path and "/mu/" in path}
    heads = ("head", *(f"params/{name}/kernel" for name in ("policy/out", "value", "values", "baseline")))
    wanted = {path for path, (kind, *_) in listed(table).items() if kind == "weights" and path not in heads}
    assert of_muon == wanted


# All that may stack: two layers, of three experts or branches; heads in front and behind; an adapter; a convolution
SHAPES = {
    "layers": {"q": (2, 6, 2, 2), "k": (2, 3, 6, 2, 2), "o": (2, 2, 2, 6), "up": (2, 3, 4, 6), "k_bias": (2, 3, 2, 2)},
    "layers/up": {"a": (2, 3, 6, 4)},
    "conv": {"kernel": (1, 2, 3, 4)},
}
MATRICES = {
    **{"layers/q": (6, 4), "layers/k": (6, 4), "layers/o": (4, 6), "layers/up": (4, 6), "layers/k_bias": (4,)},
    **{"layers/up/a": (6, 4), "conv/kernel": (6, 4)},
}


def first_update(config, hyper, max_grad=1.0, scale=1.0):
    """Parameters, gradients and what an optimizer first makes of them: by path, every matrix and vector by itself."""
    rng = np.random.default_rng(0)
    params, grads = (
        jax.tree.map(
            lambda shape: rng.normal(size=shape).astype(np.float32), SHAPES, is_leaf=lambda x: type(x) is tuple
        )
        for _ in range(2)
    )
    tx = optim.make(config, hyper, 1.0, max_grad)
    updates, _ = jax.jit(tx.update)(jax.tree.map(lambda g: scale * g, grads), tx.init(params), params)
    trees = (by_path(tree) for tree in (params, grads, updates))
    return [{path: np.reshape(x, (-1, *MATRICES[path])) for path, x in tree.items()} for tree in trees]


def orthogonal(g):
    """Newton and Schulz's iteration of a matrix, with Jordan's coefficients."""
    x = np.asarray(g, np.float64) / np.linalg.norm(g)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_muon_orthogonalizes_each_matrix_by_itself_whatever_its_size(scale):
    """Singular values near 1, times ``0.2 sqrt(6)``, which makes steps as large as Adam's."""
    hyper = Hyper(momentum=0.5, weight_decay=0.0)
    _, grads, updates = first_update(OptimizerConfig("muon", clip="none"), hyper, scale=scale)
    assert len(updates["layers/k"]) == len(updates["layers/up"]) == 6
    del updates["layers/k_bias"]
    for path, matrices in updates.items():
        for g, update in zip(grads[path], matrices, strict=True):
            update = update / (-0.2 * 6**0.5)
            np.testing.assert_allclose(update, orthogonal(g), rtol=0.01, atol=0.01, err_msg=path)
            values = np.linalg.svd(update)[1]
            assert (values > 0.5).all() and (values < 1.3).all(), path


def test_adaptive_clipping_compares_each_unit_with_its_own_weights():
    """At most a tenth of the norm of its weights, for each output of each matrix and each vector as a whole."""
    params, grads, updates = first_update(OptimizerConfig("sgd", clip="adaptive"), Hyper(momentum=0.0), 0.1)
    for path, every in updates.items():
        for w, g, update in zip(params[path], grads[path], every, strict=True):
            share = 0.1 * np.linalg.norm(w, axis=0) / np.linalg.norm(g, axis=0)
            np.testing.assert_allclose(update, -g * np.minimum(share, 1), rtol=1e-4, err_msg=path)


# Networks of others


def test_layers_that_flax_stacks_are_each_one():
    stacked = {"layers": {"dense": {"kernel": jnp.ones((3, 2, 4)), "bias": jnp.ones((3, 4))}, "w": jnp.ones((3, 2))}}
    found = {path: description(path, x) for path, x in by_path(stacked).items()}
    assert found == {
        "layers/dense/kernel": ("weights", (3,), (2, 4)),
        "layers/dense/bias": ("biases", (3,), (4,)),
        "layers/w": ("biases", (3,), (2,)),
    }


def test_names_of_the_decoder_mean_nothing_where_the_ranks_differ():
    """A matrix that someone calls ``o``, and a module called ``first``."""
    for path in ("o", "first/w", "first/gate", "second/q", "layers_0/kernel"):
        assert description(path, jnp.ones((3, 4))) == ("weights", (), (3, 4)), path


@pytest.mark.parametrize("path", ["attention/query/kernel", "filters", "layers/wide"])
@pytest.mark.parametrize("config", [OptimizerConfig("muon"), OptimizerConfig("sgd", clip="adaptive")])
def test_axes_that_no_name_tells_are_not_guessed(path, config):
    params = {path: jnp.ones((2, 3, 4, 5) if "layers" in path else (2, 3, 4))}
    tx = optim.make(config)
    with pytest.raises(ValueError, match=rf"which axes of parameter {path} \[2, 3, 4.*\] make its matrix is unknown"):
        tx.update(params, tx.init(params), params)
