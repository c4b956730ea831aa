"""Text to tokens and back, by a model's own tokenizer, and conversations as the text that the model knows them by.

tokenizer = from_folder("SmolLM2-135M-Instruct")        Hugging Face's files; or from_gguf("....gguf")
ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": "Hi"}]))
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from gguf import GGUFReader
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jrl.lm import gguf, templates
from jrl.lm.hf import read_json
from jrl.numerics import checks

Message = Mapping[str, Any]
# Hugging Face's files. The last one names the tokens that end an answer, and is of the model.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


class Tokenizer(NamedTuple):
    """A model's tokenizer.

    Attributes:
        raw: of the ``tokenizers`` library.
        special: texts of the special tokens by their role: ``eos_token``, ``bos_token`` and the like.
        template: of conversations, in Jinja; None if the model has none.
        vocab_size: one more than the largest id that it knows (a model's table may be longer).
        bos: first token of a sequence, or None.
        eos: last token of an answer, or None.
        pad: filler; ``eos`` where the model has none of its own.
        ends: all tokens that end an answer, ``eos`` first.
        files: names and texts of the files that hold it in Hugging Face's layout.
        stops: texts behind which an answer ends, too (``stop_strings`` of ``generation_config.json``).
    """

    raw: tokenizers.Tokenizer
    special: Mapping[str, str]
    template: str | None
    vocab_size: int
    bos: int | None
    eos: int | None
    pad: int | None
    ends: tuple[int, ...]
    files: Mapping[str, str]
    stops: tuple[str, ...] = ()

    def save(self, folder: str | Path) -> None:
        """Write the files into a folder, in place of another tokenizer's."""
        for name in FILES:
            (Path(folder) / name).unlink(missing_ok=True)
        for name, text in self.files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")

    def encode(self, text: str, *, begin: bool = False) -> list[int]:
        """Tokens of the text; special tokens written in it are tokens.

        ``begin`` adds what the model's tokenizer puts around a text (``bos`` with some models), which ``chat`` has written already.
        """
        return self.raw.encode(text, add_special_tokens=begin).ids

    def decode(self, tokens: Sequence[int], *, special: bool = True) -> str:
        """Text of the tokens; ``special=False`` leaves special tokens out."""
        return self.raw.decode([int(x) for x in tokens], skip_special_tokens=not special)

    def chat(self, messages: Sequence[Message], *, answer: bool = True, **more: Any) -> str:
        """The conversation as text: messages have ``role`` and ``content``; ``answer`` opens the assistant's next one.

        ``more`` goes to the template, and is of JSON's kinds. Raises ``ValueError`` where there is no template, or as
        ``templates.render`` does.
        """
        if self.template is None:
            raise ValueError("this tokenizer has no chat template")
        given = {"tools": None, "documents": None, **self.special, **more}
        return templates.render(
            self.template, {"messages": list(map(dict, messages)), "add_generation_prompt": answer, **given}
        )


# Hugging Face's files


def from_folder(folder: str | Path) -> Tokenizer:
    """Of ``tokenizer.json``, with ``tokenizer_config.json``, ``special_tokens_map.json`` and ``chat_template.jinja`` if there are.

    Answers end with its ``eos_token``, and with ``eos_token_id`` of ``generation_config.json``, or of ``config.json`` where there is
    none. Raises ``ValueError`` for a file that is missing or damaged.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        raw = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"{path} is damaged: {error}") from None
    raw.no_truncation()
    raw.no_padding()
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        found |= read_json(folder / name) if (folder / name).is_file() else {}
    special = {name: _text(x) for name, x in found.items() if name.endswith("_token") and _text(x) is not None}
    known = {x.content for x in raw.get_added_tokens_decoder().values()}
    plain = [x for x in special.values() if x not in known and raw.token_to_id(x) is not None]
    raw.add_special_tokens([AddedToken(x, normalized=False, special=True) for x in plain])
    files = {name: _read(folder / name) for name in FILES if (folder / name).is_file()}
    made = _tokenizer(raw, special, _template(folder, found), _ends(folder), files, str(folder))
    return made._replace(stops=_stops(folder))


def _read(path: Path) -> str:
    """The text of a file; ``ValueError`` with its name if it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _ends(folder: Path) -> list[int]:
    """The tokens that end an answer by the model's configuration."""
    path = next(
        (folder / name for name in ("generation_config.json", "config.json") if (folder / name).is_file()), None
    )
    ends = None if path is None else read_json(path).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in ends):
        raise ValueError(f"{path}: eos_token_id must be a token's id, or a list of them; got {ends}")
    return ends


def _stops(folder: Path) -> tuple[str, ...]:
    path = folder / "generation_config.json"
    stops = read_json(path).get("stop_strings") if path.is_file() else None
    stops = [stops] if isinstance(stops, str) else stops or []
    if not isinstance(stops, list) or not all(isinstance(x, str) and x for x in stops):
        raise ValueError(f"{path}: stop_strings must be a text, or a list of them; got {stops!r}")
    return tuple(stops)


def _text(token: Any) -> Any:
    """Of a special token, which may be written as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _template(folder: Path, found: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read(path)
    path = folder / "chat_template.json"
    template = (read_json(path) if path.is_file() else found).get("chat_template")
    if isinstance(template, list):  # several, by name
        if not template or not all(isinstance(x, dict) and {"name", "template"} <= x.keys() for x in template):
            raise ValueError(
                f"{folder}: each of several chat templates must have a name and a template; got {template!r}"
            )
        template = next((x["template"] for x in template if x["name"] == "default"), None)
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder}: chat_template must be a text; got {template!r}")
    return template


def _tokenizer(
    raw: tokenizers.Tokenizer,
    special: Mapping[str, str],
    template: str | None,
    ends: Sequence[int],
    files: Mapping[str, str],
    where: str,
) -> Tokenizer:
    ids = {name: raw.token_to_id(text) for name, text in special.items()}
    for name in ("bos_token", "eos_token", "pad_token"):
        if name in special and ids[name] is None:
            raise ValueError(f"{where}: {name} {special[name]!r} is not a token")
    bos, eos, pad = (ids.get(name) for name in ("bos_token", "eos_token", "pad_token"))
    size = 1 + max(raw.get_vocab(with_added_tokens=True).values(), default=-1)
    ends = tuple(dict.fromkeys(x for x in (eos, *ends) if x is not None))
    if any(x >= size for x in ends):
        raise ValueError(f"{where}: eos_token_id must be below {size}, the tokenizer's vocabulary; got {max(ends)}")
    return Tokenizer(raw, special, template, size, bos, eos, eos if pad is None else pad, ends, files)


# Training

END_TOKEN, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer (Sennrich et al. 2015, 1508.07909; on bytes as in GPT-2) of so many tokens, trained on texts.

    Among them are the 256 bytes, so that every text can be written, the end token ``<|end|>``, and ``<|user|>`` and ``<|assistant|>`` of conversations,
    whose template is simple. Raises ``ValueError`` for fewer tokens than these.
    """
    special = [END_TOKEN, USER, ASSISTANT]
    checks.positive_int("vocab_size", vocab_size, at_least=256 + len(special))
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    named = {"eos_token": END_TOKEN}
    files = {"tokenizer.json": raw.to_str(), "tokenizer_config.json": json.dumps(named | {"chat_template": TEMPLATE})}
    return _tokenizer(raw, named, TEMPLATE, [], files, "a tokenizer that was trained")


# GGUF

# What splits a text into words, by tokenizer.ggml.pre.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, Callable[[], list[Any]]] = {
    "gpt-2": lambda: [_split(GPT2)],
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), _split(GPT2)],
    "qwen2": lambda: [_split(WORDS % "")],
    "llama-bpe": lambda: [_split(WORDS % "{1,3}")],
}
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def from_gguf(path: str | Path | GGUFReader) -> Tokenizer:
    """Of the tokens and merges in a GGUF file, or of what ``gguf.read`` gave. Raises ``ValueError`` for a kind of tokenizer that is not read."""
    reader = gguf.read(path)
    try:
        return _of_metadata(reader)
    except Exception as error:  # metadata of a damaged file may be of any kind
        raise ValueError(f"{reader.data.filename}: {error}") from None


def _of_metadata(reader: GGUFReader) -> Tokenizer:
    def get(name, *default):
        return gguf.metadata(reader, f"tokenizer.{name}", *default)

    checks.one_of("tokenizer.ggml.model", get("ggml.model"), ["gpt2"])
    kind = get("ggml.pre")
    checks.one_of("tokenizer.ggml.pre", kind, SPLITS)
    tokens, merges = get("ggml.tokens"), [tuple(x.split(" ", 1)) for x in get("ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    raw = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=kind == "llama-bpe"))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=bool(get("ggml.add_space_prefix", False)), use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([*SPLITS[kind](), bytes_only])
    raw.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        raw.normalizer = normalizers.NFC()
    types = get("ggml.token_type", [1] * len(tokens))
    for token, said in zip(tokens, types, strict=True):
        if said in (CONTROL, USER_DEFINED):
            raw.add_tokens([AddedToken(token, normalized=False, special=said == CONTROL)])
    ids = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
    found = {name: get(f"ggml.{key}", None) for name, key in ids.items()}
    special = {name: tokens[i] for name, i in found.items() if i is not None}
    if get("ggml.add_bos_token", False) and "bos_token" in special:
        bos = (special["bos_token"], found["bos_token"])
        raw.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    template, more = get("chat_template", None), [get(f"ggml.{name}_token_id", None) for name in ("eot", "eom")]
    files = {
        "tokenizer.json": raw.to_str(),
        "tokenizer_config.json": json.dumps(special | ({} if template is None else {"chat_template": template})),
    }
    return _tokenizer(raw, special, template, [x for x in more if x is not None], files, "its tokenizer")
