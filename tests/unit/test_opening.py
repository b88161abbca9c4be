"""The token that texts start with where the tokenizer has forgotten it: found by the model's loss."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from roundel.calibration import opening_of, set_opening, windows
from roundel.progress import Silent
from roundel.stages.notes import Notes
from roundel.stages.opening import FROM, WORTH, loss, settle_opening
from roundel.sweeps import Layers
from unit.test_calibration import text, word_tokenizer


class Sink(nn.Module):
    """Forgets everything unless the text begins with token 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x[:, :1, 2:3] > 0)


class Needy(nn.Module):
    """Says the token that comes next, which is one more than the last, if the text begins with token 1; else anything."""

    def __init__(self, *, needs: bool, vocabulary: int = 203) -> None:
        super().__init__()
        self.embedding, self.vocabulary = nn.Embedding(vocabulary, vocabulary), vocabulary
        self.layers = nn.ModuleList([Sink() if needs else nn.Identity()])
        with torch.no_grad():
            self.embedding.weight.copy_(4 * torch.eye(vocabulary).roll(1, 1))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(bos_token_id=1))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return nn.Linear(1, self.vocabulary)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layers[0](self.embedding(input_ids)))


def source(model: nn.Module, *, bos: bool = False, named: bool = True) -> SimpleNamespace:
    tokenizer = word_tokenizer(bos=bos)
    if not named:
        tokenizer.bos_token = None
    return SimpleNamespace(model=model, tokenizer=tokenizer, layers=Layers(model), length=64)


@pytest.fixture
def words(tmp_path: Path) -> str:
    (tmp_path / "words.txt").write_text(text(*[k % 180 for k in range(600)]))
    return str(tmp_path / "words.txt")


@pytest.mark.parametrize("named", [True, False])
def test_a_model_that_needs_it_gets_it(words: str, named: bool) -> None:
    own, notes = source(Needy(needs=True), named=named), Notes(Silent())
    assert opening_of(own.tokenizer) == []
    settle_opening(own, words, notes)
    assert opening_of(own.tokenizer) == [1]
    found = windows([text(5, 6, 7, 8, 9)], own.tokenizer, 4)
    assert found.tolist() == [[1, 8, 9, 10], [1, 11, 12, 2]]
    (message,) = notes.warnings
    assert message.startswith("the tokenizer starts no text with <s>, without which the original loses 5.31 instead of ")
    settle_opening(own, words, notes)
    assert len(notes.warnings) == 1


def test_a_model_that_does_not_need_it_and_one_that_has_it_are_left_alone(words: str) -> None:
    for own in (source(Needy(needs=False)), source(Needy(needs=True), bos=True)):
        notes, before = Notes(Silent()), opening_of(own.tokenizer)
        settle_opening(own, words, notes)
        assert (opening_of(own.tokenizer), notes.warnings) == (before, [])


def test_nothing_is_tried_without_text_or_a_token(words: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(text(*range(FROM - 2)))
    for spec, needs in (("self", True), (str(tmp_path / "short.txt"), True)):
        own = source(Needy(needs=needs))
        settle_opening(own, spec, Notes(Silent()))
        assert opening_of(own.tokenizer) == []


def test_the_loss_is_that_of_the_tokens_from_the_first_that_counts(words: str) -> None:
    model, ids = Needy(needs=False), torch.randint(3, 200, (3, 20), generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.cross_entropy(model(ids).logits[:, 4:-1].flatten(0, 1), ids[:, 5:].flatten())
    assert loss(Layers(model), ids, 5) == pytest.approx(wanted.item(), rel=1e-5)
    assert 0 < WORTH < 1


def test_an_opening_is_set_for_every_text() -> None:
    tokenizer = word_tokenizer()
    set_opening(tokenizer, 1)
    assert tokenizer("w0 w1")["input_ids"] == [1, 3, 4]
    assert tokenizer.bos_token_id == 1
