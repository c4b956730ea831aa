"""A model and its tokenizer agree: on how many ids there are, on the tokens that end an answer, and after both are saved."""

import json
import re

import gguf as gguf_package
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from jrl import lm
from jrl.lm import hf, judging, templates, tokenizer
from jrl.lm.model import decoder
from jrl.lm.sampling import Rollout, Support, sample
from jrl.lm.scoring import score
from jrl.nets import transformer

SYMBOLS = ["<end>", "<turn>", "a", "b", "c"]
SHAPE = transformer.Config(vocab_size=8, dim=16, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=16)
TEMPLATE = "{{ messages[0].content }}"


@pytest.fixture
def folder(tmp_path):
    """A model with three rows more than its tokenizer has ids, whose answers end with either of two."""
    folder = tmp_path / "model"
    hf.save(folder, SHAPE, transformer.init(jax.random.key(0), SHAPE), more={"eos_token_id": 4})
    raw = tokenizers.Tokenizer(models.WordLevel({x: i for i, x in enumerate(SYMBOLS)}, "<end>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", {"eos_token": "<end>", "model_max_length": 99})
    write(folder / "generation_config.json", {"eos_token_id": [1, 0]})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write(path, found):
    path.write_text(json.dumps(found))


def test_a_tokenizer_with_ids_beyond_the_table_is_refused(folder):
    config, params, words = lm.load(folder)
    assert (config.vocab_size, words.vocab_size) == (8, 5)
    words.raw.add_tokens([f"new{i}" for i in range(4)])
    words.raw.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="the tokenizer's ids go up to 8, and the model's table has 8 rows"):
        lm.load(folder)
    with pytest.raises(ValueError, match="the tokenizer's ids go up to 8"):
        lm.save(folder, config, params, tokenizer.from_folder(folder))


@pytest.mark.parametrize(
    "found, ends, message",
    [
        ({"eos_token_id": [1, 0]}, (0, 1), None),
        ({"eos_token_id": 3}, (0, 3), None),
        ({}, (0,), None),
        (None, (0, 4), None),  # then config.json tells
        ({"eos_token_id": 7}, None, "eos_token_id must be below 5, the tokenizer's vocabulary; got 7"),
        ({"eos_token_id": ["<end>"]}, None, "eos_token_id must be a token's id, or a list of them; got .'<end>'."),
    ],
)
def test_the_tokens_that_end_an_answer(found, ends, message, folder):
    path = folder / "generation_config.json"
    path.unlink()
    if found is not None:
        write(path, found)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            lm.load(folder)
    else:
        assert lm.load(folder)[2].ends == ends


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("chat_template.jinja", b"\xff", "chat_template.jinja is damaged"),
        (
            "chat_template.json",
            b'{"chat_template": 1}',
            "chat_template must be a text; got 1",
        ),
        (
            "chat_template.json",
            b'{"chat_template": [1]}',
            "each of several chat templates must have a name and a template",
        ),
        (
            "chat_template.json",
            b'{"chat_template": [{"name": []}]}',
            "each of several chat templates must have a name and a template",
        ),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json is damaged"),
        ("tokenizer_config.json", b'{"eos_token": "\\ud800"}', "tokenizer_config.json is damaged"),
        ("tokenizer.json", b"{}", "tokenizer.json is damaged"),
        ("generation_config.json", b'{"eos_token_id": true}', "eos_token_id must be a token's id"),
    ],
)
def test_a_damaged_file_of_a_tokenizer_is_named(name, content, message, folder):
    if name == "chat_template.json":
        (folder / "chat_template.jinja").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{folder}.*{message}"):
        lm.load(folder)


@pytest.mark.parametrize("name", ["eot", "eom"])
def test_gguf_names_the_end_of_a_turn(name, tmp_path):
    writer = gguf_package.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*SYMBOLS, "ab"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_uint32(f"tokenizer.ggml.{name}_token_id", 1)
    writer.add_chat_template(TEMPLATE)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    words = tokenizer.from_gguf(tmp_path / "x.gguf")
    assert (words.eos, words.ends) == (0, (0, 1))
    lm.save(tmp_path / "saved", SHAPE, transformer.init(jax.random.key(0), SHAPE), words)
    again = lm.load(tmp_path / "saved")[2]
    assert (again.ends, again.template, again.special) == (words.ends, TEMPLATE, words.special)
    assert again.encode("abc") == words.encode("abc")


def test_what_is_saved_is_what_was_loaded(folder, tmp_path):
    config, params, words = lm.load(folder)
    other = tmp_path / "other"
    lm.save(other, config, params, words)
    write(other / "special_tokens_map.json", {"eos_token": "<turn>"})  # of another tokenizer
    lm.save(other, config, params, words)
    again, loaded, read = lm.load(other)
    assert again == config and read.ends == words.ends and read.chat([{"content": "a b"}]) == "a b"
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert read.encode("a b c") == words.encode("a b c") == [2, 3, 4]
    assert read.files == words.files and not (other / "special_tokens_map.json").exists()
    assert json.loads(read.files["tokenizer_config.json"])["model_max_length"] == 99


@pytest.mark.parametrize(
    "found, message",
    [
        ({"chat_template": 5}, "chat_template must be a text; got 5"),
        ({"chat_template": []}, "each of several chat templates must have a name and a template"),
        ({"chat_template": [5]}, "each of several chat templates must have a name and a template"),
        ({"chat_template": [{"name": "default"}]}, "each of several chat templates must have a name and a template"),
        ({"chat_template": [{"name": "default", "template": 5}]}, "chat_template must be a text; got 5"),
    ],
)
def test_a_tokenizer_with_settings_of_another_kind_is_refused(found, message, folder):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    write(folder / "tokenizer_config.json", found)
    with pytest.raises(ValueError, match=message):
        tokenizer.from_folder(folder)


def test_an_end_token_that_is_no_number_is_refused(folder):
    write(folder / "generation_config.json", {"eos_token_id": True})
    with pytest.raises(ValueError, match="eos_token_id must be a token's id"):
        tokenizer.from_folder(folder)


@pytest.mark.parametrize("support", [Support(), Support(top_p=0.9)])
def test_ids_that_no_tokenizer_knows_are_never_sampled_and_have_no_probability(support, folder):
    config, params, words = lm.load(folder)
    params["embedding"] = params["embedding"].at[5:].mul(50)  # which would be sampled nearly always
    model = decoder(config, tokens=words.vocab_size)
    prompt = jnp.full((64, 2), 2)

    @jax.jit
    def both(key, params):
        rollout = sample(key, model, params, prompt, length=4, end=words.ends, support=support)
        grad = jax.grad(lambda p: score(model, p, prompt, rollout, support=support, reference=params).entropy.sum())(
            params
        )
        return rollout, score(model, params, prompt, rollout, support=support, reference=params), grad

    rollout, scored, grad = both(jax.random.key(0), params)
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    assert tokens.max() < 5 and len(np.unique(tokens[mask])) > 2
    np.testing.assert_allclose(scored.log_prob[mask], rollout.log_prob[mask], atol=1e-5)
    assert (np.asarray(scored.entropy) < np.log(5) + 1e-5).all() and np.isfinite(scored.kl).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grad))
    # Either end token ends an answer, and nothing else does before its length.
    ends = np.isin(tokens, words.ends) & mask
    assert ends.any(1).any() and {0, 1} <= set(tokens[ends].tolist())
    assert (mask[:, 1:] == (mask[:, :-1] & ~ends[:, :-1])).all()


def test_a_decoder_knows_no_more_tokens_than_it_has():
    with pytest.raises(ValueError, match="tokens must be between 1 and 8; got 9"):
        decoder(SHAPE, tokens=9)


def test_a_raw_key_samples_as_a_typed_one(folder):
    config, params, words = lm.load(folder)
    prompt = jnp.full((3, 2), 2)
    run = jax.jit(lambda key: sample(key, decoder(config), params, prompt, length=3, end=words.ends).tokens)
    raw, typed = jax.random.PRNGKey(7), jax.random.key(7)
    np.testing.assert_array_equal(run(raw), run(typed))
    assert jax.eval_shape(run, jax.random.split(raw, 3)).shape == (3, 3)  # one a row


# Chat templates, which are programs of whoever wrote the file

HELLO = {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": True}
DOUBLING = (
    "{%% set n = namespace(x=%s) %%}{%% for i in range(90) %%}{%% set n.x = n.x %s n.x %%}{%% endfor %%}{{ n.x }}"
)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('no') }}", "refuses: no"),
        ("{{ messages.__class__.__mro__ }}", "refuses: access to attribute '__class__'"),
        ("{% for", "refuses: unexpected 'end of template'"),
        ("{% include 'a' %}", "fails: TypeError: no loader"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ 'a' * 10**10 }}", "fails: it takes more than 1 GiB of memory"),
        ("{{ '%10000000000d' % 1 }}", "fails: it takes more than 1 GiB of memory"),
        ("{{ 'a' | center(10**10) }}", "fails: it takes more than 1 GiB of memory"),
        ("{{ 'a'.ljust(10**10) }}", "fails: it takes more than 1 GiB of memory"),
        (DOUBLING % ("['a']", "+"), "fails: it takes more than 1 GiB of memory"),
        ("{{ 'a' * 10**8 }}", "fails: it writes 100,000,000 characters, more than 10,000,000"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: it is nested too deep"),
        ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "fails: it is nested too deep"),
        ("{{" + "(" * 5000 + ")" * 5000 + "}}", "fails: it is nested too deep"),
        ("{{ range(10**10) | list }}", "fails: OverflowError: Range too big"),
    ],
)
def test_a_chat_template_can_do_no_harm(template, message):
    with pytest.raises(ValueError, match=f"^the chat template {re.escape(message)}"):
        templates.render(template, HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        DOUBLING % ("99", "*"),
    ],
)
def test_a_chat_template_without_end_is_stopped(template, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"^the chat template fails: it is not done after 0\.2 s$"):
        templates.render(template, HELLO)


def test_a_chat_template_that_failed_can_be_tried_again():
    template = "{{ 1 / (messages | length - 1) }}"
    for messages, text in (([], "-1.0"), ([1], None), ([1, 2], "1.0")):
        if text is None:
            with pytest.raises(ValueError, match="ZeroDivisionError"):
                templates.render(template, {"messages": messages})
        else:
            assert templates.render(template, {"messages": messages}) == text
    for _ in range(2):
        with pytest.raises(ValueError, match="unknown tag 'nope'"):
            templates.render("{% nope %}", HELLO)


def test_stop_strings_of_the_model_are_known_and_cut_answers(folder):
    (folder / "generation_config.json").write_text(json.dumps({"stop_strings": ["b c"]}))
    words = tokenizer.from_folder(folder)
    assert words.stops == ("b c",)
    tokens = jnp.asarray([words.encode("a b c a"), words.encode("a a b b")])
    said = Rollout(tokens, jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape), None)
    found = judging.stopped(words, said, words.stops)
    assert found.mask.sum(1).tolist() == [3, 4] and judging.texts_of(words, found)[0] == "a b c"
    (folder / "generation_config.json").write_text(json.dumps({"stop_strings": [1]}))
    with pytest.raises(ValueError, match="stop_strings must be a text, or a list of them"):
        tokenizer.from_folder(folder)
