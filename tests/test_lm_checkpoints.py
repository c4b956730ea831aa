"""Published checkpoints: the numbers of ``transformers``, files that come back as they were, and what is refused."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import gguf as gguf_package
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jrl import lm
from jrl.algos import reward_model
from jrl.attention.rotary import Scaling, frequencies, rope
from jrl.lm import gguf, hf, layout, settings
from jrl.lm.model import decoder
from jrl.lm.pairs import as_rollout
from jrl.nets import decoding, moe, transformer

DATA = Path(__file__).parent / "data" / "hf"  # made by make.py there
REWARD = DATA.with_name("reward_head")
FAMILIES = sorted(x.name for x in DATA.iterdir() if x.is_dir())
MOE = {"experts": 4, "chosen": 2, "expert_dim": 8}


def greedy(config, params, prompt, length):
    """The prompt [B, P], continued to ``length`` through the caches."""
    known = jnp.pad(jnp.asarray(prompt), [(0, 0), (0, length - prompt.shape[1])])

    def step(carry, position):
        cache, token = carry
        logits, cache = decoding.decode(params, token, cache, position, config)
        best = logits.argmax(-1).astype(token.dtype)
        return (cache, jnp.where(position + 1 < prompt.shape[1], known[:, position + 1], best)), token

    cache = decoding.init_cache(config, len(prompt), length)
    return jax.jit(lambda: jax.lax.scan(step, (cache, known[:, 0]), jnp.arange(length))[1])().T


@pytest.mark.thorough(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(family):
    config, params = hf.load(DATA / family)
    oracle = np.load(DATA / family / "oracle.npz")
    logits = jax.jit(lambda p, t: transformer.forward(p, t, config))(params, oracle["tokens"])
    np.testing.assert_allclose(logits, oracle["logits"], atol=1e-4)
    np.testing.assert_array_equal(greedy(config, params, oracle["greedy"][:, :8], 24), oracle["greedy"])


@pytest.mark.parametrize("shard_bytes, files", [(10**9, 1), (40_000, None)])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_comes_back(family, shard_bytes, files, tmp_path):
    config, params = hf.load(DATA / family)
    hf.save(tmp_path, config, params, shard_bytes=10_000)  # goes away
    hf.save(tmp_path, config, params, shard_bytes=shard_bytes, more={"eos_token_id": 3})
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) == files or (
        files is None and max(x.stat().st_size for x in shards) < 45_000 and len(shards) > 1
    )
    again, loaded = hf.load(tmp_path)
    assert again == config and jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 3
    held = {x: y for file in shards for x, y in safetensors.numpy.load_file(file).items()}
    first = safetensors.numpy.load_file(DATA / family / "model.safetensors")
    assert held.keys() == first.keys()
    for name in first:
        np.testing.assert_array_equal(held[name], first[name])


@pytest.mark.parametrize("family, dtype", [("deepseek_v3", "bfloat16"), ("mixtral", "float16")])
def test_half_precision_is_read_and_written_with_routers_in_full(family, dtype, tmp_path):
    config, params = hf.load(DATA / family, dtype)
    full = hf.load(DATA / family)[1]
    wide = {name for name, x in params["layers"].items() if getattr(x, "dtype", None) == jnp.float32}
    assert params["embedding"].dtype == dtype and wide == {"router", "bias"} & full["layers"].keys()
    hf.save(tmp_path, config, params, shard_bytes=1000)
    for file in tmp_path.glob("*.safetensors"):
        sizes = [x.nbytes for x in safetensors.numpy.load_file(file).values()]
        assert sum(sizes) <= 1000 or len(sizes) == 1
    again = hf.load(tmp_path)[1]
    for name in wide:
        np.testing.assert_array_equal(again["layers"][name], full["layers"][name])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-8, atol=1e-6), again, full)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, np.asarray(y).astype(np.float32)), again, params)


def test_both_ways_of_writing_positions_are_read():
    found = json.loads((DATA / "llama3" / "config.json").read_text())
    new = settings.read(found)
    rope = dict(found.pop("rope_parameters"))
    old = found | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    assert settings.read(old | {"torch_dtype": "bfloat16"}) == new
    assert new.rope_scaling == Scaling("llama3", 8.0, 32, 1.0, 4.0)


@pytest.mark.parametrize(
    "more, window", [({"max_window_layers": 0}, 7), ({}, None), ({"layer_types": ["sliding_attention"] * 2}, 7)]
)
def test_a_window_for_all_layers(more, window):
    found = json.loads((DATA / "qwen2" / "config.json").read_text()) | {"use_sliding_window": True, "sliding_window": 7}
    del found["layer_types"]
    config = settings.read(found | more)
    assert (config.attention, config.window) == (("window", window) if window else ("dense", 512))
    assert settings.read(settings.write(config)) == config


def damage(folder, change):
    """A copy of a checkpoint with its tensors changed."""
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    change(arrays)
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")


K = "model.layers.1.self_attn.k_proj.weight"
TENSORS = {
    r"llama: tensor model.layers.1.self_attn.k_proj.weight \[16, 32\] is missing": lambda x: x.pop(K),
    r"safetensors: tensor model.layers.1.self_attn.k_proj.weight must be \[16, 32\]; got \[32, 16\]": lambda x: (
        x.update({K: np.ascontiguousarray(x[K].T)})
    ),
    r"safetensors: tensor model.layers.2.mlp.bias \[3\] is not of a llama": lambda x: x.update(
        {"model.layers.2.mlp.bias": np.zeros(3, np.float32)}
    ),
    r"k_proj.weight must be one of F64, F32, F16, BF16; got I32": lambda x: x.update({K: x[K].astype(np.int32)}),
}


@pytest.mark.parametrize("message", TENSORS)
def test_tensors_that_do_not_fit_are_named(message, tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(DATA / "llama", folder)
    damage(folder, TENSORS[message])
    with pytest.raises(ValueError, match=message):
        hf.load(folder)


def test_tensors_that_need_not_be_there(tmp_path):
    folder = tmp_path / "qwen2"
    shutil.copytree(DATA / "qwen2", folder)
    table = "model.embed_tokens.weight"
    damage(folder, lambda x: x.update({"lm_head.weight": x[table], "rotary_emb.inv_freq": np.ones(3, np.float32)}))
    jax.tree.map(np.testing.assert_array_equal, hf.load(folder)[1], hf.load(DATA / "qwen2")[1])
    damage(folder, lambda x: x.update({"lm_head.weight": 2 * x[table]}))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        hf.load(folder)


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    config, params = hf.load(DATA / "llama")
    hf.save(tmp_path, config, params, shard_bytes=60_000)
    index = tmp_path / "model.safetensors.index.json"
    last = sorted(tmp_path.glob("model-*"))[-1]
    whole, listed = last.read_bytes(), index.read_text()

    def refused(message):
        with pytest.raises(ValueError, match=message):
            hf.load(tmp_path)

    last.write_bytes(whole[:-5])
    refused(f"{last.name} is damaged")
    last.unlink()
    refused(f"{last.name} is missing")
    last.write_bytes(whole)
    index.write_text(listed.replace("lm_head.weight", "lm_head.wait"))
    refused(
        "tensor lm_head.wait is missing, which model.safetensors.index.json says is here|tensor lm_head.weight is not in"
    )
    for elsewhere in ("../model.safetensors", "/model.safetensors", "..", "config.json", "a/b.safetensors"):
        index.write_text(listed.replace(last.name, elsewhere))
        refused("index.json: weight_map must name the file of each tensor, a .safetensors file in the same folder")
    index.write_text(listed[:-9])
    refused("index.json is damaged")
    index.unlink()
    refused("holds neither model.safetensors nor model.safetensors.index.json")
    for text in ("[" * 100_000, '{"model_type": "\\ud800"}'):
        (tmp_path / "config.json").write_text(text)
        refused("config.json is damaged")
    (tmp_path / "config.json").write_text("[]")
    refused("config.json must hold an object; got list")
    (tmp_path / "config.json").unlink()
    refused("config.json is missing")


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("llama", {"model_type": "gemma"}, "config.json: model_type must be one of llama, qwen2, .*; got 'gemma'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act must be silu, swish: nothing else is done here; got 'gelu'"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config must be null"),
        ("llama", {"sliding_window": 16}, "sliding_window must be null"),
        ("llama", {"hidden_size": "32"}, "hidden_size must be an integer of at least 1; got '32'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type must be one of default, linear",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}},
            "rope_scaling.mscale is not a sett",
        ),
        ("llama", {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be null, 1"),
        ("llama", {"num_key_value_heads": 3}, "num_heads must be a multiple of num_kv_heads = 3"),
        (
            "qwen3",
            {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types .* must",
        ),
        ("qwen2", {"mlp_bias": True}, "mlp_bias must be null, false"),
        ("mixtral", {"attention_bias": True}, "attention_bias must be null, false"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func must be null, sigmoid"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads must be null, 4"),
        ("deepseek_v3", {"topk_group": 5}, "moe.groups must divide moe.experts = 8"),
        ("llama", {"vocab_size": None}, "vocab_size must be an integer of at least 1; got None"),
        ("llama", {"rms_norm_eps": math.inf}, "rms_norm_eps must be a number, finite in float32; got inf"),
        ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps must be a number, finite in float32; got nan"),
        ("llama", {"rope_theta": 10**400}, "rope_theta must be a number, finite in float32; got 1000"),
        ("llama", {"rope_parameters": 5}, "rope_parameters must be an object; got 5"),
        ("qwen3", {"layer_types": 7}, "layer_types must be a list of texts; got 7"),
        ("qwen3", {"layer_types": [[], {}]}, "layer_types must be a list of texts"),
        ("qwen2", {"num_hidden_layers": 10**30}, r"num_hidden_layers must be below 2\*\*63"),
        ("qwen2", {"num_hidden_layers": 10**12}, "num_hidden_layers must be between 1 and 10000"),
        ("llama", {"num_hidden_layers": 10**4}, "tensors are too few for 10000 layers"),
        (
            "mixtral",
            {"num_local_experts": 10**12},
            "tensors are too few for 2 layers of 1000000000000 experts",
        ),
        (
            "deepseek_v3",
            {"num_nextn_predict_layers": "1"},
            "num_nextn_predict_layers must be an integer of at least 0; got '1'",
        ),
        ("deepseek_v3", {"rope_interleave": 2}, "rope_interleave must be true or false; got 2"),
    ],
)
def test_settings_that_cannot_be_done_are_refused(family, change, message, tmp_path):
    found = json.loads((DATA / family / "config.json").read_text()) | change
    shutil.copytree(DATA / family, tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message):
        hf.load(tmp_path / "model")


@pytest.mark.parametrize(
    "change",
    [{"attention": "nsa"}, {"attention": "rwkv"}, {"causal": False}, {"ffn_bias": True}, {"vocab_size": 0},
     {"experts": moe.Config(**MOE, shared=1)}, {"experts": moe.Config(**MOE, scores="sigmoid")}],
)  # fmt: skip
def test_a_decoder_of_no_family_is_not_saved(change, tmp_path):
    config = transformer.Config(**{"vocab_size": 5, "dim": 16, "qkv_bias": True} | change)
    with pytest.raises(ValueError, match="this decoder"):
        settings.write(config)


def test_parameters_that_do_not_fit_are_not_saved(tmp_path):
    config, params = hf.load(DATA / "llama")
    with pytest.raises(ValueError, match=r"params\['layers', 'down'\]: wanted \[2, 72, 32\]; got \[2, 64, 32\]"):
        hf.save(tmp_path, dataclasses.replace(config, ffn_dim=72), params)
    assert not list(tmp_path.iterdir())


def test_stretched_positions_by_hand():
    kept = frequencies(4, 10_000.0, Scaling(), jnp.float32)
    np.testing.assert_allclose(kept, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    np.testing.assert_allclose(frequencies(4, 10_000.0, Scaling("linear", 5.0), jnp.float32), kept / 5, rtol=1e-6)
    # 100 / 2 pi = 15.9 turns, 1.59, 0.159 and 0.0159: the second is kept by (1.59 - 1) / 3.
    share = np.array([1, (10 / (2 * np.pi) - 1) / 3, 0, 0])
    stretched = frequencies(4, 10_000.0, Scaling("llama3", 8.0, 100), jnp.float32)
    np.testing.assert_allclose(stretched, kept * (share + (1 - share) / 8), rtol=1e-6)
    # YaRN: 4 turns are at index 0.6, 1 turn at 1.2; rounded, 0 and 2.
    stretched = frequencies(4, 10_000.0, Scaling("yarn", 8.0, 100), jnp.float32)
    np.testing.assert_allclose(stretched, kept * (np.array([1, 0.5, 0, 0]) * 7 / 8 + 1 / 8), rtol=1e-5)
    yarn = Scaling("yarn", np.e**10)
    assert (yarn.on_heads, yarn.on_scores) == pytest.approx((2.0, 1.0))
    yarn = dataclasses.replace(yarn, mscale=1.0, mscale_all=0.5)
    assert (yarn.on_heads, yarn.on_scores) == pytest.approx((2 / 1.5, 2.25))
    x = jnp.ones((1, 1, 1, 8))
    np.testing.assert_allclose(rope(x, jnp.zeros((1, 1), int), 1e4, yarn), x * 2 / 1.5, rtol=1e-6)


def test_groups_and_weights_as_they_are(key):
    config = moe.Config(**MOE, scores="sigmoid", normalize=False, scale=3.0)
    params = {"router": jnp.eye(4), "bias": jnp.array([0.0, 0.0, 1.0, 0.0])}
    chosen, weight = moe.route(params, jnp.array([[2.0, 1.0, -1.0, 0.0]]), config)
    order = np.argsort(chosen[0])
    np.testing.assert_array_equal(chosen[0][order], [0, 2])
    np.testing.assert_allclose(weight[0][order], 3 / (1 + np.exp([-2.0, 1.0])), rtol=1e-6)


@pytest.mark.parametrize("wrong, message", [
    ({"kind": "ntk"}, "rope.kind must be one of none, linear, llama3, yarn"),
    ({"factor": 0.0}, "rope.factor must be above 0"),
    ({"slow": 4.0}, "rope.slow must be above 0 and below rope.fast = 4; got 4"),
])  # fmt: skip
def test_wrong_stretching_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Scaling(**wrong)


@pytest.mark.parametrize("dense, experts", [(1, 0), (2, 4), (3, 4)])
def test_layers_without_experts_come_before_others(dense, experts):
    with pytest.raises(ValueError, match="dense_layers must be below num_layers = 2, of layers with experts"):
        transformer.Config(dense_layers=dense, experts=moe.Config(experts))


# GGUF


def as_gguf(path, family, *, drop=None, **more):
    """A checkpoint as llama.cpp converts it, unquantized."""
    found = json.loads((DATA / family / "config.json").read_text())
    writer = gguf_package.GGUFWriter(path, family)
    writer.add_block_count(found["num_hidden_layers"])
    writer.add_embedding_length(found["hidden_size"])
    writer.add_feed_forward_length(found["intermediate_size"])
    writer.add_head_count(found["num_attention_heads"])
    writer.add_head_count_kv(found["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(found["rms_norm_eps"])
    writer.add_rope_freq_base(found["rope_parameters"]["rope_theta"])
    if "head_dim" in found:
        writer.add_key_length(found["head_dim"])
    for name, value in more.items():
        writer.add_uint32(name.replace("__", "."), value)
    for name, x in safetensors.numpy.load_file(DATA / family / "model.safetensors").items():
        if family == "llama" and (".q_proj" in name or ".k_proj" in name):
            heads = found["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
            x = x.reshape(heads, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        if name != drop:
            writer.add_tensor(gguf._name(name), np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_holds_the_same_model(family, tmp_path):
    config, params = gguf.load(as_gguf(tmp_path / "x.gguf", family))
    wanted, known = hf.load(DATA / family)
    assert settings.write(config) == settings.write(
        dataclasses.replace(wanted, head_dim=wanted.width, norm_eps=float(np.float32(wanted.norm_eps)))
    )
    jax.tree.map(np.testing.assert_array_equal, params, known)


def test_gguf_that_cannot_be_read_is_refused(tmp_path):
    path = tmp_path / "x.gguf"

    def refused(message):
        with pytest.raises(ValueError, match=f"x.gguf.*{message}"):
            gguf.load(path)

    refused("is missing")
    path.write_bytes(b"GGUF")
    refused("is damaged")
    as_gguf(path, "llama", llama__expert_count=8)
    refused("llama.expert_count must be 0: nothing else is read; got 8")
    as_gguf(path, "llama", llama__block_count=1 << 30)
    refused("llama.block_count must be between 1 and 10000")
    as_gguf(path, "llama", llama__block_count=9999)
    refused("tensors are too few for 9999 layers")
    as_gguf(path, "llama", general__architecture=1)
    refused("general.architecture must be one of")
    as_gguf(path, "llama", drop=K)
    refused(r"tensor blk.1.attn_k.weight \[16, 32\] is missing")


# Tokenizers, and a model whole


@pytest.fixture(scope="module")
def smollm2(smollm2_file):
    return lm.load(smollm2_file)


TEXTS = [
    "Hello, world!\n\n\tindented  twice  ",
    "don't DON'T 3.14159 ²½ x=12345;",
    "naïve e\u0301 日本語 العربية 🤖🏳️‍🌈",
    "<|im_start|>user\nhi<|im_end|>",
    "",
]


def test_a_tokenizer_of_a_file(smollm2, tmp_path):
    tokenizer = smollm2[2]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    digits = tokenizer.encode("12345")
    assert [tokenizer.decode([x]) for x in digits] == list("12345")
    assert tokenizer.encode(TEXTS[3])[0] == 1 and tokenizer.encode(TEXTS[3])[-1] == tokenizer.eos == tokenizer.pad == 2
    assert tokenizer.decode(tokenizer.encode(TEXTS[3]), special=False) == "user\nhi"
    hello = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    said = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer.chat(hello) == said + "<|im_start|>assistant\n" and tokenizer.chat(hello, answer=False) == said

    tokenizer.raw.save(str(tmp_path / "tokenizer.json"))
    named = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>", "chat_template": tokenizer.template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    again = lm.tokenizer.from_folder(tmp_path)
    assert (again.eos, again.pad, again.bos, again.vocab_size) == (2, 0, None, 49152)
    assert again.chat(hello) == tokenizer.chat(hello)
    assert [again.encode(x) for x in TEXTS] == [tokenizer.encode(x) for x in TEXTS]
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no ' + messages[0].role) }}")
    with pytest.raises(ValueError, match="the chat template refuses: no system"):
        lm.tokenizer.from_folder(tmp_path).chat(hello)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="the chat template refuses: access to attribute '__class__'"):
        lm.tokenizer.from_folder(tmp_path).chat(hello)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged"):
        lm.tokenizer.from_folder(tmp_path)


def test_a_model_from_a_file_knows_paris(smollm2):
    config, params, tokenizer = smollm2
    prompt = tokenizer.encode("The capital of France is the city of")
    logits = jax.jit(lambda p, t: transformer.forward(p, t, config)[0, -1])(params, jnp.array([prompt]))
    assert tokenizer.decode([logits.argmax()]) == " Paris"


def test_a_path_that_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"must be a folder, or a .gguf file"):
        lm.load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"tokenizer.json is missing"):
        lm.load(DATA / "llama")


def test_neighbours_become_halves_and_back():
    rows = np.arange(10.0).reshape(2, 5)
    halves = layout._halves(rows, 4)
    np.testing.assert_array_equal(halves[0], [0, 1, 3, 2, 4])
    np.testing.assert_array_equal(layout._neighbours(halves, 4), rows)


def test_a_reward_model_scores_as_in_transformers():
    """LlamaForSequenceClassification of transformers 5.17.0 (``tests/data/reward_head``): scores, wherever the padding is."""
    known = np.load(REWARD / "scores.npz")
    shape, params = hf.load_scorer(REWARD)
    model = decoder(shape)
    ids, mask = known["right_input_ids"], known["right_attention_mask"].astype(bool)
    hidden, _ = model.hidden_and_load(params["body"], ids, np.ones_like(mask), mask)
    each = jnp.einsum("btd,d->bt", hidden, params["head"])
    np.testing.assert_allclose(np.asarray(each)[mask], known["token_scores_right"][mask], atol=2e-5)
    prompt, valid = known["left_input_ids"][:, :-1], known["left_attention_mask"][:, :-1].astype(bool)
    said = as_rollout(jnp.asarray(known["left_input_ids"][:, -1:]), jnp.ones((4, 1), bool))
    found = reward_model.scores(model, params, jnp.asarray(prompt), jnp.asarray(valid), said)[0]
    np.testing.assert_allclose(found[:3], known["scores_left_position_ids"][:3, 0], atol=2e-5)


def test_a_reward_model_is_written_as_it_was_read(tmp_path):
    shape, params = hf.load_scorer(REWARD)
    hf.save_scorer(tmp_path, shape, params, pad=0)
    ours, theirs = (safetensors.numpy.load_file(folder / "model.safetensors") for folder in (tmp_path, REWARD))
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x)
    with pytest.raises(ValueError, match=r"tensor score.weight is missing: this is no reward model"):
        hf.load_scorer(REWARD.parent / "adapters" / "base")
