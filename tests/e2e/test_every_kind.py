"""A fixed part of `make architectures`: one of each kind of model, from quantizing to what Transformers reads back."""

import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parent.parent.parent / "studies"
KINDS = {
    "dense": ("llama", "phi3", "gemma2"),
    "experts in one tensor": ("granitemoe", "llama4", "jetmoe"),
    "experts one by one": ("mixtral", "qwen2_moe", "qwen3_moe"),
    "experts that do nothing": ("longcat_flash",),
    "latent attention": ("deepseek_v2", "deepseek_v32"),
    "hybrid": ("qwen3_next", "qwen3_5_moe", "zamba2", "mamba2", "lfm2"),
    "wrapper": ("gemma3", "gemma4"),
    "other linears": ("gpt2", "falcon"),
    "cross-attention": ("bart",),
}
ROUNDED_BY_TRANSFORMERS = 5e-4
"""Experts that it decodes itself get 16 bits."""


@pytest.mark.parametrize("kind", [kind for kinds in KINDS.values() for kind in kinds])
def test_quantized_and_read_back(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    monkeypatch.delitem(sys.modules, "architectures", raising=False)
    import architectures

    row = architectures.one(kind, tmp_path, nearest=False)
    assert row["state"] == "quantized", row
    assert "unread" not in row, row
    assert row["finite"]
    assert row["share"] >= 0.95
    assert row["changed"] == []
    assert row["difference"] <= (ROUNDED_BY_TRANSFORMERS if row["experts"] else 0)
