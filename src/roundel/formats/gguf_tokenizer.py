"""The tokenizer of a GGUF, and the refusal of those that llama.cpp has no counterpart for.

The tokenizer is the one that Transformers makes of the directory, so that it is the one of our reports. SentencePiece's is known by its
byte tokens: llama.cpp merges the pair whose token has the highest score, so scores are the negative ranks of merges, and any token
that two tokens make up must have a merge. A byte-level one is known by how it splits text into words, for which llama.cpp has names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gguf
from gguf import TokenType
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from roundel.errors import ModelError, damaged

__all__ = ["Vocabulary", "add_tokenizer", "backend_of", "open_tokenizer", "vocabulary_of"]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What `tokenizer.ggml.*` says of tokens and merges; one entry for each row of the embedding."""

    kind: Literal["llama", "gpt2"]
    """SentencePiece with scores, or byte-level with merges."""
    pre: str
    """How text is split into words."""
    tokens: Sequence[str]
    types: Sequence[TokenType]
    scores: Sequence[float] = field(default=())
    merges: Sequence[str] = field(default=())


_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_SPLIT_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_SPLIT_MARKS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


_SPLIT_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_PRE: dict[tuple[str, ...], tuple[str, bool]] = {
    ("words",): ("gpt-2", False),
    ("digits", "words"): ("smollm", False),
    (_SPLIT.format(digits=""), "bytes"): ("qwen2", False),
    (_SPLIT.format(digits="{1,3}"), "bytes"): ("llama-bpe", True),
    (_SPLIT_TEKKEN, "bytes"): ("tekken", True),
    (_SPLIT_MARKS, "bytes"): ("qwen35", False),
    (_SPLIT_O200K, "bytes"): ("gpt-4o", False),
}
"""llama.cpp's name of a way to split text, and whether it takes a word that is a token as that token without a look at the merges."""


def open_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """What Transformers makes of a directory.

    Raises:
        ModelError: it cannot.
    """
    with damaged(ModelError, f"the tokenizer in {model}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    return tokenizer


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Its tokenizer.json.

    Raises:
        ModelError: it has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(f"a {type(tokenizer).__name__} has no tokenizer.json that could be written as GGUF; write another format")
    return backend


def vocabulary_of(text: str, rows: int | None) -> Vocabulary:
    """From a tokenizer.json, for an embedding of so many rows (None: as many as there are tokens)."""
    settings = json.loads(text)
    model = settings["model"]
    if model["type"] != "BPE":
        raise ModelError(f"its tokenizer is a {model['type']} one, and llama.cpp's for these models is BPE; write another format")
    added = {each["id"]: each for each in settings["added_tokens"]}
    known = {number: token for token, number in model["vocab"].items()} | {number: each["content"] for number, each in added.items()}
    rows = max(known) + 1 if rows is None else rows
    if max(model["vocab"].values()) >= rows:
        raise ModelError(f"its tokenizer has {max(model['vocab'].values()) + 1} tokens, and its embedding only {rows} rows")
    unknown = model.get("unk_token")
    spaced = model.get("byte_fallback", False)
    tokens, types = [], []
    for number in range(rows):
        token = known.get(number, f"[PAD{number}]")
        if number not in known:
            kind = TokenType.UNUSED
        elif token == unknown:
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        elif spaced and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        # tokens that users add are looked for before spaces become U+2581
        tokens.append(token.replace("▁", " ") if kind is TokenType.USER_DEFINED and spaced else token)
        types.append(kind)
    merges = [tuple(each) if isinstance(each, list) else tuple(each.split(" ")) for each in model["merges"]]
    if spaced:
        scores = _scores(model["vocab"], merges, {each["content"] for each in added.values()})
        by_row = [scores.get(token, 0.0) for token in tokens]
        return Vocabulary(kind="llama", pre="default", tokens=tokens, types=types, scores=by_row)
    _check_normalizer(settings["normalizer"])
    return Vocabulary(kind="gpt2", pre=_pre(text, settings), tokens=tokens, types=types, merges=[" ".join(each) for each in merges])


def _scores(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, ...]], added: set[str]) -> dict[str, float]:
    """Of the tokens that merges make: minus the rank of the first such merge."""
    ranks: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, -float(rank))
    listed = set(merges)
    for token in vocabulary.keys() - added:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            both = all(part in vocabulary and part not in added for part in (left, right))
            if both and (left, right) not in listed and not re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                raise ModelError(
                    f"its tokenizer never makes {token!r} of {left!r} and {right!r}, and llama.cpp would: a BPE with byte tokens must have "
                    "a merge for every pair of tokens that is a token, as SentencePiece's have; write another format"
                )
    return ranks


def _check_normalizer(normalizer: Mapping[str, Any] | None) -> None:
    steps = [] if normalizer is None else normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    for step in steps:
        if step["type"] != "NFC":
            raise ModelError(f"its tokenizer normalizes text by {step['type']}, which llama.cpp does not; write another format")


def _pre(text: str, settings: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text."""
    steps = tuple(_steps(settings["pre_tokenizer"]))
    if steps not in _PRE:
        names = ", ".join(name for name, _ in _PRE.values())
        raise ModelError(f"its tokenizer splits text by {' then '.join(steps)}: none of those that Roundel knows in llama.cpp ({names})")
    name, whole_words = _PRE[steps]
    if bool(settings["model"].get("ignore_merges")) != whole_words:
        by_merges = Tokenizer.from_str(json.dumps({**settings, "model": {**settings["model"], "ignore_merges": False}})).model
        added = {each["content"] for each in settings["added_tokens"]}
        for token in settings["model"]["vocab"].keys() - added:
            if len(by_merges.tokenize(token)) > 1:
                raise ModelError(f"its tokenizer and llama.cpp's {name} differ in how they treat {token!r}, which no merges lead to")
    return name


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[str]:
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": steps}:
            for step in steps:
                yield from _steps(step)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            yield pattern
        case {"type": "Digits", "individual_digits": True}:
            yield "digits"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": words}:
            yield "words" if words else "bytes"
        case other:
            yield json.dumps(other)


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, config: PreTrainedConfig, model: Path
) -> None:
    """Writes the metadata of a tokenizer whose tokens are `vocabulary`; `model` is the original's directory."""
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_merges(vocabulary.merges)

    ends = _end_ids(config, model)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(ends), None)
    start = next((each for each in (tokenizer.bos_token_id, config.bos_token_id, end) if each is not None), None)
    turn = next((each for each in ends if each != end), None)
    add = (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_eot_token_id, writer.add_unk_token_id, writer.add_pad_token_id)
    for add_id, number in zip(add, (start, end, turn, tokenizer.unk_token_id, tokenizer.pad_token_id), strict=True):
        if number is not None and number < len(vocabulary.tokens):
            add_id(number)

    backend = backend_of(tokenizer)
    alone, whole = (backend.encode("a", add_special_tokens=special) for special in (False, True))
    writer.add_add_bos_token(bool(start is not None and whole.ids[:1] == [start] != alone.ids[:1]))
    writer.add_add_eos_token(bool(end is not None and whole.ids[-1:] == [end] != alone.ids[-1:]))
    writer.add_add_space_prefix(vocabulary.kind == "llama" and alone.tokens[0].startswith("▁"))
    template = tokenizer.chat_template
    if template is not None:
        named = template if isinstance(template, str) else [{"name": key, "template": value} for key, value in template.items()]
        writer.add_chat_template(named)


def _end_ids(config: PreTrainedConfig, model: Path) -> list[int]:
    """Tokens that end a text or a turn, by generation_config.json, else config.json."""
    path = model / "generation_config.json"
    with damaged(ModelError, path):
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    found = config.eos_token_id if found is None else found
    return [] if found is None else found if isinstance(found, list) else [found]
