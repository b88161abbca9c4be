"""A model that needs a token at the beginning of texts which its tokenizer forgets: the reference is better with it."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import roundel
from roundel.stages import text as stage
from unit.test_calibration import text, word_tokenizer

START, FIRST, WORDS = 1, 3, 64


def sentences(count: int, seed: int) -> torch.Tensor:
    """Words that go up by one."""
    first = torch.randint(WORDS, (count, 1), generator=torch.Generator().manual_seed(seed))
    return FIRST + (first + torch.arange(31)) % WORDS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on words that go up after its beginning of text, and down after anything else."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(word_tokenizer()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=START,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(150):
        up = sentences(16, step)
        rows = torch.cat([torch.cat([torch.full((8, 1), START), up[:8]], 1), torch.cat([up[8:, -1:], up[8:].flip(1)], 1)])
        logits = model(rows).logits
        loss = torch.nn.functional.cross_entropy(logits[:, 2:-1].flatten(0, 1), rows[:, 3:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("source") / "needy"
    model.eval().save_pretrained(path)
    word_tokenizer(eos=False).save_pretrained(path)
    return path


def test_the_reference_perplexity_is_lower_than_before(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(text(*(row - FIRST).tolist()) for row in sentences(64, 1000)))
    settings = {"scheme": "int4-g32", "calibration": f"{tmp_path / 'text.txt'}", "sequences": 8, "seq_len": 30, "eval_sequences": 4}

    def reference(name: str) -> tuple[float, list[str]]:
        result = roundel.quantize(str(source), output=tmp_path / name, **settings)
        return result.details["evaluation"]["perplexity"]["reference"], result.details["warnings"]

    found, warnings = reference("with")
    assert any("the tokenizer starts no text with <s>" in warning for warning in warnings)
    monkeypatch.setattr(stage, "settle_opening", lambda *_given: None)
    before, _ = reference("without")
    assert found < 0.7 * before
