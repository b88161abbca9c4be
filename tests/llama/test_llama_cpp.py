"""What llama.cpp makes of our files: logits, greedy text and tokens are those of the dense model and its tokenizer.

Needs its libraries, which `make test-llama` puts into an environment of its own (`engine.py`); the ordinary tests skip this file.

llama.cpp rounds activations to 8 bits before a product with quantized weights, so logits differ by one or two percent of the largest
whatever the file. Those of a float32 file differ by 5e-6, Gemma's by 3e-4 (a table of its activation in float16). Where the layout of a
file is wrong, they differ by as much as the largest.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from e2e.tiny import make_text
from llama.engine import LIBRARY, engine
from llama.files import DEEP, MIXTURES, MODELS, OTHERS, SPLITS, Written, save_model, spaced_tokenizer, split_tokenizer, write
from roundel.formats import gguf_tensors
from roundel.formats.gguf import Dense
from roundel.models import locate

pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="no llama.cpp in this environment: make test-llama")

TYPES = ("q4_0", "q4_k", "q3_k", "q2_k", "q8_0")
OTHER_TYPES = ("q5_k", "q6_k", "iq4_nl", "iq4_xs", "q5_0", "mxfp4", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs")
EIGHT_BITS, FLOAT = 0.03, 0.001
"""Largest differences of logits, as parts of the largest, where activations are and are not rounded."""
ROUTERS = ("mlp.gate", "router", "shared_expert_gate")
IDS = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(0))


def reference(made: Written, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = made.model(ids[None]).logits[0]
    return found


def difference(made: Written, ids: Tensor = IDS, *, typical: bool = False) -> float:
    """The largest of logits, as a part of the largest; or the median of tokens: rounded activations may choose other experts."""
    expected = reference(made, ids)
    with engine(made.path) as run:
        found = run.logits(ids.tolist())
    assert found.shape == expected.shape
    of_tokens = (found - expected).abs().amax(-1) / expected.abs().max()
    return (of_tokens.median() if typical else of_tokens.max()).item()


@pytest.mark.parametrize("name", [*MODELS, *MIXTURES, *OTHERS])
def test_every_architecture_unrounded(name: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", name)
    assert difference(write(source, tmp_path / "model.gguf", lambda _name, _linear: None)) < FLOAT


@pytest.mark.parametrize("name", [name for name in (*MODELS, *MIXTURES, *OTHERS) if name not in DEEP])  # 64 layers add up
def test_every_architecture_in_eight_bits(name: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", name, initializer_range=0.03)
    made = write(source, tmp_path / "model.gguf", lambda module, _linear: None if module.endswith(ROUTERS) else "q8_0")
    assert difference(made, typical=any(kind in "".join(made.rounded) for kind in (".experts.", ".linear_attn."))) < EIGHT_BITS


@pytest.mark.parametrize("kind", [*TYPES, *OTHER_TYPES])
def test_every_type(kind: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", initializer_range=0.03)
    assert difference(write(source, tmp_path / "model.gguf", kind)) < EIGHT_BITS


@pytest.mark.parametrize("dense", ["f16", "bf16", "q8_0"])
def test_all_types_in_one_file(dense: Dense, tmp_path: Path) -> None:
    """The 259 columns of down fit no type; the dense model has the embedding and head as they are in the file."""
    source = save_model(tmp_path / "source", "llama", initializer_range=0.03, intermediate_size=259, num_hidden_layers=3)
    kinds = itertools.cycle([*TYPES, *OTHER_TYPES])
    path = tmp_path / "model.gguf"
    made = write(source, path, lambda _, linear: None if linear.in_features == 259 else next(kinds), dense=dense)
    stored = {each.name: each for each in GGUFReader(path).tensors}
    assert {each.tensor_type.name for each in stored.values()} >= {each.upper() for each in (*TYPES, *OTHER_TYPES)} | {"F32"}
    for name, module in (("token_embd", made.model.get_input_embeddings()), ("output", made.model.get_output_embeddings())):
        tensor = stored[f"{name}.weight"]
        module.weight.data = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    assert difference(made) < EIGHT_BITS


@pytest.mark.parametrize("kind", [*TYPES, *OTHER_TYPES])
def test_the_demo_model(kind: str, tmp_path: Path) -> None:
    """Logits and the greedy continuation; weights are bfloat16, so that float16 holds the rest."""
    source = locate("demo")
    made = write(source, tmp_path / "model.gguf", kind, fitted=512, dense="f16")
    tokenizer = AutoTokenizer.from_pretrained(source)
    start = tokenizer("In the beginning there was a small house near the river, and", return_tensors="pt").input_ids
    assert difference(made, start[0]) < EIGHT_BITS
    ids = start[0].tolist()
    expected = made.model.generate(start, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, len(ids) :].tolist()
    with engine(made.path) as run:
        found = run.greedy(ids, len(expected))
    agreed = next((k for k, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
    # Where two tokens are equally likely, rounded activations may decide otherwise; then all that follows differs.
    if agreed < len(expected):
        two = reference(made, torch.tensor(ids + expected[:agreed]))[-1].topk(2)
        assert found[agreed] == two.indices[1]
        assert two.values[0] - two.values[1] < EIGHT_BITS * two.values[0].abs()


def test_without_the_order_of_q_and_k_the_logits_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model(tmp_path / "source", "llama")
    right = difference(write(source, tmp_path / "right.gguf", "q8_0"))
    monkeypatch.setattr(gguf_tensors, "_pairs_side_by_side", lambda rows, _heads: torch.arange(rows))
    wrong = difference(write(source, tmp_path / "wrong.gguf", "q8_0"))
    assert wrong > 0.5 > 10 * right


TEXTS = [
    make_text(500),
    "It's 12345 o'clock: don't!  Two  spaces,   three,\ttabs\n\n\nand lines\r\n  indented.",
    " a space first, and last ",
    "Größe, naïve, 東京, привет, 🙂 and ½",
    "I'LL we've 3.14 1,000,000 /* code */ x==y; a_b__c",
    "",
]


def check_tokens(tokenizer: PreTrainedTokenizerBase, folder: Path, pre: str, texts: list[str]) -> None:
    """Of a model whose only part that matters is its tokenizer."""
    source = save_model(folder / "source", "llama", vocab_size=len(tokenizer), num_hidden_layers=1)
    tokenizer.save_pretrained(source)
    path = write(source, folder / "model.gguf", "q8_0").path
    assert GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == pre
    read = AutoTokenizer.from_pretrained(source)
    with engine(path) as run:
        for text in texts:
            assert run.tokenize(text) == read(text).input_ids, text


@pytest.mark.parametrize("name", SPLITS)
def test_byte_level_tokens(name: str, tmp_path: Path) -> None:
    pre_tokenizer, settings = SPLITS[name]
    check_tokens(split_tokenizer(pre_tokenizer, **settings), tmp_path, name, TEXTS)


@pytest.mark.parametrize("prefix", [False, True])
def test_tokens_of_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    check_tokens(spaced_tokenizer(prefix=prefix), tmp_path, "default", TEXTS)


def test_tokens_of_the_demo_model(tmp_path: Path) -> None:
    source = locate("demo")
    path = write(source, tmp_path / "model.gguf", "q8_0").path
    tokenizer = AutoTokenizer.from_pretrained(source)
    with engine(path) as run:
        for text in TEXTS:
            assert run.tokenize(text) == tokenizer(text).input_ids
        assert run.tokenize("a<|endoftext|>b", special=True) == tokenizer("a<|endoftext|>b").input_ids
