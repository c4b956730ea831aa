"""Data files, texts in rows as TRL 1.16.0 packs them (``tests/data/packing.json``), and supervised learning from them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from jrl.algos import sft
from jrl.lm import data, examples, tokenizer
from jrl.lm.model import decoder
from jrl.lm.scoring import read
from jrl.lm.texts import Corpus, Texts, batch_of, pack, rows_of
from jrl.nets import adapters, moe, transformer

GOLDEN = json.loads((Path(__file__).parent / "data" / "packing.json").read_text())
SEQUENCES = GOLDEN["inputs"]["sequences"]
SHAPE = transformer.Config(vocab_size=20, dim=16, num_layers=2, num_heads=2, num_kv_heads=1)


def corpus_of(sequences):
    tokens = np.concatenate([np.array(x, np.int32) for x in sequences])
    ends = np.cumsum([0, *map(len, sequences)])
    return Corpus(tokens, np.ones(len(tokens), bool), ends)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['strategy']}-{case['seq_length']}")
def test_rows_are_those_of_trl(case):
    corpus, room = corpus_of(SEQUENCES), case["seq_length"]
    rows = rows_of(pack(corpus.lengths, room, case["strategy"]), corpus, room)
    found = [row[there].tolist() for row, there in zip(rows.tokens, rows.segments > 0, strict=True)]
    assert found == case["input_ids"]
    if case["strategy"] != "wrapped":  # whose texts are not told apart there
        segments = [row[row > 0].tolist() for row in rows.segments]
        assert segments == [[x + 1 for x in row] for row in case["sequence_ids"]]
    first = np.diff(np.pad(rows.segments, [(0, 0), (1, 0)])) != 0
    assert not (rows.learned & first).any() and (rows.learned == ((rows.segments > 0) & ~first)).all()


def test_a_row_of_its_own_for_each_text_is_cut_at_its_end():
    corpus = corpus_of([[1, 2, 3], [], [4, 5, 6, 7, 8]])
    rows = rows_of(pack(corpus.lengths, 4, "none"), corpus, 4)
    assert rows.tokens.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]


def test_batches_are_every_row_once_an_epoch_in_orders_that_a_step_tells():
    rows = np.concatenate([batch_of(step, 4, 13, seed=1) for step in range(13)]).reshape(4, 13)  # four epochs
    assert all(sorted(epoch) == list(range(13)) for epoch in rows.tolist()) and rows[0].tolist() != rows[1].tolist()
    few = batch_of(0, 5, 3, 0)
    assert sorted(few[:3]) == [0, 1, 2] and len(few) == 5


# Reading


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    symbols = ["<end>", "<user>", "<assistant>", "<system>", *"abcdefghijklmnop"]
    made = tokenizers.Tokenizer(models.WordLevel({x: i for i, x in enumerate(symbols)}, "<end>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (folder / "tokenizer.json").write_text(made.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    return tokenizer.from_folder(folder)


def says(words, learned):
    return [words.decode([x]) for x, mine in zip(learned.tokens, learned.learned, strict=True) if mine]


def message(role, content):
    return {"role": role, "content": content}


def test_of_chats_the_answers_of_the_assistant_are_learned_with_their_end(words):
    chat = [
        message("system", "a"),
        message("user", "b c"),
        message("assistant", "d"),
        message("user", "e"),
        message("assistant", "f g"),
    ]
    found = examples.learned_from(words, {"messages": chat})
    assert says(words, found) == ["d", "<end>", "f", "g", "<end>"]
    whole = words.encode(words.chat(chat, answer=False))
    assert found.tokens == whole
    pair = examples.learned_from(words, {"prompt": "a b", "completion": "c"})
    assert says(words, pair) == ["c", "<end>"]
    behind = words._replace(template=(words.template or "").replace("<end> ", "<end> p "))
    assert says(words, examples.learned_from(behind, {"messages": chat})) == ["d", "<end>", "f", "g", "<end>"]
    assert says(words, examples.learned_from(words, {"text": "a b"})) == ["a", "b", "<end>"]
    talked = examples.learned_from(words, {"prompt": chat[:2], "completion": [chat[2]]})
    assert says(words, talked) == ["d", "<end>"]


def test_pairs_may_share_their_prompt_in_their_conversations(words):
    first = [message("user", "a")]
    liked, disliked = [message("assistant", "b")], [message("assistant", "c d")]
    apart = examples.pair_of(words, {"prompt": first, "chosen": liked, "rejected": disliked})
    shared = examples.pair_of(words, {"chosen": first + liked, "rejected": first + disliked})
    assert apart == shared and words.decode(apart[2]).split() == ["c", "d", "<end>"]
    texts = examples.pair_of(words, {"chosen": "a b c", "rejected": "a b d e"})
    assert texts == examples.pair_of(words, {"prompt": "a b", "chosen": " c", "rejected": " d e"})


def test_rows_of_several_files_are_told_apart_by_a_mask(tmp_path):
    for name, letters in (("one", "abc"), ("two", "de")):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{x}"}}\n' for x in letters))
    rows = data.read([tmp_path / "one.jsonl", tmp_path / "two.jsonl"], "texts")
    held = np.array([False, True, False, True, False])
    assert [x["text"] for x in rows.kept(held)] == ["b", "d"] and [x["text"] for x in rows.kept(~held)] == [
        "a",
        "c",
        "e",
    ]
    assert rows.kept(held).where(1) == f"{tmp_path / 'two.jsonl'}:1"


def test_a_file_is_read_by_its_lines_and_a_bad_one_is_named(tmp_path, words):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n\n{"prompt": "b", "completion": "c"}\n')
    rows = data.read(path, "texts")
    assert len(rows) == 2 and rows[1] == {"prompt": "b", "completion": "c"} and next(iter(rows)) == {"text": "a"}
    assert data.read([path, path], "texts")[3] == rows[1]
    corpus = examples.tokenized(words, rows)
    assert corpus.lengths.tolist() == [2, 6]  # a prompt becomes a message
    good = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    for kind, line, said in [
        ("pairs", "{", "texts.jsonl:2: the line is no JSON: Expecting property name"),
        ("pairs", "[]", "texts.jsonl:2: a row must be an object; got list"),
        ("pairs", '{"prompt": "a"}', "texts.jsonl:2: chosen, rejected are missing; there are prompt"),
        ("pairs", '{"prompt": "a", "chosen": "b", "rejected": "b"}', "chosen and rejected are the same"),
        ("pairs", '{"prompt": "a", "chosen": ["b"], "rejected": "c"}', "chosen must be a text; got list"),
        ("texts", '{"messages": [{"role": "user", "content": "a"}]}', "none is the assistant's"),
        ("texts", '{"messages": [{"content": "a"}]}', "each message must have a role and a content"),
        ("texts", '{"text": 3}', "text must be a text; got int"),
        ("judged", '{"prompt": "a", "completion": "b", "label": 1}', "label must be true or false; got 1"),
        (
            "steps",
            '{"prompt": "a", "completions": ["b"], "labels": []}',
            "labels must be as many as completions, 1; got []",
        ),
    ]:
        first = {"texts": '{"text": "a"}\n', "judged": '{"prompt": "a", "completion": "b", "label": true}\n',
                 "steps": '{"prompt": "a", "completions": ["b"], "labels": [true]}\n'}.get(kind, good)  # fmt: skip
        path.write_text(first + line + "\n")
        with pytest.raises(ValueError, match=re.escape(said)):
            data.read(path, kind)
    with pytest.raises(ValueError, match=r"nothing.jsonl: No such file"):
        data.read(tmp_path / "nothing.jsonl", "texts")
    path.write_text(
        '{"text": "a"}\n\n{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "none", "content": "b"}]}\n'
    )
    broken = words._replace(template="{{ messages[0].content if messages | length > 1 else 'x' }}")
    with pytest.raises(ValueError, match=r"texts.jsonl:3: the chat template rewrites the prompt"):
        examples.tokenized(broken, data.read(path, "texts"))
    path.write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        data.read(path, "texts")


# Learning


def random_texts(count=6, longest=7):
    draws = np.random.default_rng(0)
    return [draws.integers(1, 20, size=n).tolist() for n in draws.integers(2, longest + 1, size=count)]


@pytest.mark.thorough(1)
@pytest.mark.parametrize("attention", ["dense", "rwkv"])
def test_packed_texts_do_not_see_each_other(attention):
    shape = replace(SHAPE, attention=attention, num_kv_heads=2)
    model, corpus = decoder(shape), corpus_of(random_texts())
    params = model.init(jax.random.key(0))
    apart = rows_of(pack(corpus.lengths, 8, "none"), corpus, 8)
    together = rows_of(pack(corpus.lengths, 16, "bfd"), corpus, 16)
    assert len(together.tokens) < len(apart.tokens)

    def losses(rows, packed):
        found = read(model, params, Texts(*map(jnp.asarray, rows)), packed=packed)
        return np.sort(np.asarray(found.log_prob)[rows.learned])

    np.testing.assert_allclose(losses(together, True), losses(apart, False), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    {"micro_batches": 2}, {"adapter": adapters.Config("lora", rank=2)}, {"model": replace(SHAPE, dense_layers=1, experts=moe.Config(2, expert_dim=8))},
], ids=["micro", "lora", "experts"])  # fmt: skip
def test_learning_from_texts(change):
    config = replace(sft.Config(SHAPE, batch_size=4), **change)
    model = decoder(config.model)
    learning = sft.learner(model, config, packed=True)
    corpus = corpus_of(random_texts(16))
    batch = Texts(*map(jnp.asarray, rows_of(pack(corpus.lengths, 12, "bfd")[:4], corpus, 12)))
    state = learning.init(jax.random.key(0), model.init(jax.random.key(1)), sft.Hyper(learning_rate=0.02))
    first = learning.evaluate(state, batch)
    learn, key = jax.jit(learning.learn), jax.random.key(2)
    seen = []
    for i in range(12):
        state, metrics = learn(state, jax.random.fold_in(key, i), batch)
        seen.append(float(metrics["loss"]))
    np.testing.assert_allclose(seen[0], first["loss"], atol=1e-5)
    assert (
        seen[-1] < (0.97 if config.adapter.kind == "lora" else 0.7) * seen[0] and first["tokens"] == batch.learned.sum()
    )


@pytest.mark.slow
def test_micro_batches_change_no_gradient():
    corpus = corpus_of(random_texts(16))
    batch = Texts(*map(jnp.asarray, rows_of(pack(corpus.lengths, 12, "bfd")[:4], corpus, 12)))

    def learned(parts):
        config = sft.Config(SHAPE, batch_size=4, micro_batches=parts)
        model = decoder(SHAPE)
        learning = sft.learner(model, config, packed=True)
        state = learning.init(jax.random.key(0), model.init(jax.random.key(1)), sft.Hyper())
        return learning.learn(state, jax.random.key(2), batch)

    (one, metrics), (two, again) = learned(1), learned(2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one.params, two.params)
    np.testing.assert_allclose(metrics["loss"], again["loss"], rtol=1e-5)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match=r"config.adapter.kind = prefix is of one text a row: packing must be none"):
        sft.learner(decoder(SHAPE), sft.Config(SHAPE, adapter=adapters.Config("prefix")), packed=True)
    with pytest.raises(ValueError, match=r"config.micro_batches must divide batch_size = 4; got 3"):
        sft.learner(decoder(SHAPE), sft.Config(SHAPE, batch_size=4, micro_batches=3))


def test_a_tokenizer_of_ones_own_writes_every_text_and_knows_conversations(tmp_path):
    found = tokenizer.train(["the cat sat on the mat", "the dog sat on the log"] * 5, 280)
    assert found.vocab_size <= 280 and found.ends == (found.raw.token_to_id("<|end|>"),)
    for text in ("the cat", "Ünï-çödé ☃\n\ttabs", ""):
        assert found.decode(found.encode(text)) == text
    assert len(found.encode("the cat sat")) < len(tokenizer.train(["xyz"], 259).encode("the cat sat")) == 11
    learned = examples.learned_from(found, {"messages": [message("user", "the cat"), message("assistant", "sat")]})
    said = [x for x, mine in zip(learned.tokens, learned.learned, strict=True) if mine]
    assert found.decode(said, special=False) == "sat" and said[-1] in found.ends
    found.save(tmp_path)
    again = tokenizer.from_folder(tmp_path)
    assert again.encode("the mat") == found.encode("the mat") and again.template == found.template
    with pytest.raises(ValueError, match="vocab_size must be an integer of at least 259; got 258"):
        tokenizer.train(["a"], 258)


GOLDEN_STEPS = json.loads((Path(__file__).parent / "data" / "process_steps.json").read_text())  # of TRL 0.24.0


@pytest.mark.parametrize("case", [x for x in GOLDEN_STEPS["outputs"] if x["bos_token_id"] is None and not any(x["args"][y] for y in (
    "max_length", "max_prompt_length", "max_completion_length", "train_on_last_step_only"))], ids=lambda case: case["args"]["step_separator"])  # fmt: skip
def test_labels_of_steps_stand_where_trl_puts_them(case):
    separator = [int(x) for x in case["args"]["step_separator"].split()]
    for row, wanted in zip(GOLDEN_STEPS["features"], case["rows"], strict=True):
        answer, places = examples.joined(row["completions_ids"], row["labels"], separator)
        assert row["prompt_ids"] + answer == wanted["input_ids"]
        labels = [-100] * len(row["prompt_ids"]) + [int(places.get(i, -100)) for i in range(len(answer))]
        assert labels == wanted["labels"]


def test_labelled_rows_are_arrays_and_too_long_ones_are_dropped_or_cut(words):
    rows = [
        {"prompt": "a", "completions": ["b", "c d"], "labels": [True, False]},
        {"prompt": "a b c d", "completions": ["e"], "labels": [True]},
    ]
    found, dropped = examples.stepped(words, rows, "<end>", examples.Fit(5), 0)
    assert dropped == 1 and found.tokens.shape == (1, 5) and found.weight.sum() == 2
    assert found.label[0, found.weight[0] > 0].tolist() == [1, 0]
    cut, dropped = examples.stepped(words, rows, "<end>", examples.Fit(5, 2, "cut"), 0)
    assert dropped == 0 and cut.prompt.shape == (2, 5) and cut.weight.sum(1).tolist() == [1, 1]
    judged, _ = examples.stepped(words, [{"prompt": "a", "completion": "b c", "label": True}], "", examples.Fit(), 0)
    assert judged.weight.tolist() == [[0, 0, 1]] and judged.label.sum() == 1
