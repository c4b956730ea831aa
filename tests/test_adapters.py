"""Adapters against the numbers of PEFT 0.21.2 and of adapters 1.3.0 (``tests/data/adapters``)."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jrl.lm import hf, peft
from jrl.lm.model import decoder
from jrl.lm.sampling import sample
from jrl.lm.scoring import score
from jrl.nets import adapters, transformer
from jrl.numerics import lora

DATA = Path(__file__).parent / "data" / "adapters"
PEFT = ("lora", "rslora", "dora", "lora_patterns", "ia3", "prefix", "prompt")
BOTTLENECKS = ("houlsby", "pfeiffer")
SHAPE, PARAMS = hf.load(DATA / "base")
INPUTS = dict(np.load(DATA / "base_logits.npz"))
MASK = INPUTS["leftpad_attention_mask"].astype(bool)


def loaded(name):
    config, trained = peft.load(DATA / name, SHAPE)
    return adapters.make(config, SHAPE), trained


def beside(adapter, trained):
    return adapter.beside(PARAMS, trained, transformer.low_rank(SHAPE))


def numbers(name, key):
    found = np.load(DATA / name / "logits.npz")[key]
    return found[:, 5:] if name == "prompt" else found


@pytest.mark.parametrize("name", PEFT + BOTTLENECKS)
def test_logits_are_those_of_the_library(name):
    params = beside(*loaded(name))
    logits = transformer.forward(params, INPUTS["input_ids"], SHAPE)
    np.testing.assert_allclose(logits, numbers(name, "logits_nopad"), atol=5e-5 if name == "rslora" else 2e-5)
    # These two libraries count positions through the padding where none are given.
    key = "logits_leftpad" if name in BOTTLENECKS else "logits_leftpad_position_ids"
    if name != "prompt":  # which ignores positions that are given
        places = jnp.arange(11)[None] if name in BOTTLENECKS else jnp.asarray(INPUTS["leftpad_position_ids"])
        padded = transformer.forward(
            params, INPUTS["leftpad_input_ids"], SHAPE, positions=jnp.broadcast_to(places, (2, 11)), valid=MASK
        )
        np.testing.assert_allclose(np.asarray(padded)[MASK], numbers(name, key)[MASK], atol=5e-5)


@pytest.mark.parametrize("name", ("lora", "rslora", "dora", "lora_patterns", "ia3"))
def test_merged_matrices_are_those_of_the_library(name):
    adapter, trained = loaded(name)
    merged = adapter.merge(PARAMS, trained)
    logits = transformer.forward(merged, INPUTS["input_ids"], SHAPE)
    np.testing.assert_allclose(logits, numbers(name, "merged_logits_nopad"), atol=5e-5)
    if name in ("lora", "dora"):
        q = np.asarray(merged["layers"]["q"][0]).reshape(32, 32).T
        np.testing.assert_allclose(q, np.load(DATA / name / "logits.npz")["merged_q_proj_layer0"], atol=1e-5)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("name", PEFT)
def test_gradients_are_those_of_the_library(name, tmp_path):
    """Of the loss of next tokens, written as an adapter's file and compared tensor by tensor."""
    config, trained = peft.load(DATA / name, SHAPE)
    adapter, known = adapters.make(config, SHAPE), np.load(DATA / name / "grads.npz")
    labels = known["labels"][:, 1:]
    # The library counts positions through the padding here.
    places = jnp.broadcast_to(jnp.arange(11)[None], (2, 11))

    def loss(trained):
        logits = transformer.forward(
            beside(adapter, trained), INPUTS["leftpad_input_ids"], SHAPE, positions=places, valid=MASK
        )
        log_p = jax.nn.log_softmax(logits[:, :-1])
        each = -jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return jnp.sum(each, where=labels != -100) / (labels != -100).sum()

    if name == "prompt":  # whose virtual tokens stand before the padding, which they are not part of
        pytest.skip("the library puts the prompt before the padding")
    value, slope = jax.value_and_grad(loss)(trained)
    np.testing.assert_allclose(value, known["loss"], rtol=1e-5)
    peft.save(tmp_path, SHAPE, config, slope)
    written = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    ours, theirs = (
        {key.removeprefix("base_model.model."): x for key, x in found.items()} for found in (written, known)
    )
    for key in theirs.keys() - {"labels", "loss"}:
        got, wanted = ours[key], theirs[key]
        if (
            name == "lora_patterns" and ".1.self_attn.q_proj" in key
        ):  # its rank of 2 was padded, and its factor went into B
            got = got[:2] if "lora_A" in key else 4 * got[:, :2]
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("name", PEFT + BOTTLENECKS)
def test_an_adapter_that_is_written_is_the_one_that_was_read(name, tmp_path):
    config, trained = peft.load(DATA / name, SHAPE)
    peft.save(tmp_path, SHAPE, config, trained, base="base")
    again = peft.load(tmp_path, SHAPE)
    assert again[0] == config
    jax.tree.map(np.testing.assert_array_equal, again[1], trained)
    file = peft.BOTTLENECK if name in BOTTLENECKS else peft.PEFT
    ours, theirs = (safetensors.numpy.load_file(folder / file) for folder in (tmp_path, DATA / name))
    if name in BOTTLENECKS:  # the adapter's name is ours to choose
        theirs = {key.replace(".a.", ".jrl."): x for key, x in theirs.items()}
    if name != "lora_patterns":
        assert ours.keys() == theirs.keys()
        for key, x in theirs.items():
            np.testing.assert_array_equal(ours[key], x)
    said, known = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, DATA / name))
    said, known = (x.get("config", x) for x in (said, known))
    differing = {key for key in said if key in known and said[key] != known[key]}
    assert differing <= {"base_model_name_or_path", "encoder_hidden_size"}, differing


@pytest.mark.slow
@pytest.mark.parametrize("kind", (*adapters.BESIDE_MATRICES, "prefix", "prompt", "houlsby", "pfeiffer"))
def test_sampling_and_scoring_agree_and_most_adapters_begin_as_nothing(kind):
    config = adapters.Config(kind, rank=4, tokens=3)
    adapter = adapters.make(config, SHAPE)
    trained = adapter.init(jax.random.key(0), PARAMS)
    model = decoder(SHAPE)
    if kind not in ("prefix", "prompt"):
        logits = [transformer.forward(p, INPUTS["input_ids"], SHAPE) for p in (PARAMS, beside(adapter, trained))]
        np.testing.assert_allclose(*logits, atol=1e-5)
    trained = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape), trained)
    params = beside(adapter, trained)
    prompt, valid = INPUTS["leftpad_input_ids"], jnp.asarray(MASK)
    said = sample(jax.random.key(2), model, params, prompt, length=6, end=2, valid=valid, copies=2)
    rows = {"prompt": jnp.repeat(prompt, 2, 0), "valid": jnp.repeat(valid, 2, 0)}
    scored = score(model, params, rows["prompt"], said, valid=rows["valid"])
    log_prob = jnp.where(said.mask, scored.log_prob, 0)
    np.testing.assert_allclose(log_prob, said.log_prob, atol=2e-5)


def test_dropout_is_on_with_a_key_alone_and_keeps_the_mean():
    config = adapters.Config("lora", rank=4, dropout=0.5)
    adapter = adapters.make(config, SHAPE)
    trained = jax.tree.map(lambda x: x + 0.02, adapter.init(jax.random.key(0), PARAMS))
    plain = beside(adapter, trained)["layers"]["q"]
    assert plain.drop is None
    x = jax.random.normal(jax.random.key(1), (1, 1, 32))
    one = jax.tree.map(lambda y: y[0], plain)
    wanted = lora.product("...d,dhw->...hw", x, one)

    def dropped(key):
        params = adapter.beside(PARAMS, trained, transformer.low_rank(SHAPE), key)
        return lora.product("...d,dhw->...hw", x, jax.tree.map(lambda y: y[0], params["layers"]["q"]))

    found = jax.vmap(dropped)(jax.random.split(jax.random.key(2), 4000))
    assert found.std(0).min() > 1e-3
    np.testing.assert_allclose(found.mean(0), wanted, atol=5 * float(found.std(0).max()) / 4000**0.5)


def test_what_cannot_be_read_is_refused(tmp_path):
    def changed(name, **more):
        folder = tmp_path / f"{name}-{'-'.join(more)}"
        folder.mkdir()
        for path in (DATA / name).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
        return folder

    wider = replace(SHAPE, num_layers=1)
    for folder, shape, message in [
        (changed("lora", bias="all"), SHAPE, "bias must be none; got 'all'"),
        (changed("lora", peft_type="VERA"), SHAPE, "peft_type must be one of LORA, IA3"),
        (DATA / "lora", wider, "model.layers.1.self_attn.q_proj is no matrix of this decoder"),
        (DATA / "prefix", wider, "prompt_embeddings must be [5, 32]; got [5, 64]"),
        (tmp_path, SHAPE, "adapter_config.json is missing"),
        (
            changed("houlsby", config={"mh_adapter": True, "scaling": 2.0, "reduction_factor": 4}),
            SHAPE,
            "scaling must be 1.0",
        ),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            peft.load(folder, shape)
    with pytest.raises(ValueError, match="a prefix stands beside"):
        adapters.prefix(SHAPE, 2).merge(PARAMS, {})
    with pytest.raises(ValueError, match=r"adapter.kind = prefix needs transformer.attention=dense"):
        adapters.make(adapters.Config("prefix"), replace(SHAPE, attention="nsa"))
    with pytest.raises(ValueError, match="do not pack several"):
        params = beside(*loaded("prefix"))
        transformer.forward(params, INPUTS["input_ids"], SHAPE, segment_ids=jnp.zeros((2, 11), jnp.int32))
