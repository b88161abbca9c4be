"""Text in, token sequences out."""

import hashlib
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from oracles.tiny import label_gradient, random_tokens, tiny_llama
from roundel import calibration
from roundel.calibration import Fingerprint, chat_opening, data_hash, read_documents, sample_from_model, split_tokens, windows
from roundel.errors import DataError
from roundel.types import TokenBatch

WORDS = 200


def word_tokenizer(*, bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """Word `wK` is token `K + 3`."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{k}": k + 3 for k in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>" if eos else None)


def text(*words: int) -> str:
    return " ".join(f"w{k}" for k in words)


def batch(ids: torch.Tensor) -> TokenBatch:
    return TokenBatch(ids=ids, sequence_ids=tuple(range(len(ids))))


# Packing


@given(
    documents=st.lists(st.lists(st.integers(0, WORDS - 1), max_size=9), min_size=1, max_size=12),
    length=st.integers(2, 7),
    bos=st.booleans(),
    eos=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_packing_drops_nothing_but_the_last_part_of_a_window(documents: list[list[int]], length: int, bos: bool, eos: bool) -> None:
    stream = [token for document in documents if document for token in [*(w + 3 for w in document), *([2] if eos else [])]]
    found = windows((text(*d) for d in documents), word_tokenizer(bos=bos, eos=eos), length)
    body = length - bos
    assert found.dtype == torch.int64
    assert found.shape == (len(stream) // body, length)
    assert (found[:, :bos] == 1).all()
    assert found[:, bos:].flatten().tolist() == stream[: len(stream) // body * body]


def test_every_token_of_every_short_document_appears() -> None:
    found = windows((text(k) for k in range(WORDS)), word_tokenizer(), 8)
    assert set(range(3, WORDS + 3)) <= set(found.flatten().tolist())


def test_long_documents_are_tokenized_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    document = text(*range(100, 150))
    whole = windows([document], word_tokenizer(), 5)
    monkeypatch.setattr(calibration, "PIECE", len(text(100, 101)) + 1)
    assert torch.equal(windows([document], word_tokenizer(), 5), whole)


def test_no_more_documents_are_read_than_needed() -> None:
    def documents():
        yield text(*range(10))
        yield text(*range(10))
        pytest.fail("read too far")

    assert windows(documents(), word_tokenizer(), 5, most=4).shape == (4, 5)


def test_no_text_gives_no_window() -> None:
    assert windows(["", "  \n"], word_tokenizer(bos=True), 4).shape == (0, 4)


# Reading


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n\nsecond", encoding="utf-8")
    assert list(read_documents(str(tmp_path / "a.txt"), word_tokenizer())) == ["first\n\nsecond"]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"t{k}", "body": f"b{k} ä"} for k in range(3)]
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", ["t0", "t1", "t2"]),
        (":num=2", ["t0", "t1"]),
        (":num=9", ["t0", "t1", "t2"]),
        (":field=body", ["b0 ä", "b1 ä", "b2 ä"]),
        (":field=body:num=1", ["b0 ä"]),
    ],
)
def test_jsonl_with_options(jsonl: Path, options: str, expected: list[str]) -> None:
    assert list(read_documents(f"{jsonl}{options}", word_tokenizer())) == expected


TURN = "w1{{ turn.role | replace('user', ' w2') | replace('assistant', ' w3') }} {{ turn.content }} </s> "
TEMPLATE = f"{{% for turn in messages %}}{TURN}{{% endfor %}}"
TURNS = [{"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w12"}]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"messages": TURNS}, {"text": "w20"}, {"messages": TURNS[:1], "text": "w21"}, {"dialog": TURNS[:1]}]
    path.write_text("\n".join(map(json.dumps, rows[:3])), encoding="utf-8")
    whole = "w1 w2 w10 w11 </s> w1 w3 w12 </s> "
    assert list(read_documents(str(path), chat_tokenizer())) == [whole, "w20", "w21"]
    assert list(read_documents(f"{path}:field=messages:num=1", chat_tokenizer())) == [whole]
    found = windows(read_documents(str(path), chat_tokenizer()), chat_tokenizer(), 13)
    # the conversation ends as its template ends it, text with the end-of-text token
    assert found.tolist() == [[4, 5, 13, 14, 2, 4, 6, 15, 2, 23, 2, 24, 2]]
    path.write_text(json.dumps(rows[3]), encoding="utf-8")
    assert list(read_documents(f"{path}:field=dialog", chat_tokenizer())) == ["w1 w2 w10 w11 </s> "]


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"messages": TURNS}, None, "document 1: a conversation, but the model's tokenizer has no chat template; give plain text"),
        ({"messages": TURNS}, "{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
        ({"messages": TURNS}, "{% if", "document 1: the chat template refuses the conversation"),
        ({"messages": []}, TEMPLATE, "'messages' is no string and no list of messages"),
        ({"messages": [{"role": "user"}]}, TEMPLATE, "'messages' is no string and no list of messages"),
    ],
)
def test_what_is_no_conversation_is_refused(row, template, message, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        list(read_documents(str(tmp_path / "a.jsonl"), tokenizer))


def test_a_directory_is_all_its_text_files_in_order(tmp_path: Path, jsonl: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, content in (("b.txt", "B"), ("sub/c.md", "C"), ("ignored.bin", "X"), ("ignored.py", "X")):
        (tmp_path / name).write_text(content)
    assert list(read_documents(str(tmp_path), word_tokenizer())) == ["t0", "t1", "t2", "B", "C"]
    assert list(read_documents(f"{tmp_path}:num=1", word_tokenizer())) == ["t0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (":num=0", "num=0: expected a positive number"),
        (":num=x", "num=x: expected a positive number"),
        (":num", "expected key=value"),
        (":split=train", "'split' is for Hub datasets"),
        (":files=2", "'files'"),
        (":field=title", r"line 1: expected a JSON object with the key 'title'"),
    ],
)
def test_wrong_options_are_refused(jsonl: Path, options: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_documents(f"{jsonl}{options}", word_tokenizer()))


@pytest.mark.parametrize("line", ["not json", "[1]", '"text"', '{"text": 1}', '{"text": null}', "{}"])
def test_a_wrong_json_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: "):
        list(read_documents(str(tmp_path / "a.jsonl"), word_tokenizer()))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_documents(str(tmp_path / name), word_tokenizer()))


def test_a_directory_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.txt"):
        list(read_documents(str(tmp_path), word_tokenizer()))


def test_unknown_options_of_a_dataset_are_refused_before_any_download() -> None:
    with pytest.raises(DataError, match="unknown option 'sample'"):
        list(read_documents("no/such-file.txt:sample=3", word_tokenizer()))


# Splitting


def test_the_heldout_windows_are_the_last_and_never_calibrated_on() -> None:
    available = torch.arange(60).reshape(20, 3)
    first, second = (split_tokens(available, calibration=8, heldout=5, seed=seed, source="x") for seed in (0, 1))
    assert torch.equal(first.heldout.ids, available[15:])
    assert torch.equal(second.heldout.ids, available[15:])
    assert first.heldout.sequence_ids == TokenBatch.of(available[15:]).sequence_ids
    assert first.calibration.sequence_ids != second.calibration.sequence_ids
    for split in (first, second):
        assert len(set(split.calibration.sequence_ids)) == 8
        windows_of = {sequence: row for row, sequence in enumerate(TokenBatch.of(available[:15]).sequence_ids)}
        chosen = [windows_of[sequence] for sequence in split.calibration.sequence_ids]
        assert chosen == sorted(chosen)
        assert torch.equal(split.calibration.ids, available[chosen])


def test_too_little_text_says_what_there_is_and_what_is_needed() -> None:
    with pytest.raises(DataError) as caught:
        split_tokens(torch.zeros(9, 4, dtype=torch.int64), calibration=8, heldout=2, seed=0, source="notes.txt")
    for part in ("notes.txt", "has 36 tokens", "9 sequences of 4", "needed are 40 tokens", "8 sequences to calibrate", "2 held out"):
        assert part in str(caught.value)
    split_tokens(torch.zeros(10, 4, dtype=torch.int64), calibration=8, heldout=2, seed=0, source="notes.txt")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sequences_to_choose_by_are_calibration_sequences_that_are_not_fitted_on(seed: int) -> None:
    available = torch.arange(90).reshape(30, 3)
    numbers = {"calibration": 16, "heldout": 5, "seed": seed, "source": "x"}
    whole, parted = split_tokens(available, **numbers), split_tokens(available, **numbers, choice=4)
    assert whole.choice.ids.shape == (0, 3)
    assert (len(parted.calibration), len(parted.choice), len(parted.heldout)) == (12, 4, 5)
    fit, choice, heldout = (set(part.sequence_ids) for part in (parted.calibration, parted.choice, parted.heldout))
    assert not fit & choice
    assert not (fit | choice) & heldout
    assert fit | choice == set(whole.calibration.sequence_ids)
    assert torch.equal(parted.heldout.ids, whole.heldout.ids)
    assert torch.equal(parted.used.ids, torch.cat([parted.calibration.ids, parted.choice.ids]))
    assert parted.used.sequence_ids == TokenBatch.of(parted.used.ids).sequence_ids
    rows = {sequence: row for row, sequence in enumerate(TokenBatch.of(available).sequence_ids)}
    for part in (parted.calibration, parted.choice):
        assert torch.equal(part.ids, available[[rows[sequence] for sequence in part.sequence_ids]])
        assert [rows[sequence] for sequence in part.sequence_ids] == sorted(rows[sequence] for sequence in part.sequence_ids)


def same(one: TokenBatch, other: TokenBatch) -> bool:
    return one.sequence_ids == other.sequence_ids and torch.equal(one.ids, other.ids)


@pytest.mark.parametrize("windows_at_hand", [21, 22, 60])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_factors_that_know_their_sequences_give_the_same_parts(windows_at_hand: int, seed: int) -> None:
    available = torch.arange(3 * windows_at_hand).reshape(-1, 3)
    numbers = {"calibration": 16, "heldout": 5, "seed": seed, "source": "x", "choice": 4}
    direct = split_tokens(available, **numbers)
    known = split_tokens(available, **numbers, known=frozenset(direct.calibration.sequence_ids))
    assert same(direct.calibration, known.calibration)
    assert same(direct.choice, known.choice)
    assert same(direct.heldout, known.heldout)


def test_a_part_of_the_sequences_is_enough_to_know() -> None:
    """Factors of one `--part`: what the others would have seen serves to choose by, as any other text."""
    available = torch.arange(90).reshape(30, 3)
    numbers = {"calibration": 16, "heldout": 5, "seed": 0, "source": "x", "choice": 4}
    part = split_tokens(available, **numbers).calibration[::2]
    found = split_tokens(available, **numbers, known=frozenset(part.sequence_ids))
    assert same(found.calibration, part)
    assert (len(found.choice), len(found.heldout)) == (4, 5)
    assert len({*found.calibration.sequence_ids, *found.choice.sequence_ids, *found.heldout.sequence_ids}) == 6 + 4 + 5


@pytest.mark.parametrize("heldout", [1, 8, 14])
def test_more_or_less_may_be_held_out_than_when_the_factors_were_collected(heldout: int) -> None:
    available = torch.arange(90).reshape(30, 3)
    fit = split_tokens(available, calibration=16, heldout=5, seed=0, source="x", choice=4).calibration
    found = split_tokens(available, calibration=16, heldout=heldout, seed=0, source="x", choice=4, known=frozenset(fit.sequence_ids))
    assert same(found.calibration, fit)
    assert (len(found.choice), len(found.heldout)) == (4, heldout)
    assert len({*fit.sequence_ids, *found.choice.sequence_ids, *found.heldout.sequence_ids}) == 12 + 4 + heldout


def test_what_is_chosen_by_is_no_copy_of_what_was_fitted_on() -> None:
    available = torch.arange(60).reshape(20, 3)[torch.arange(40) % 20]  # every window twice
    numbers = {"calibration": 16, "heldout": 0, "seed": 0, "source": "x", "choice": 4}
    direct = split_tokens(available, **numbers)
    assert len(direct.choice) == 4
    assert not set(direct.calibration.sequence_ids) & set(direct.choice.sequence_ids)
    known = split_tokens(available, **numbers, known=frozenset(direct.calibration.sequence_ids))
    assert same(direct.choice, known.choice)


def test_factors_that_have_seen_all_leave_nothing_to_hold_out() -> None:
    available = torch.arange(60).reshape(20, 3)
    known = frozenset(TokenBatch.of(available[:17]).sequence_ids)
    with pytest.raises(DataError, match="fewer than 4 sequences that the factors have not seen"):
        split_tokens(available, calibration=16, heldout=4, seed=0, source="x", choice=2, known=known)
    found = split_tokens(available, calibration=16, heldout=2, seed=0, source="x", choice=2, known=known)
    assert (len(found.choice), len(found.heldout)) == (1, 2)


# Sampling from the model


def test_a_model_with_a_chat_template_is_asked_for_a_conversation() -> None:
    tokenizer, model = chat_tokenizer(), tiny_llama(vocabulary=WORDS + 3)
    assert chat_opening(tokenizer) == [4, 5]
    assert chat_opening(word_tokenizer()) == []
    drawn = sample_from_model(model, tokenizer, 5, 8, seed=3)
    assert drawn.shape == (5, 8)
    assert drawn[:, :2].tolist() == [[4, 5]] * 5
    assert len({tuple(row) for row in drawn[:, 2:].tolist()}) == 5
    plain = sample_from_model(model, word_tokenizer(), 5, 8, seed=3)
    assert plain[:, 0].tolist() == [1] * 5
    assert sample_from_model(model, tokenizer, 2, 1, seed=3).tolist() == [[4], [4]]
    tokenizer.chat_template = "{{ raise_exception('a system message is needed') }}"
    assert chat_opening(tokenizer) == []


def test_samples_start_with_the_opening_token_and_do_not_depend_on_how_many_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_llama(), word_tokenizer()
    drawn = sample_from_model(model, tokenizer, 5, 8, seed=3)
    assert drawn.shape == (5, 8)
    assert (drawn[:, 0] == 1).all()
    monkeypatch.setattr(calibration, "SAMPLES_PER_PASS", 2)
    assert torch.equal(sample_from_model(model, tokenizer, 3, 8, seed=3), drawn[:3])


def test_another_seed_draws_other_samples() -> None:
    drawn = [sample_from_model(tiny_llama(), word_tokenizer(), 3, 8, seed=seed) for seed in (0, 1, 2**31)]
    assert all(not torch.equal(one, other) for one, other in combinations(drawn, 2))


def test_samples_follow_the_models_distribution() -> None:
    model = tiny_llama()
    drawn = sample_from_model(model, word_tokenizer(), 400, 2, seed=0)
    with torch.no_grad():
        p = model(input_ids=drawn[:1, :1]).logits[0, 0].softmax(-1)
    counts = torch.bincount(drawn[:, 1], minlength=11)
    z = (counts - 400 * p) / (400 * p * (1 - p)).sqrt()
    assert z.abs().max() < 4


def test_labels_are_independent_of_the_text_sampled_with_the_same_seed() -> None:
    """Labels must not be the sampled text over again: both are drawn from the same distributions for the same sequence ids."""
    model = tiny_llama()
    drawn = sample_from_model(model, word_tokenizer(), 8, 16, seed=0)
    with torch.no_grad():
        logits = model(input_ids=drawn).logits
    labels = (logits.softmax(-1) - label_gradient(logits, batch(drawn), 0)).argmax(-1)
    assert (labels[:, :-1] == drawn[:, 1:]).double().mean() < 0.8


# Hashes


def test_the_data_hash_is_that_of_the_shape_and_the_ids() -> None:
    tokens = random_tokens(3, 5)
    expected = hashlib.sha256(b"(3, 5)" + np.array(tokens.ids.tolist(), dtype="<i4").tobytes()).hexdigest()
    assert data_hash(tokens) == expected
    assert data_hash(TokenBatch(ids=tokens.ids.clone(), sequence_ids=(7, 8, 9))) == expected
    assert data_hash(batch(tokens.ids.reshape(5, 3))) != expected
    changed = tokens.ids.clone()
    changed[0, 0] += 1
    assert data_hash(batch(changed)) != expected


@pytest.mark.parametrize("modulus", [1, 4])
def test_overlap_of_equal_other_and_half_equal_text(modulus: int) -> None:
    tokens, other = (random_tokens(20, 80, seed=seed, vocabulary=1000) for seed in (0, 1))
    half = batch(torch.cat([tokens.ids[:10], other.ids[:10]]))
    known = Fingerprint.of(tokens, modulus)
    assert Fingerprint.of(tokens).overlap(known) == 1
    assert Fingerprint.of(other).overlap(known) == 0
    assert Fingerprint.of(half).overlap(known) == pytest.approx(0.5, abs=0 if modulus == 1 else 0.1)


def test_overlap_is_found_at_any_offset() -> None:
    tokens = random_tokens(1, 100, vocabulary=1000)
    shifted = batch(tokens.ids[:, 13:77])
    assert Fingerprint.of(shifted).overlap(Fingerprint.of(tokens)) == 1
    assert Fingerprint.of(tokens).overlap(Fingerprint.of(shifted)) == pytest.approx(33 / 69)


def test_thinning_keeps_about_one_in_modulus_and_survives_json() -> None:
    full = Fingerprint.of(random_tokens(40, 100, vocabulary=1000))
    thin = full.thinned(8)
    assert thin == Fingerprint.of(random_tokens(40, 100, vocabulary=1000), 8)
    assert 0.6 < 8 * len(thin.hashes) / len(full.hashes) < 1.4
    assert Fingerprint.from_json(json.loads(json.dumps(thin.as_json()))) == thin


def test_sequences_shorter_than_a_window_have_no_fingerprint() -> None:
    short = Fingerprint.of(random_tokens(5, 31))
    assert short.hashes == frozenset()
    assert short.overlap(short) == 0


def test_more_sequences_are_drawn_from_what_is_left() -> None:
    """They change none of the others, and are as many as there are at most."""
    available = torch.arange(30 * 4).reshape(30, 4)
    numbers = {"calibration": 8, "heldout": 5, "seed": 0, "source": "x", "choice": 2}
    without, some, all_left = (split_tokens(available, **numbers, more=more) for more in (0, 6, 100))
    for split in (some, all_left):
        assert torch.equal(split.used.ids, without.used.ids)
        assert torch.equal(split.heldout.ids, without.heldout.ids)
        assert not set(split.more.sequence_ids) & {*split.used.sequence_ids, *split.heldout.sequence_ids}
        assert split.everything.sequence_ids == split.used.sequence_ids + split.more.sequence_ids
    assert [len(split.more) for split in (without, some, all_left)] == [0, 6, 17]
