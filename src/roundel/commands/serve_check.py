"""Whether an engine computes what a written directory says: its log-probabilities beside ours, before anything is published.

Four sides look at the same windows of text: the engine with the written directory, we with it in float32 (`load_written`), and, where the
original is at hand, both with the original, which is the engine's noise. Each leaves its rows on the disk and is gone before the next is
loaded, so one model at a time is in memory. All rows together have at most `ROWS` float32 numbers, a quarter of them for each side, and a
window at most `WINDOW`, because engines hold one in a form many times as large; for large vocabularies windows are shorter and fewer.

The check fails where KL(ours || engine) is above a tolerance, or where the engine's greedy text takes a token that our log-probabilities,
of the same tokens before it, put lower than the best by more than `TIE` times the largest difference seen in the windows: nearer than that
two tokens are tied. Greedy text goes through other kernels than the windows and through the cache of keys and values.

Not done: sampling, chat templates, speed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from roundel.artifacts.checkpoints import load_written, read_report
from roundel.artifacts.source import positions
from roundel.calibration import data_hash, opening_of, set_opening
from roundel.engines import ENGINES, Answer, Engine, Request
from roundel.errors import DataError, ModelError, NumericalError, SchemeError
from roundel.evaluate import Comparison, ModelLogits
from roundel.evaluate.continuations import beginnings
from roundel.models import load_model, load_tokenizer, locate
from roundel.models.load import load_config, pick_device
from roundel.progress import Progress, Silent
from roundel.settings import NEW_TOKENS
from roundel.stages.text import check_vocabulary, evaluation_tokens
from roundel.types import TokenBatch

__all__ = ["require", "serve_check", "served_rows"]

ROWS, WINDOW = 1 << 28, 1 << 23
SEQUENCES, SEQ_LEN = 32, 128
"""Where the report does not say."""

TIE = 2.0
TOLERANCE, OVER_NOISE = 0.005, 10.0
"""Of KL(ours || engine), nats per token, by default: the larger of this, and so many times that of the original."""

CHEAP = 4 << 30
"""Bytes of an original that is served for its noise without being asked for."""

Rows = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of log-probabilities, of two sides on the same windows."""

    logprob_max: float
    """Of tokens that are there."""
    logprob_mean: float
    kl: float
    """KL(first || second), nats per token."""
    kl_stderr: float | None
    top1_agreement: float


def serve_check(
    model: str | Path,
    *,
    engine: str,
    python: str = sys.executable,
    original: str | None = None,
    data: str | None = None,
    sequences: int | None = None,
    seq_len: int | None = None,
    dtype: str = "auto",
    noise: bool | None = None,
    tolerance: float | None = None,
    device: str = "auto",
    log: Callable[[str], None] = lambda _text: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Serves a written directory with an engine and compares; `require` judges.

    Args:
        model: A directory that `quantize` has written.
        engine: `vllm`, `mlx` or `llama.cpp`.
        python: The Python that has the engine.
        original: The original model, where the report does not say where it is, or it has moved.
        data: A calibration SPEC other than `self`; by default the report's `--eval-data`, else `stdlib-heldout`.
        sequences: At most so many windows; by default as many as the report evaluated, and at most 32.
        seq_len: Tokens of each, at most; by default the report's.
        dtype: In which the engine computes; `auto` is what it takes by itself.
        noise: Whether the engine serves the original, too; by default where that is known and small.
        tolerance: Of KL(ours || engine), nats per token.
        device: Where our side runs, as for `quantize`.
        log: Takes all that the engine prints.
        progress: Where to report; silent by default.

    Raises:
        RoundelError: see `roundel.errors`.
    """
    progress = progress or Silent()
    path, report = Path(model), read_report(Path(model))
    server = _engine(engine, report, path, dtype)
    source = _original(original, report)
    if noise and server.formats == ("gguf",):
        raise SchemeError(f"--noise: {engine} serves GGUF files only, and the original is none; leave it away")
    if noise and source is None:
        raise SchemeError("--noise needs the original: give --original")
    if noise is None:
        noise = source is not None and server.formats != ("gguf",) and _bytes(source) <= CHEAP
    recipe = report.get("recipe", {})
    spec = data or recipe.get("eval_data") or "stdlib-heldout"
    tokens = _windows(
        path,
        _tokenizer(path, source, report),
        spec,
        sequences or min(int(recipe.get("eval_sequences") or SEQUENCES), SEQUENCES),
        seq_len or int(recipe.get("seq_len") or SEQ_LEN),
        progress,
    )
    prompts = beginnings(tokens)
    new = min(NEW_TOKENS, positions(load_config(path)) - len(prompts[0]))
    place = pick_device(device)
    with tempfile.TemporaryDirectory(prefix="roundel-") as scratch:

        def asked(directory: Path, title: str) -> Answer:
            out = Path(scratch) / title
            out.mkdir()
            request = Request(model=directory, windows=tokens.ids.tolist(), prompts=prompts, new_tokens=new, dtype=dtype)
            with progress.stage(f"{engine}, {title}", len(tokens)) as advance:
                return server.ask(request, python=python, out=out, advance=advance, keep=log)

        served = asked(path, "written")
        served_original = asked(source, "original") if noise and source is not None else None
        ours = load_written(path, device=place, dtype=torch.float32)
        check_vocabulary(ours, tokens)
        file = Path(scratch) / "ours.npy"
        with progress.stage("ours, written", len(tokens)) as advance:
            own = served_rows(ours, tokens, file, advance)
        gaps = [gap for prompt, found in zip(prompts, served.greedy, strict=True) for gap in _gaps(ours, prompt, found)]
        del ours
        difference = compared(own, served.rows, tokens)
        details: dict[str, Any] = {
            "model": str(model),
            "engine": engine,
            "python": python,
            "dtype": dtype,
            "versions": served.versions,
            "kernels": served.kernels,
            "scheme": report.get("scheme"),
            "format": report["format"],
            "data": spec,
            "sha256": data_hash(tokens),
            "windows": list(tokens.ids.shape),
            "vocabulary": own.shape[2],
            "difference": asdict(difference),
            "noise": None,
            "original": None if source is None else str(source),
            "kl": {"report": report.get("evaluation", {}).get("kl", {}).get("mean"), "ours": None, "engine": None},
        }
        if source is not None:
            truth = load_model(source, device=place, dtype=torch.float32)
            check_vocabulary(truth, tokens)
            with progress.stage("ours, original", len(tokens)) as advance:
                dense = served_rows(truth, tokens, Path(scratch) / "original.npy", advance)
            del truth
            details["kl"] |= {"ours": compared(dense, own, tokens).kl, "engine": compared(dense, served.rows, tokens).kl}
            if served_original is not None:
                details["noise"] = asdict(compared(dense, served_original.rows, tokens))
    tied = TIE * difference.logprob_max
    details["greedy"] = {
        "tokens": len(gaps),
        "equal": sum(gap == 0 for gap in gaps),
        "tied": sum(0 < gap <= tied for gap in gaps),
        "different": sum(gap > tied for gap in gaps),
        "largest_gap": max(gaps),
    }
    usual = TOLERANCE if details["noise"] is None else max(TOLERANCE, OVER_NOISE * details["noise"]["kl"])
    details["tolerance"] = usual if tolerance is None else tolerance
    details["passed"] = difference.kl <= details["tolerance"] and not details["greedy"]["different"]
    return details


def require(details: dict[str, Any]) -> None:
    """Raises what a check that has not passed is for a user.

    Raises:
        NumericalError: with the number that is too large.
    """
    who, found, greedy = details["engine"], details["difference"], details["greedy"]
    if found["kl"] > details["tolerance"]:
        raise NumericalError(
            f"{who} computes something else than {details['model']} says: KL(ours || {who}) is {found['kl']:.3g} nats per token, "
            f"above {details['tolerance']:.3g} (--tolerance)"
        )
    if greedy["different"]:
        raise NumericalError(
            f"{who}'s greedy text takes {greedy['different']} of {greedy['tokens']} tokens that are not the likeliest, by up to "
            f"{greedy['largest_gap']:.3g} nats, while its log-probabilities of given text differ by {found['logprob_max']:.3g} at most"
        )


def _engine(name: str, report: dict[str, Any], path: Path, dtype: str) -> Engine:
    if name not in ENGINES:
        raise SchemeError(f"engine {name!r}: expected {', '.join(ENGINES)}")
    engine, form = ENGINES[name], report["format"]
    if form not in engine.formats:
        raise SchemeError(f"{path} is in the format {form}, which {name} does not read; it reads {', '.join(engine.formats)}")
    if dtype not in engine.dtypes:
        raise SchemeError(f"dtype {dtype!r}: {name} takes {', '.join(engine.dtypes)}")
    return engine


def _original(given: str | None, report: dict[str, Any]) -> Path | None:
    """What was given, else what the report names, where that is on this machine."""
    if given is not None:
        return locate(given)
    name = str(report.get("model", {}).get("name"))
    return locate(name) if name == "demo" or (Path(name) / "config.json").is_file() else None


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _tokenizer(path: Path, source: Path | None, report: dict[str, Any]) -> PreTrainedTokenizerBase:
    """That of the directory, or of the original where it has none (GGUF), which starts texts as when the report was made."""
    home = path if (path / "tokenizer_config.json").is_file() else source
    if home is None:
        raise ModelError(f"{path} has no tokenizer that Transformers reads: give --original")
    tokenizer = load_tokenizer(home)
    for token in report.get("calibration", {}).get("opening") or []:
        if not opening_of(tokenizer):
            set_opening(tokenizer, token)
    return tokenizer


def _windows(path: Path, tokenizer: PreTrainedTokenizerBase, spec: str, sequences: int, length: int, progress: Progress) -> TokenBatch:
    """Of the text, as many and as long as the vocabulary allows."""
    if sequences < 1 or length < 2:
        raise DataError(f"{sequences} sequences of {length} tokens: expected at least 1 of at least 2")
    config = load_config(path)
    vocabulary = int(config.get_text_config().vocab_size)
    longest = max(2, min(length, positions(config) - 1, WINDOW // vocabulary))
    most = max(1, min(sequences, ROWS // 4 // (longest * vocabulary)))
    if (most, longest) != (sequences, length):
        progress.warn(
            f"{most} windows of {longest} tokens instead of {sequences} of {length}: a vocabulary of {vocabulary} tokens is large"
        )
    return evaluation_tokens(spec, tokenizer, longest, most)


@torch.no_grad()
def served_rows(model: torch.nn.Module, tokens: TokenBatch, file: Path, advance: Callable[[int], None] = lambda _n: None) -> Rows:
    """Our log-probabilities of what follows each token, on the disk, in the form in which engines give theirs."""
    logits, rows = ModelLogits(model), None
    for number, window in enumerate(tokens.split(1)):
        part = logits.of(window)[0]
        for chosen in logits.layers.slices(window.ids.shape[1]):
            found = part(chosen).float().log_softmax(-1).cpu().numpy()
            if rows is None:
                shape = (*tokens.ids.shape, found.shape[-1])
                rows = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
            rows[number, chosen] = found
        advance(1)
    assert rows is not None
    return rows


def compared(first: Rows, second: Rows, tokens: TokenBatch) -> Difference:
    """Window by window.

    Raises:
        ModelError: they have not the same vocabulary, or a number is not finite.
    """
    found, gaps = Comparison(), []
    for ids, ours, theirs in zip(tokens.ids, first, second, strict=True):
        here, there = torch.from_numpy(np.array(ours)), torch.from_numpy(np.array(theirs))
        found.add(ids, _whole(there), _whole(here), [slice(None)])
        gaps.append((_actual(here, ids) - _actual(there, ids)).abs())
    result, gap = found.result(), torch.stack(gaps)
    return Difference(
        logprob_max=gap.max().item(),
        logprob_mean=gap.mean().item(),
        kl=result.kl_mean,
        kl_stderr=result.as_json()["kl"]["stderr"],
        top1_agreement=result.top1_agreement,
    )


def _whole(rows: Tensor) -> Callable[[slice], Tensor]:
    return lambda part: rows[part]


def _actual(rows: Tensor, ids: Tensor) -> Tensor:
    return rows[:-1].gather(1, ids[1:, None])[:, 0]


@torch.no_grad()
def _gaps(model: torch.nn.Module, prompt: Sequence[int], continued: Sequence[int]) -> list[float]:
    """By how much each token lies below the likeliest, in nats, after the same tokens before it.

    Raises:
        ModelError: the engine gave nothing, or a token that the model does not have.
    """
    tokens = TokenBatch.of(torch.tensor([[*prompt, *continued]], dtype=torch.long))
    if not continued:
        raise ModelError("the engine continued a prompt with nothing")
    logits = ModelLogits(model)
    part = logits.of(tokens)[0]
    rows = part(slice(len(prompt) - 1, tokens.ids.shape[1] - 1)).float().log_softmax(-1).cpu()
    if not 0 <= min(continued) <= max(continued) < rows.shape[-1]:
        raise ModelError(f"the engine gave token {max(continued)}, of a vocabulary of {rows.shape[-1]}")
    return (rows.amax(-1) - rows.gather(1, torch.tensor(continued)[:, None])[:, 0]).tolist()
