"""A fixed part of `make architectures`: models of several kinds, from quantizing to what Transformers reads back."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

STUDIES = Path(__file__).parent.parent.parent / "studies"
KINDS = {
    "experts in one tensor": ("granitemoe", "jetmoe"),
    "experts that do nothing": ("longcat_flash",),
    "latent attention": ("deepseek_v32",),
    "hybrid": ("qwen3_next", "zamba2", "mamba2", "lfm2"),
    "wrapper": ("gemma4", "qwen2_5_vl", "llava"),
    "cross-attention": ("bart",),
}
"""Beside those that other files look at (test_architectures, test_experts, test_plain, test_renamed, test_quantized_sources)."""

SLOW = ("granitemoe", "zamba2", "jetmoe", "longcat_flash", "mamba2", "lfm2", "bart")

ROUNDED_BY_TRANSFORMERS = 5e-4
"""Experts that it decodes itself get 16 bits."""


@pytest.fixture
def architectures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(STUDIES))
    return importlib.import_module("architectures")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kinds in KINDS.values() for kind in kinds],
)
def test_quantized_and_read_back(kind: str, architectures: ModuleType, tmp_path: Path) -> None:
    row = architectures.one(kind, tmp_path, nearest=False)
    assert row["state"] == "quantized", row
    assert "unread" not in row, row
    assert row["finite"]
    assert row["share"] >= 0.95
    assert row["changed"] == []
    assert row["difference"] <= (ROUNDED_BY_TRANSFORMERS if row["experts"] else 0)


def test_what_no_packed_format_can_hold_is_refused_before_the_work(architectures: ModuleType, tmp_path: Path) -> None:
    row = architectures.one("rwkv", tmp_path)
    assert row["state"] == "refused"
    assert "rescale_every" in row["why"]
    assert not (tmp_path / "out").exists()
