"""Written checkpoints beside their original: `evaluate`, of one, and `evaluate_several`, of several on one page.

KL on text, accuracies on tasks, perplexities as papers state them, texts continued. Where a directory for logits is given and holds those
of the original for this text, the original is not even loaded for the KL. Of several checkpoints one after the other is loaded beside the
original, whose logits are computed once, and are on the disk until all are measured.

Beside the KL stands that of the original against itself, with batches of another size: what the order of sums alone makes of it. A KL that
is not far above that says nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from roundel import processes
from roundel.artifacts.checkpoints import GGUF_FILE, described, load_written, weight_bytes
from roundel.artifacts.source import positions
from roundel.calibration import Fingerprint, data_hash, opening_of, set_opening
from roundel.errors import DataError, ModelError
from roundel.evaluate import Divergence, Logits, ModelLogits, compare_models
from roundel.evaluate.cached import LogitCache, RunLogits, reference_key
from roundel.evaluate.continuations import beginnings, continued, of_prompts, told
from roundel.evaluate.divergence import Part
from roundel.evaluate.perplexity import perplexity_text, window_losses
from roundel.evaluate.tasks import open_tasks, task_results
from roundel.models import load_model, load_tokenizer, locate
from roundel.models.load import load_config, pick_device, pick_dtype
from roundel.progress import Progress, Silent
from roundel.settings import NEW_TOKENS
from roundel.stages.report import versions
from roundel.stages.text import OVERLAP_WARNING, check_vocabulary, default_batch, evaluation_tokens
from roundel.sweeps import Layers
from roundel.types import TokenBatch

__all__ = ["Evaluation", "evaluate", "evaluate_several"]

TASK_BATCH = 8

DUPLICATED = 8
"""Sequences of the original against itself."""

WINDOW = 2048
"""Tokens of a window for perplexities, unless something else is asked for."""

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` returns: everything in `details`; the `report` of the divergence, of the first text, where text was given for it."""

    report: Divergence | None
    details: dict[str, Any]


@processes.together
def evaluate(
    model: str | Path,
    *,
    reference: str | Path,
    data: str | Sequence[str] | None = None,
    sequences: int = 64,
    seq_len: int = 512,
    tasks: Sequence[str] = (),
    task_data: str | Path | None = None,
    task_limit: int | None = None,
    num_fewshot: int | None = None,
    perplexity: str | Sequence[str] | None = None,
    window: int | None = None,
    cache: str | Path | None = None,
    cache_gib: float = 10.0,
    prompts: Sequence[str] = (),
    new_tokens: int = NEW_TOKENS,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures `KL(reference || model)` on text, accuracies on tasks, perplexities as papers state them, or all of these.

    Args:
        model: A directory that Roundel or another tool wrote, or any other causal language model; or a GGUF file.
        reference: The original model.
        data: For the KL: a calibration SPEC other than `self`, or several, each measured by itself.
        sequences: Use at most so many sequences of `seq_len` tokens of each.
        seq_len: At most the models' positions.
        tasks: Names of lm-evaluation-harness, which must be installed.
        task_data: A directory of local files with the tasks' documents, see `roundel.evaluate.tasks`; by default they come from the Hub.
        task_limit: At most so many documents of each task.
        num_fewshot: Examples before each question; by default each task's own number.
        perplexity: `wikitext2`, `c4`, a copy of either (`c4=SPEC`), or a SPEC of text, joined by blank lines; or several of these.
        window: Tokens of each window of that; by default 2048, and at most the models' positions.
        cache: A directory for the original's logits on `data`: made, filled, and read the next time.
        cache_gib: What it may hold; the entries used longest ago are removed.
        prompts: Texts that both models continue greedily (`evaluate.continuations`).
        new_tokens: With at most so many tokens each.
        device: As for `quantize`.
        dtype: As for `quantize`.
        batch_size: Sequences per pass.
        progress: Where to report; silent by default.

    Raises:
        RoundelError: see `roundel.errors`.
    """
    progress = progress or Silent()
    specs, streams = _several(data), _several(perplexity)
    if not specs and not tasks and not streams and not prompts:
        raise DataError("nothing to measure: give text for the KL (--data), --tasks, --perplexity or --prompt")
    _check_text((*specs, *streams), sequences, seq_len, new_tokens)
    if window is not None and window < 2:
        raise DataError(f"a window of {window} tokens: expected at least 2")
    opened = open_tasks(tasks, data=None if task_data is None else Path(task_data), limit=task_limit, shots=num_fewshot) if tasks else {}
    place = pick_device(device)
    kind = pick_dtype(dtype, place, progress.warn)
    path, theirs = _located(model), _Reference(path=locate(str(reference)), device=place, dtype=kind)
    tokenizer = theirs.tokenizer_for([path])
    length, span = min(seq_len, theirs.longest), min(window or WINDOW, theirs.longest)
    begun = of_prompts(prompts, tokenizer, theirs.longest)
    texts = {spec: evaluation_tokens(spec, tokenizer, length, sequences) for spec in specs}
    joined = {named: perplexity_text(named, tokenizer, span) for named in streams}
    ours = load_written(path, device=place, dtype=kind, original=theirs.path)
    if texts or joined:
        check_vocabulary(ours, *texts.values(), *joined.values())
    kept = None if cache is None else LogitCache(path=Path(cache), cap=int(cache_gib * GIB))
    reports: dict[str, Divergence] = {}
    found: dict[str, dict[str, Any]] = {}
    for spec, tokens in texts.items():
        reports[spec], about = _divergence(ours, path, theirs, spec, tokens, kept, batch_size, progress)
        found[spec] = {**reports[spec].as_json(), **about}
    details: dict[str, Any] = {**next(iter(found.values()), {}), "model": str(model), "reference": str(reference), "versions": versions()}
    if len(found) > 1:
        details["texts"] = found
    if joined:
        batch = batch_size or default_batch(span)
        details["windowed_perplexity"] = {
            named: processes.from_first(lambda tokens=tokens: _perplexities(ours, theirs.model, tokens, batch, progress))  # type: ignore[misc]
            for named, tokens in joined.items()
        }
    if opened:
        together = batch_size or TASK_BATCH
        with progress.stage("tasks", len(opened)) as advance:
            details["tasks"] = {}
            for name, (task, examples) in opened.items():
                both = (ours, theirs.model)
                results = processes.from_first(
                    lambda task=task, both=both: task_results(task, both, tokenizer, limit=task_limit, batch_size=together)  # type: ignore[misc]
                )
                details["tasks"][name] = {**results, "shots_from": examples}
                advance(1)
        details["task_data"] = None if task_data is None else str(task_data)
        details["lm_eval"] = importlib.metadata.version("lm-eval")
    if begun:
        original, written = (theirs.continued(model, begun, new_tokens, tokenizer) for model in (theirs.model, ours))
        details["continuations"] = told(tokenizer, begun, original, {"quantized": written})
    return Evaluation(report=next(iter(reports.values()), None), details=details)


@processes.together
def evaluate_several(
    models: Sequence[str | Path],
    *,
    reference: str | Path,
    data: str | Sequence[str],
    sequences: int = 64,
    seq_len: int = 512,
    cache: str | Path | None = None,
    cache_gib: float = 10.0,
    prompts: Sequence[str] = (),
    new_tokens: int = NEW_TOKENS,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures several checkpoints of one model on the same text, and has them continue the same beginnings.

    Args:
        models: As `evaluate`'s, each once.
        reference: The original model.
        data: A calibration SPEC other than `self`, or several, each measured by itself.
        sequences: Use at most so many sequences of `seq_len` tokens of each.
        seq_len: At most the models' positions.
        cache: A directory for the original's logits, kept for the next time; by default a temporary one.
        cache_gib: What it may hold; where they do not fit the original is run again for each checkpoint.
        prompts: Texts that all models continue greedily; by default the beginnings of the first sequences.
        new_tokens: With at most so many tokens each.
        device: As for `quantize`.
        dtype: As for `quantize`.
        batch_size: Sequences per pass.
        progress: Where to report; silent by default.

    Returns:
        `models`: of each its `format`, its `scheme` where it is ours, the `bytes` of its files and, in `texts`, what `evaluate` finds;
        `original`, the same without texts; `continuations`; `reference`, `versions`.

    Raises:
        RoundelError: see `roundel.errors`.
    """
    progress = progress or Silent()
    specs = _several(data)
    if not specs:
        raise DataError("several checkpoints are compared on text: give some (--data)")
    _check_text(specs, sequences, seq_len, new_tokens)
    place = pick_device(device)
    kind = pick_dtype(dtype, place, progress.warn)
    paths = {str(model): _located(model) for model in models}
    theirs = _Reference(path=locate(str(reference)), device=place, dtype=kind)
    tokenizer = theirs.tokenizer_for(paths.values())
    length = min(seq_len, theirs.longest)
    texts = {spec: evaluation_tokens(spec, tokenizer, length, sequences) for spec in specs}
    begun = of_prompts(prompts, tokenizer, theirs.longest) or beginnings(next(iter(texts.values())))
    found: dict[str, dict[str, Any]] = {}
    written: dict[str, list[list[int]]] = {}
    with _logit_cache(cache, int(cache_gib * GIB)) as kept:
        for name, path in paths.items():
            ours = load_written(path, device=place, dtype=kind, original=theirs.path)
            check_vocabulary(ours, *texts.values())
            found[name] = {**described(path), "bytes": weight_bytes(path), "texts": {}}
            for spec, tokens in texts.items():
                report, about = _divergence(ours, path, theirs, spec, tokens, kept, batch_size, progress)
                found[name]["texts"][spec] = {**report.as_json(), **about}
            written[name] = theirs.continued(ours, begun, new_tokens, tokenizer)
            del ours
    return {
        "models": found,
        "reference": str(reference),
        "original": {**described(theirs.path), "bytes": weight_bytes(theirs.path)},
        "continuations": told(tokenizer, begun, theirs.continued(theirs.model, begun, new_tokens, tokenizer), written),
        "versions": versions(),
    }


def _check_text(specs: Sequence[str], sequences: int, seq_len: int, new_tokens: int) -> None:
    """Refuses what cannot be measured.

    Raises:
        DataError: with the reason.
    """
    if sequences < 1 or seq_len < 2:
        raise DataError(f"{sequences} sequences of {seq_len} tokens: expected at least 1 of at least 2")
    if "self" in specs:
        raise DataError("evaluation needs text: give a file, a directory or a Hub dataset")
    if new_tokens < 1:
        raise DataError(f"--new-tokens {new_tokens}: expected at least 1")


def _located(model: str | Path) -> Path:
    """As `models.locate`; or a GGUF file, one that Roundel wrote by its directory."""
    path = Path(model)
    if path.suffix == ".gguf" and path.is_file():
        return path.parent if path.name == GGUF_FILE and (path.parent / "roundel.json").is_file() else path
    return locate(str(model))


def _divergence(
    ours: nn.Module,
    path: Path,
    theirs: _Reference,
    spec: str,
    tokens: TokenBatch,
    kept: LogitCache | None,
    batch_size: int | None,
    progress: Progress,
) -> tuple[Divergence, dict[str, Any]]:
    """On one text, and what the report says beside it."""
    overlap = _recorded_overlap(path, tokens)
    if overlap is not None and overlap > OVERLAP_WARNING:
        progress.warn(f"about {100 * overlap:.0f} % of {spec} was in the calibration text: its KL is too good")
    length = tokens.ids.shape[1]
    batch = batch_size or default_batch(length)
    with theirs.logits_of(tokens, kept, batch, progress) as (logits, about), progress.stage("evaluation", len(tokens)) as advance:
        report = compare_models(ours, logits, tokens, batch_size=batch, advance=advance)
    return report, {**about, "data": spec, "sha256": data_hash(tokens), "seq_len": length, "overlap_with_calibration": overlap}


@contextmanager
def _logit_cache(path: str | Path | None, cap: int) -> Iterator[LogitCache]:
    """Where the original's logits are kept: as asked for, or until the block ends, in half of what is free."""
    if path is not None:
        yield LogitCache(path=Path(path), cap=cap)
        return

    def made() -> tuple[str, int]:
        folder = tempfile.mkdtemp(prefix="roundel-")
        return folder, min(cap, shutil.disk_usage(folder).free // 2)

    folder, room = processes.from_first(made)
    try:
        yield LogitCache(path=Path(folder), cap=room)
    finally:
        if processes.first():
            shutil.rmtree(folder, ignore_errors=True)


def _several(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """One, several or none, each once."""
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(dict.fromkeys(given))


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """The original, loaded when it is needed."""

    path: Path
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def model(self) -> PreTrainedModel:
        """Loaded at the first use."""
        return load_model(self.path, device=self.device, dtype=self.dtype)

    @cached_property
    def longest(self) -> int:
        """Its positions."""
        return positions(load_config(self.path))

    def tokenizer_for(self, paths: Iterable[Path]) -> PreTrainedTokenizerBase:
        """Its tokenizer, which opens texts as the calibration of these checkpoints has."""
        tokenizer = load_tokenizer(self.path)
        for token in (token for path in paths for token in _opening(path, len(tokenizer))):
            if not opening_of(tokenizer):
                set_opening(tokenizer, token)
        return tokenizer

    def continued(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: int, tokenizer: PreTrainedTokenizerBase
    ) -> list[list[int]]:
        """What a model with its vocabulary and positions writes after these tokens; each process has what the first finds."""
        check_vocabulary(model, *(TokenBatch.of(torch.tensor([ids])) for ids in prompts))
        end = tokenizer.eos_token_id
        return processes.from_first(lambda: continued(Layers(model), prompts, tokens, end=end, longest=self.longest))

    @contextmanager
    def logits_of(
        self, tokens: TokenBatch, cache: LogitCache | None, batch_size: int, progress: Progress
    ) -> Iterator[tuple[nn.Module | Logits, Mapping[str, Any]]]:
        """Where its logits come from, and what the report says of them."""
        if cache is None:
            check_vocabulary(self.model, tokens)
            yield self.model, {"duplicate": self._duplicate(tokens, batch_size), "reference_logits": "run"}
            return
        about = {
            "tokens": data_hash(tokens),
            "dtype": str(self.dtype),
            "device": str(self.device),
            "batch_size": batch_size,
            "versions": versions(),
        }
        key = reference_key(self.path, about)
        if (stored := cache.find(key)) is not None:
            yield stored, {"duplicate": stored.about["duplicate"], "reference_logits": "cached"}
            return
        check_vocabulary(self.model, tokens)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        size = tokens.ids.numel() * int(vocabulary) * self.dtype.itemsize  # type: ignore[arg-type]
        duplicate = self._duplicate(tokens, batch_size)
        if size > cache.cap:
            progress.warn(
                f"the original's logits take {size / GIB:.1f} GiB and are not kept: the cache may hold {cache.cap / GIB:.1f} (--cache-gib)"
            )
            yield self.model, {"duplicate": duplicate, "reference_logits": "run"}
            return
        with cache.entry(key, size, {**about, "model": str(self.path), "duplicate": duplicate}) as keep:
            yield RunLogits(model=ModelLogits(self.model), keep=keep), {"duplicate": duplicate, "reference_logits": "run"}

    def _duplicate(self, tokens: TokenBatch, batch_size: int) -> dict[str, Any]:
        """The KL of the original against itself, one sequence at a time against several."""
        some = tokens[:DUPLICATED]
        together = min(len(some), batch_size) if batch_size > 1 else min(len(some), 2)
        model = ModelLogits(self.model)
        single = compare_models(_OneByOne(model), model, some, batch_size=together)
        return {"kl": single.kl_mean, "batch_sizes": [1, together], "sequences": len(some)}


@dataclass(frozen=True)
class _OneByOne:
    """Logits of a model that looks at one sequence at a time."""

    model: ModelLogits

    def of(self, batch: TokenBatch) -> list[Part]:
        """See `evaluate.Logits`."""
        return [part for single in batch.split(1) for part in self.model.of(single)]


def _perplexities(ours: nn.Module, theirs: PreTrainedModel, tokens: TokenBatch, batch: int, progress: Progress) -> dict[str, Any]:
    """Of both models, and the logarithm of their quotient with its standard error over windows."""
    check_vocabulary(theirs, tokens)
    with progress.stage("perplexity", 2 * len(tokens)) as advance:
        own, other = (window_losses(each, tokens, batch_size=batch, advance=advance) for each in (ours, theirs))
    difference = own - other
    return {
        "model": own.mean().exp().item(),
        "reference": other.mean().exp().item(),
        "log_ratio": difference.mean().item(),
        "log_ratio_stderr": difference.std().item() / math.sqrt(len(tokens)) if len(tokens) > 1 else None,
        "window": tokens.ids.shape[1],
        "windows": len(tokens),
        "sha256": data_hash(tokens),
    }


def _recorded(path: Path, key: str) -> Any:
    """What the checkpoint's roundel.json says of its calibration text; None where it says nothing."""
    try:
        return json.loads((path / "roundel.json").read_text(encoding="utf-8"))["calibration"][key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _opening(path: Path, vocabulary: int) -> list[int]:
    """The tokens that it says texts start with.

    Raises:
        ModelError: they are none of the tokenizer's.
    """
    found = _recorded(path, "opening") or []
    if not isinstance(found, list) or not all(type(token) is int and 0 <= token < vocabulary for token in found):
        raise ModelError(f"{path}/roundel.json is damaged: texts start with {str(found)[:80]}, which are no tokens")
    return found


def _recorded_overlap(path: Path, tokens: TokenBatch) -> float | None:
    """Overlap with the calibration text that the checkpoint's roundel.json remembers; None where it cannot be told."""
    try:
        fingerprint = Fingerprint.from_json(_recorded(path, "fingerprint"))
    except (ValueError, KeyError, TypeError):
        return None
    own = Fingerprint.of(tokens, fingerprint.modulus)
    return own.overlap(fingerprint) if own.hashes else None
