"""The embedded model: small, trained, and quantized better by curvature than without."""

from pathlib import Path

import pytest
import torch

import roundel
from roundel.calibration import read_documents, windows
from roundel.models import load_model, load_tokenizer, locate


def test_the_model_is_small_enough_to_embed() -> None:
    files = [path for path in locate("demo").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6


def test_the_model_knows_its_text() -> None:
    """Its card says that it is far better than a trigram model; the difference to a unigram model is checked here."""
    model = load_model(locate("demo"), device=torch.device("cpu"), dtype=torch.float32)
    ids = windows(read_documents("stdlib-heldout", load_tokenizer(locate("demo"))), load_tokenizer(locate("demo")), 256, most=16)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item()
    frequencies = torch.bincount(ids.flatten(), minlength=logits.shape[1]).double() / ids.numel()
    unigram = -(frequencies * frequencies.clamp(min=1e-12).log()).sum().item()
    assert loss < unigram - 2


def test_curvature_beats_activations_beats_nearest_and_prediction_agrees_with_measurement(tmp_path: Path) -> None:
    kl = {}
    for curvature, sweeps in (("identity", 0), ("activation", 0), ("auto", 4)):
        result = roundel.quantize(
            "demo",
            output=tmp_path / curvature,
            scheme="int3-g64",
            curvature=curvature,
            sweeps=sweeps,
            include=("model.layers.0.*",),
            calibration="stdlib",
            eval_data="stdlib-heldout",
            sequences=24,
            seq_len=128,
            eval_sequences=32,
        )
        kl[curvature] = result.report.kl_mean
    assert kl["auto"] < 0.9 * kl["activation"]
    assert kl["activation"] < 0.9 * kl["identity"]
    assert result.details["predicted_kl"]["predicted_over_measured"] == pytest.approx(1, abs=0.3)
