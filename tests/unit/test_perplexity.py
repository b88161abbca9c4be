"""Windows as papers cut them."""

import random

import pytest
import torch

from e2e.tiny import make_tokenizer
from oracles.tiny import random_tokens, tiny_llama
from roundel.errors import DataError, ModelError
from roundel.evaluate.perplexity import drawn_windows, perplexity_text, window_losses
from roundel.sweeps import layers

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def words(start: int, count: int) -> str:
    return " ".join(LETTERS[(start + k) % 26] for k in range(count))


DOCUMENTS = [words(k, 3 + 5 * k) for k in range(9)]


def test_drawn_windows_are_those_of_the_protocol() -> None:
    tokenizer = make_tokenizer(starts=False)
    found = drawn_windows(iter(DOCUMENTS), tokenizer, 12, count=20).ids
    draw, expected = random.Random(0), []
    while len(expected) < 20:
        ids = tokenizer(DOCUMENTS[draw.randint(0, len(DOCUMENTS) - 1)])["input_ids"]
        if len(ids) > 12:
            start = draw.randint(0, len(ids) - 13)
            expected.append(ids[start : start + 12])
    assert found.tolist() == expected
    assert len({tuple(row) for row in expected}) > 5


def test_documents_that_are_too_short_are_one_clear_error() -> None:
    tokenizer = make_tokenizer(starts=False)
    for documents in ([], ["a b c", "d e"]):
        with pytest.raises(DataError, match=f"of {len(documents)} documents .* more than 50 tokens"):
            drawn_windows(documents, tokenizer, 50)


def test_a_name_a_copy_of_it_and_other_text(tmp_path) -> None:
    tokenizer = make_tokenizer(starts=False)
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(f'{{"text": "{document}"}}\n' for document in DOCUMENTS), encoding="utf-8")
    drawn = perplexity_text(f"c4={path}", tokenizer, 12)
    assert drawn.ids.shape == (256, 12)
    joined = tokenizer("\n\n".join(DOCUMENTS))["input_ids"]
    for named in (str(path), f"wikitext2={path}"):
        found = perplexity_text(named, tokenizer, 12)
        assert found.ids.flatten().tolist() == joined[: len(joined) // 12 * 12]


@pytest.mark.parametrize("size", [layers.SLICE, 40])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_losses_of_windows_are_those_of_plain_torch(size: int, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "SLICE", size)
    model, tokens, done = tiny_llama(), random_tokens(5, 9), list[int]()
    found = window_losses(model, tokens, batch_size=batch_size, advance=done.append)
    with torch.no_grad():
        logits = model(input_ids=tokens.ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.mT, tokens.ids[:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-6)
    assert sum(done) == 5
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        window_losses(model, tokens, batch_size=batch_size)
