"""Small directories of every kind that Roundel reads, and the calls that read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import roundel
from e2e import tiny
from roundel.artifacts.checkpoints import read
from roundel.artifacts.curvatures import Curvatures
from roundel.artifacts.factors import FactorsDirectory
from roundel.artifacts.rounded import RoundedFiles
from roundel.artifacts.source import Source, load_source
from roundel.artifacts.work import Work
from roundel.calibration import read_documents, windows
from roundel.formats import imatrix
from roundel.given import open_given
from roundel.models import load_tokenizer
from roundel.models.load import quiet
from roundel.recipes import Recipe
from roundel.stages.rounding import natural
from roundel.store import write_text
from roundel.tuning.saved import Saved

__all__ = ["CALLS", "REFUSED", "Bases"]

FORMS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"scheme": "int4-g32"},
    "native": {"scheme": "trellis2-s6", "rotate": "online"},
    "native-integers": {"scheme": "int3-g64-asym", "format": "native"},
    "gptq": {"scheme": "int4-g32", "format": "gptq"},
    "awq": {"scheme": "int4-g32-asym", "format": "awq"},
    "auto-round": {"scheme": "int3-g32-asym", "format": "auto-round"},
    "mlx": {"scheme": "int3-g32-affine", "format": "mlx"},
    "exl3": {"scheme": "trellis2", "format": "exl3"},
    "gguf": {"scheme": "q4_0"},
}
SHORT: dict[str, Any] = {"sequences": 4, "seq_len": 16, "eval_sequences": 2, "sweeps": 0, "prefix_sequences": 4, "curvature": "kfac"}
JOB: dict[str, Any] = {**SHORT, "scheme": "int4-g32", "prefix_aware": True, "natural_places": 0, "tune": "end-to-end", "tune_steps": 2}


class StoppedError(BaseException):
    """Ends a job early."""


@dataclass(frozen=True)
class Bases:
    """Made once in a directory, and never changed."""

    path: Path

    @property
    def model(self) -> Path:
        """The original: one layer."""
        return self._model(64)

    def original(self, form: str) -> Path:
        """Of what is in a format; EXL3 has widths that are multiples of 128."""
        return self._model(128 if form == "exl3" else 64)

    def _model(self, width: int) -> Path:
        place = self.path / f"model-{width}"
        if not place.exists():
            torch.manual_seed(0)
            sizes = {**tiny.SIZES, "hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "head_dim": width // 4}
            LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4)).save_pretrained(place)
            tiny.make_tokenizer(starts=False).save_pretrained(place)
        return place

    @cached_property
    def text(self) -> Path:
        """A directory of texts: plain, and lines of JSON."""
        place = self.path / "text"
        if not place.exists():
            place.mkdir()
            write_text(place / "plain.txt", tiny.make_text(3000))
            rows = [{"text": line} for line in tiny.make_text(1000, seed=1).splitlines()]
            write_text(place / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return place

    @cache  # noqa: B019 (they live as long as the process)
    def source(self, form: str) -> Source:
        """The original, loaded."""
        return load_source(str(self.original(form)), Recipe.of(scheme="int8-channel", format="dense"), "cpu", "float32")

    def quantized(self, form: str) -> Path:
        """The original in a format."""
        place = self.path / form
        if not place.exists():
            roundel.quantize(self.original(form), output=place, calibration=str(self.text), **SHORT, **FORMS[form])
        return place

    @cached_property
    def factors(self) -> Path:
        """Of the original, by an estimator that carries sums from pass to pass."""
        place = self.path / "factors"
        if not place.exists():
            given = {name: SHORT[name] for name in ("sequences", "seq_len", "eval_sequences")}
            roundel.collect_factors(
                self.model, output=place, calibration=str(self.text), curvature="fastkron:steps=2:batch=2:tolerance=0", **given
            )
        return place

    @cached_property
    def matrix(self) -> Path:
        """llama.cpp's importance matrix in both of its forms."""
        place = self.path / "matrix"
        if not place.exists():
            place.mkdir()
            values = {f"blk.0.{part}.weight": torch.arange(1.0, 65) for part in ("attn_q", "ffn_up")}
            matrix = imatrix.Imatrix(
                architecture="llama", dataset="text", sequences=4, seq_len=16, values=values, counts=dict.fromkeys(values, 64)
            )
            imatrix.write(place / "m.gguf", matrix)
            old = [len(values).to_bytes(4, "little")]
            for name, own in values.items():
                numbers = (size.to_bytes(4, "little") for size in (1, len(own)))
                old += [len(name).to_bytes(4, "little"), name.encode(), *numbers, own.numpy().tobytes()]
            (place / "m.dat").write_bytes(b"".join(old))
        return place

    @cached_property
    def work(self) -> Path:
        """Of a job that was stopped in its tuning, with codes and curvature kept."""
        place = self.path / "work"
        if not place.exists():
            natural.STEP_TOKENS = 64
            roundel.quantize(self.model, output=self.path / "job", work=place, calibration=str(self.text), **JOB)
        return place


def _evaluate(bases: Bases, given: Path, scratch: Path, form: str) -> object:
    cache = bases.path / "cache"  # the original's logits: it is run once
    return roundel.evaluate(given, reference=bases.original(form), data=str(bases.text / "plain.txt"), sequences=1, seq_len=16, cache=cache)


def _read(bases: Bases, given: Path, scratch: Path) -> object:
    return read(given)


def _given(bases: Bases, given: Path, scratch: Path, form: str) -> object:
    source = bases.source(form)
    found = open_given(str(given), source)
    return dict(found), [found.value_of(name) for name in source.checkpoint.files]


def _refine(bases: Bases, given: Path, scratch: Path) -> object:
    text = {"calibration": str(bases.text), **SHORT, "prefix_aware": False}
    return roundel.refine(given, reference=bases.model, output=scratch / "out", **text)


def _export(bases: Bases, given: Path, scratch: Path) -> object:
    to = "native" if sum(path.stat().st_size for path in given.iterdir()) % 2 else "dense"
    return roundel.export(given, output=scratch / "out", to=to)


def _tune(bases: Bases, given: Path, scratch: Path) -> object:
    return roundel.tune(given, output=scratch / "out", model=bases.model, tune_steps=1, tune_tokens=32)


def _transformers(bases: Bases, given: Path, scratch: Path) -> object:
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(given)
    return model(torch.arange(8)[None]).logits


def _quantize(bases: Bases, given: Path, scratch: Path) -> object:
    short = {**SHORT, "scheme": "int4-g32", "curvature": "identity"}
    return roundel.quantize(given, output=scratch / "out", calibration=str(bases.text), **short)


def _files(bases: Bases, given: Path, scratch: Path) -> object:
    work = Work(path=given, kept=True, memory=1 << 30, hidden=1 << 20)
    curvatures, rounded = Curvatures(path=work.curvature), RoundedFiles(path=work.rounded)
    found = [curvatures.load(0) if curvatures.has(0) else {}, dict(rounded) if rounded.has(0) else {}]
    with safe_open(bases.work / "tuning.safetensors", framework="pt") as stored:
        digest = json.loads(stored.metadata()["roundel"])["digest"]
    work.claim(json.loads((bases.work / "job.json").read_text())["digest"])
    return found, Saved(path=given / "tuning.safetensors", digest=digest).load()


def _factors(bases: Bases, given: Path, scratch: Path) -> object:
    stored = FactorsDirectory.open(given)
    stored.check_complete()
    return stored.factors()


def _from_factors(bases: Bases, given: Path, scratch: Path) -> object:
    return roundel.quantize(bases.model, output=scratch / "out", factors=given, scheme="int4-g32", sweeps=0, eval_sequences=2)


def _imatrix(bases: Bases, given: Path, scratch: Path) -> object:
    return roundel.export_imatrix(given, output=scratch / "out" / "imatrix.gguf", model=bases.model)


def _matrix(bases: Bases, given: Path, scratch: Path) -> object:
    return [imatrix.read(path) for path in sorted(given.iterdir())]


def _resume(bases: Bases, given: Path, scratch: Path) -> object:
    return roundel.quantize(bases.model, output=scratch / "out", work=given, calibration=str(bases.text), **JOB)


def _text(bases: Bases, given: Path, scratch: Path) -> object:
    tokenizer = load_tokenizer(bases.model)
    return windows(read_documents(str(given), tokenizer), tokenizer, 16)


Call = Callable[[Bases, Path, Path], object]
Target = tuple[Callable[[Bases], Path], Call, float]
DECODED = ("compressed-tensors", "gptq", "awq", "auto-round")
"""What `quantize` takes for an original."""


def _each(name: str, forms: Iterable[str], call: Callable[..., object], weight: float, *, told: bool = False) -> dict[str, Target]:
    """Of each format; the call may be told which it is."""
    return {f"{name} {form}": (partial(Bases.quantized, form=form), partial(call, form=form) if told else call, weight) for form in forms}


CALLS: dict[str, Target] = {
    **_each("evaluate", FORMS, _evaluate, 3, told=True),
    **_each("read", [form for form in FORMS if form != "gguf"], _read, 8),
    **_each("given", [form for form in FORMS if "native" not in form], _given, 8, told=True),
    **_each("from_pretrained", [form for form in FORMS if "native" in form], _transformers, 4),
    "factors": (lambda bases: bases.factors, _factors, 30),
    "imatrix": (lambda bases: bases.factors, _imatrix, 10),
    "matrix": (lambda bases: bases.matrix, _matrix, 5),
    "work": (lambda bases: bases.work, _files, 30),
    "text": (lambda bases: bases.text, _text, 20),
    **_each("export", [form for form in FORMS if form != "gguf"], _export, 0.5),  # from here on whole runs
    **_each("refine", ("gguf", "gptq"), _refine, 0.25),
    **_each("quantize", [form for form in FORMS if form != "gguf"], _quantize, 0.25),
    "quantize model": (lambda bases: bases.model, _quantize, 0.5),
    "quantize from factors": (lambda bases: bases.factors, _from_factors, 0.5),
    "tune native-integers": (partial(Bases.quantized, form="native-integers"), _tune, 0.25),
    "resume": (lambda bases: bases.work, _resume, 1),
}
"""By name: the directory, the call, and how often it is taken among others."""
REFUSED = {f"quantize {form}" for form in FORMS if form not in (*DECODED, "gguf")}
"""What is refused undamaged, too."""
