"""Text in, token sequences out: packed, counted, hashed, nothing dropped silently.

A SPEC is a text file, a `.jsonl` file (field `text` unless `field=NAME`), a directory of such files, `self` (text
sampled from the model itself), `stdlib` (the sources of Python's standard library; `stdlib-heldout` are the modules
that the demo model has never seen), or a Hub dataset, with options after colons:
`name:split=train:config=en:num=1000:field=text`. A conversation in place of text (`messages`, a list of objects with
`role` and `content`) goes through the model's chat template, and a model that has one is asked for a conversation by
`self`. Documents are tokenized and joined, with the tokenizer's end-of-text token between them, into one stream that
is cut into windows of equal length. Where the tokenizer starts every text with a token of its own (Gemma, Llama), so
does every window.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jinja2 import TemplateError
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from roundel.demo.corpus import documents as stdlib_documents
from roundel.errors import DataError
from roundel.store import is_there
from roundel.types import TokenBatch

__all__ = [
    "Fingerprint",
    "Split",
    "cache_of",
    "chat_opening",
    "data_hash",
    "opening_of",
    "read_documents",
    "sample_from_model",
    "set_opening",
    "split_tokens",
    "windows",
]

PIECE = 1 << 16
"""Characters tokenized at a time."""

MESSAGE = "the user's message"
"""Stands for one where only what surrounds it is wanted."""

REFUSALS = (TemplateError, TypeError, ValueError, KeyError)
"""What a chat template raises that does not take a conversation."""

CACHES = ("cache", "past_key_values", "cache_params", "state")
"""Names that Transformers' models have for what they keep of earlier tokens."""

SAMPLES_PER_PASS = 64
"""Sequences sampled together from the model; fixed, so that the samples do not depend on any batch size."""


class Rendered(str):
    """A conversation as the chat template writes it: it ends as the template ends it."""

    __slots__ = ()


def read_documents(spec: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The documents of a SPEC other than `self`; conversations are `Rendered` by the tokenizer's template.

    Raises:
        DataError: there is no such file or dataset, it cannot be read, or an option is unknown; conversations without a template.
    """
    for number, document in enumerate(_documents(spec), 1):
        found = document if isinstance(document, str) else _rendered(document, tokenizer, f"{spec}, document {number}")
        if not _is_unicode(found):
            raise DataError(f"{spec}, document {number}: half of a surrogate pair, which is no text")
        yield found


def _is_unicode(text: str) -> bool:
    """JSON can name characters that do not exist, which tokenizers do not take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _rendered(messages: list[Any], tokenizer: PreTrainedTokenizerBase, where: str) -> Rendered:
    if not tokenizer.chat_template:
        raise DataError(f"{where}: a conversation, but the model's tokenizer has no chat template; give plain text")
    try:
        return Rendered(tokenizer.apply_chat_template(messages, tokenize=False))
    except REFUSALS as error:
        raise DataError(f"{where}: the chat template refuses the conversation: {error}") from error


def _documents(spec: str) -> Iterator[str | list[Any]]:
    path = Path(spec)
    if spec in ("stdlib", "stdlib-heldout"):
        yield from stdlib_documents("calibration" if spec == "stdlib" else "heldout")
    elif is_there(path):
        yield from _path_documents(path)
    else:
        location, options = _parse_options(spec)
        path = Path(location)
        if is_there(path):
            unknown = sorted(set(options) - {"field", "num"})
            if unknown:
                raise DataError(f"option {unknown[0]!r} is for Hub datasets; files take field=NAME and num=N")
            found: Iterator[str | list[Any]] = _path_documents(path, options.get("field", "text"))
            yield from itertools.islice(found, _number(options)) if "num" in options else found
        else:
            yield from _hub_documents(location, options)


def _number(options: dict[str, str]) -> int:
    if not options["num"].isdecimal() or int(options["num"]) < 1:
        raise DataError(f"num={options['num']}: expected a positive number of documents")
    return int(options["num"])


def _parse_options(spec: str) -> tuple[str, dict[str, str]]:
    head, *rest = spec.split(":")
    options: dict[str, str] = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals:
            raise DataError(f"option {part!r} in {spec!r}: expected key=value, such as num=1000")
        options[key] = value
    return head, options


def _path_documents(path: Path, field: str = "text") -> Iterator[str | list[Any]]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in {".txt", ".md", ".jsonl"})
        if not files:
            raise DataError(f"{path} holds no .txt, .md or .jsonl file")
        for file in files:
            yield from _path_documents(file, field)
        return
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _json_text(line, field, f"{path}, line {number}")
        else:
            yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _json_text(line: str, field: str, where: str) -> str | list[Any]:
    try:
        row = json.loads(line)
        field = _field_of(row, field)
        text = row[field]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: expected a JSON object with the key {field!r}; name another with field=NAME") from error
    if not _is_document(text):
        raise DataError(f"{where}: {field!r} is no string and no list of messages")
    return text  # type: ignore[no-any-return]


def _field_of(row: Mapping[str, Any], field: str) -> str:
    """`messages` where that is there and the text that is looked for is not."""
    return "messages" if field == "text" and field not in row and "messages" in row else field


def _is_document(value: object) -> bool:
    """Whether it is text, or a conversation."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)
    return isinstance(value, str)


def _hub_documents(name: str, options: dict[str, str]) -> Iterator[str | list[Any]]:
    known = {"split", "config", "num", "field", "data_files"}
    if set(options) - known:
        raise DataError(f"unknown option {sorted(set(options) - known)[0]!r} in {name!r}: expected {', '.join(sorted(known))}")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"no file {name!r}; to read it as a Hub dataset install the datasets package: pip install 'roundel[data]'"
        ) from error
    field, count = options.get("field", "text"), _number(options) if "num" in options else None
    try:
        rows = load_dataset(
            name, options.get("config"), split=options.get("split", "train"), data_files=options.get("data_files"), streaming=True
        )
        for row in itertools.islice(rows, count):
            own = _field_of(row, field)
            if not _is_document(row.get(own)):
                raise DataError(f"dataset {name!r} has no text in {field!r} but {sorted(row)}; name another with field=NAME")
            yield row[own]
    except DataError:
        raise
    except Exception as error:  # of datasets, its readers and whatever carries the bytes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"no file or directory {name!r}, and no Hub dataset of that name could be read: {reason}") from error


def opening_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer starts every text with, if it does."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer("")["input_ids"] else []


def set_opening(tokenizer: PreTrainedTokenizerBase, token: int) -> None:
    """Lets a tokenizer that starts texts with nothing start them with a token."""
    name = tokenizer.convert_ids_to_tokens(token)
    opening = TemplateProcessing(single=f"{name} $A", pair=f"{name} $A $B", special_tokens=[(name, token)])
    tokenizer.backend_tokenizer.post_processor = opening
    tokenizer.bos_token = name


def windows(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, *, most: int | None = None) -> Tensor:
    """Packs documents into windows `(count, length)`; reads no more documents than `most` windows need.

    Raises:
        DataError: the length leaves no room for text.
    """
    prefix = opening_of(tokenizer)
    body = length - len(prefix)
    if body < 1:
        raise DataError(f"sequences of {length} tokens have no room for text: each begins with {len(prefix)} of the tokenizer's own")
    stream: list[int] = []
    for text in documents:
        if not text.strip():
            continue
        for start in range(0, len(text), PIECE):
            stream += tokenizer(text[start : start + PIECE], add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None and not isinstance(text, Rendered):
            stream.append(tokenizer.eos_token_id)
        if most is not None and len(stream) >= most * body:
            break
    count = len(stream) // body
    count = count if most is None else min(count, most)
    cut = torch.tensor(stream[: count * body], dtype=torch.int64).reshape(count, body)
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(count, -1), cut], dim=1)


@dataclass(frozen=True)
class Split:
    """Sequences to calibrate on, to choose between roundings by, held out from both, and more that give no gradients."""

    calibration: TokenBatch
    choice: TokenBatch
    heldout: TokenBatch
    more: TokenBatch

    @property
    def used(self) -> TokenBatch:
        """Everything that gradients are taken of."""
        return _joined(self.calibration, self.choice)

    @property
    def everything(self) -> TokenBatch:
        """Everything that the codes depend on."""
        return _joined(self.calibration, self.choice, self.more)


def _joined(*parts: TokenBatch) -> TokenBatch:
    names = itertools.chain.from_iterable(part.sequence_ids for part in parts)
    return TokenBatch(ids=torch.cat([part.ids for part in parts]), sequence_ids=tuple(names))


def split_tokens(
    available: Tensor,
    *,
    calibration: int,
    heldout: int,
    seed: int,
    source: str,
    choice: int = 0,
    more: int = 0,
    most: int | None = None,
    known: frozenset[int] | None = None,
) -> Split:
    """Of the first `most` windows the last `heldout` are held out, the same for every seed; `calibration` of the others are drawn by
    `seed`, `choice` of them to choose by. `more` are taken besides, from all others, or as many as there are.

    With `known`, the ids of sequences that factors have seen, those are the calibration sequences instead, and only others serve to choose
    and are held out: the same ones, if the factors were collected with these numbers. None to choose by is a copy of one to calibrate on.

    Raises:
        DataError: there are not enough windows; says how much there is and how much is needed.
    """
    count, length = min(len(available), most or len(available)), available.shape[1]
    if count < calibration + heldout:
        raise DataError(
            f"too little text in {source}: it has {count * length} tokens, {count} sequences of {length}; needed are "
            f"{(calibration + heldout) * length} tokens, {calibration} sequences to calibrate and {heldout} held out; "
            "give more text, or smaller --sequences, --eval-sequences or --seq-len"
        )
    ids = TokenBatch.of(available).sequence_ids
    drawn = torch.randperm(count - heldout, generator=torch.Generator().manual_seed(seed)).tolist()
    last = list(range(count - heldout, count))
    if known is None:
        fit = drawn[: calibration - choice]
        seen = {ids[row] for row in fit}
        rest = [row for row in drawn if ids[row] not in seen][:choice]
    else:
        fit = [row for row in range(count) if ids[row] in known]
        unseen = [row for row in drawn + last if ids[row] not in known]
        if len(unseen) < heldout:
            raise DataError(f"{source} has fewer than {heldout} sequences that the factors have not seen; give other text with --eval-data")
        rest = unseen[: min(choice, len(unseen) - heldout)]
        left = sorted(unseen[len(rest) :])
        last = left[len(left) - heldout :]
    taken = {ids[row] for row in (*fit, *rest, *last)}
    others = [row for row in (*drawn, *range(count, len(available))) if ids[row] not in taken][:more]
    return Split(*(TokenBatch.of(available[sorted(rows)]) for rows in (fit, rest, last, others)))


def chat_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a chat template writes before a user's message; none without a template."""
    if not tokenizer.chat_template:
        return []
    try:
        before = str(tokenizer.apply_chat_template([{"role": "user", "content": MESSAGE}], tokenize=False)).partition(MESSAGE)[0]
    except REFUSALS:  # one that wants more than that
        return []
    return list(tokenizer(before, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def cache_of(model: nn.Module) -> str | None:
    """By which name the model gives and takes what it keeps of earlier tokens; None: all tokens have to be run again for each new one.

    Tried on three tokens, since architectures differ in names and in what they keep, and some cannot be given it back.
    """
    tried = torch.arange(3)[None].to(next(model.parameters()).device) % model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    whole = model(input_ids=tried, use_cache=False).logits[:, -1]
    for name in CACHES:
        with suppress(Exception):  # whatever an architecture raises
            kept = model(input_ids=tried[:, :2], use_cache=True)[name]
            last = model(input_ids=tried[:, 2:], use_cache=True, **{name: kept}).logits[:, -1]
            if torch.allclose(last, whole, rtol=0, atol=0.05 * float(whole.abs().max())):
                return name
    return None


@torch.no_grad()
def sample_from_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    *,
    seed: int,
    advance: Callable[[int], None] = lambda _n: None,
) -> Tensor:
    """Windows `(count, length)` of text sampled from the model at temperature 1, each from a generator of its own.

    Each starts with what the chat template writes before a user's message, else the tokenizer's beginning-of-text token, or else a token
    drawn uniformly. (That an instructed model writes the user's message, too: Xu et al., Magpie, arXiv 2406.08464.)
    """
    opening = chat_opening(tokenizer)[:length]
    device = next(model.parameters()).device
    name = cache_of(model)
    rows = []
    for first in range(0, count, SAMPLES_PER_PASS):
        generators = [np.random.default_rng((seed, k)) for k in range(first, min(first + SAMPLES_PER_PASS, count))]
        vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        bos = tokenizer.bos_token_id
        starts = [opening[0] if opening else int(g.integers(vocabulary)) if bos is None else bos for g in generators]
        ids = torch.tensor(starts)[:, None]
        kept: dict[str, Any] = {}
        for _ in range(length - 1):
            out = model(input_ids=(ids[:, -1:] if kept else ids).to(device), use_cache=name is not None, **kept)
            kept = {} if name is None else {name: out[name]}
            if ids.shape[1] < len(opening):
                ids = torch.cat([ids, torch.full_like(ids[:, :1], opening[ids.shape[1]])], dim=1)
                continue
            cumulative = out.logits[:, -1].float().softmax(-1).cumsum(-1, dtype=torch.float64).cpu()
            uniform = torch.tensor([[g.random()] for g in generators], dtype=torch.float64)
            following = torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).clamp_(max=vocabulary - 1)
            ids = torch.cat([ids, following], dim=1)
        rows.append(ids)
        advance(len(generators))
    return torch.cat(rows)


def data_hash(tokens: TokenBatch) -> str:
    """SHA-256 of the token ids as little-endian 32-bit integers, and of their shape."""
    digest = hashlib.sha256(str(tuple(tokens.ids.shape)).encode())
    digest.update(tokens.ids.numpy().astype("<i4").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Hashes of all 32-token windows of some text, thinned to one in `modulus`: enough to see later whether other text overlaps with it."""

    hashes: frozenset[int]
    modulus: int

    WINDOW: ClassVar[int] = 32

    @classmethod
    def of(cls, tokens: TokenBatch, modulus: int = 1) -> Fingerprint:
        """Fingerprint of every sequence's windows at every offset, none across sequences."""
        ids = tokens.ids.numpy().astype(np.uint64)
        if ids.shape[1] < cls.WINDOW:
            return cls(hashes=frozenset(), modulus=modulus)
        generator = np.random.default_rng(260)
        weights = generator.integers(1, 2**63, cls.WINDOW, dtype=np.uint64) | np.uint64(1)
        width = ids.shape[1] - cls.WINDOW + 1
        total = np.zeros((ids.shape[0], width), dtype=np.uint64)
        for k in range(cls.WINDOW):
            total += ids[:, k : k + width] * weights[k]
        total ^= total >> np.uint64(29)
        values = np.unique(total)
        return cls(hashes=frozenset(values[values % np.uint64(modulus) == 0].tolist()), modulus=modulus)

    def thinned(self, modulus: int) -> Fingerprint:
        """One hash in `modulus` of it."""
        return Fingerprint(hashes=frozenset(h for h in self.hashes if h % modulus == 0), modulus=modulus)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"modulus": self.modulus, "hashes": sorted(self.hashes)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Fingerprint:
        """Inverse of `as_json`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        hashes, modulus = frozenset(map(int, stored["hashes"])), int(stored["modulus"])
        if not 0 < modulus < 1 << 63 or not all(0 <= value < 1 << 64 for value in hashes):
            raise ValueError("a hash or their modulus is no number of 64 bits")
        return cls(hashes=hashes, modulus=modulus)

    def overlap(self, other: Fingerprint) -> float:
        """The fraction of this text's windows that the other text has too."""
        modulus = math.lcm(self.modulus, other.modulus)
        mine, theirs = self.thinned(modulus).hashes, other.thinned(modulus).hashes
        return len(mine & theirs) / len(mine) if mine else 0.0
