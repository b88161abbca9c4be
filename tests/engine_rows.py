"""What the engines' tests have in common: written directories, served and compared, a row of benchmarks/results/engines-NAME.json for each.

`docs/engines/index.md` has these rows as a table; `python studies/tables.py` makes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3NextConfig

import roundel
from roundel.commands.serve_check import require, serve_check
from roundel.errors import ModelError
from roundel.models import load_tokenizer, locate
from roundel.store import write_json

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"

SETTINGS: dict[str, Any] = {
    "curvature": "identity",
    "sweeps": 0,
    "prefix_aware": False,
    "calibration": "stdlib",
    "sequences": 16,
    "seq_len": 128,
    "eval_data": "stdlib-heldout",
    "eval_sequences": 32,
}
"""Rounded to the nearest: what is looked at is how it is read. The text is that of serve-check."""


def untied(path: Path) -> None:
    """The demo model with an output head of its own."""
    model = AutoModelForCausalLM.from_pretrained(locate("demo"), dtype=torch.bfloat16)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.save_pretrained(path)


def random(path: Path, config: Any) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)


def small(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "initializer_range": 0.05,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        **more,
    }


SOURCES: dict[str, Callable[[Path], None]] = {
    "untied": untied,
    "mixture": lambda path: random(
        path,
        Qwen3MoeConfig(**small(num_hidden_layers=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True)),
    ),
    "hybrid": lambda path: random(
        path,
        Qwen3NextConfig(
            **small(num_hidden_layers=4, mlp_only_layers=[0, 1, 2]),  # it wants one layer of experts
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            shared_expert_intermediate_size=128,
            linear_num_key_heads=2,
            linear_num_value_heads=16,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
        ),
    ),
}


def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A function that returns an original by its kind, and makes it first."""
    made: dict[str, str] = {"demo": "demo"}

    def make(kind: str) -> str:
        if kind not in made:
            path = tmp_path_factory.mktemp(kind)
            SOURCES[kind](path)
            load_tokenizer(locate("demo")).save_pretrained(path)
            made[kind] = str(path)
        return made[kind]

    return make


def written(source: str | Path, output: Path, **options: Any) -> Path:
    """A directory as users make it."""
    return roundel.quantize(source, output=output, **{**SETTINGS, **options}).path


def served(
    path: Path, kind: str, *, engine: str, refused: str | None = None, refined: float | None = None, **options: Any
) -> dict[str, Any] | None:
    """Serves it and checks; writes the row. None where the engine refuses it, with a line that has `refused` in it.

    `refined` is the KL that `refine` says, where the report of the directory is of what it was before.

    Raises:
        RoundelError: it is refused without being expected to, or computes something else.
    """
    report = json.loads((path / "roundel.json").read_text(encoding="utf-8"))
    row: dict[str, Any] = {
        "model": kind,
        "scheme": " ".join(filter(None, [_schemes(report), "part" if report["skipped"] else "", "" if refined is None else "refined"])),
        "format": report["format"],
        "report_kl": report["evaluation"]["kl"]["mean"] if refined is None else refined,
        "error": None,
    }
    try:
        found = serve_check(path, engine=engine, **options)
    except ModelError as error:
        row["error"] = str(error).partition(f"{path}: ")[2] or str(error)
        _write(engine, row)
        if refused is None or refused not in row["error"]:
            raise
        return None
    row |= {key: found[key] for key in ("versions", "kernels", "dtype", "windows", "difference", "noise", "kl", "greedy", "passed")}
    _write(engine, row)
    require(found)
    return found


def _schemes(report: dict[str, Any]) -> str:
    return ", ".join(sorted({layer["scheme"] for layer in report["layers"].values()}))


def _write(engine: str, row: dict[str, Any]) -> None:
    """In place of the row of the same model, scheme and format."""
    file = RESULTS / f"engines-{engine.replace('.', '-')}.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []

    def key(of: dict[str, Any]) -> tuple[str, str, str]:
        return of["model"], of["scheme"], of["format"]

    write_json(file, {"engine": engine, "rows": sorted([*(old for old in rows if key(old) != key(row)), row], key=key)})
