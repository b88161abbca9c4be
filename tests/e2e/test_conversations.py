"""An instructed model is calibrated on conversations as its chat template writes them: nothing else of the job changes."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

import roundel
from oracles.tiny import tiny_llama
from roundel.artifacts.source import load_source
from roundel.calibration import data_hash
from roundel.progress import Silent
from roundel.recipes import Recipe
from roundel.stages.notes import Notes
from roundel.stages.text import split_text
from unit.test_calibration import TEMPLATE, WORDS, text, word_tokenizer

SETTINGS: dict[str, Any] = {"scheme": "int4-g16", "sequences": 6, "seq_len": 24, "eval_sequences": 2, "sweeps": 1}
ROLES = ("user", "assistant")
ROWS = [[{"role": role, "content": text(*range(7 * k + turn, 7 * k + turn + 9))} for turn, role in enumerate(ROLES)] for k in range(20)]
DIFFERENT = {"calibration", "continuations", "evaluation", "predicted_kl", "layers", "recipe", "resources", "seconds", "warnings"}
"""Of a report, where text differs."""


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    made = word_tokenizer(eos=False)
    made.chat_template = template
    return made


def written(turns: list[dict[str, str]]) -> str:
    """What the template makes of a conversation, by hand."""
    marks = {"user": "w2", "assistant": "w3"}
    return "".join(f"w1 {marks[turn['role']]} {turn['content']} </s> " for turn in turns)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model, once with a chat template."""
    made = {}
    for name, template in {"instructed": TEMPLATE, "bare": None}.items():
        made[name] = tmp_path_factory.mktemp("source") / name
        tiny_llama(vocabulary=WORDS + 3).save_pretrained(made[name])
        tokenizer(template).save_pretrained(made[name])
    return made


def job(source: Path, output: Path, calibration: str | Path) -> dict[str, Any]:
    result = roundel.quantize(str(source), output=output, calibration=str(calibration), **SETTINGS)
    return {**result.details, "weights": load_file(output / "model.safetensors")}


def same_weights(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(values.equal(b["weights"][name]) for name, values in a["weights"].items())


def test_messages_are_text_as_the_template_writes_it(sources: dict[str, Path], tmp_path: Path) -> None:
    files = {
        "messages": [{"messages": turns} for turns in ROWS],
        "written": [{"text": written(turns)} for turns in ROWS],
        "contents": [{"text": " ".join(turn["content"] for turn in turns)} for turns in ROWS],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = {name: job(sources["instructed"], tmp_path / name, tmp_path / f"{name}.jsonl") for name in files}
    assert done["messages"]["calibration"]["sha256"] == done["written"]["calibration"]["sha256"]
    assert same_weights(done["messages"], done["written"])
    assert done["messages"]["calibration"]["sha256"] != done["contents"]["calibration"]["sha256"]
    assert not same_weights(done["messages"], done["contents"])
    assert {key: value for key, value in done["messages"].items() if key not in {*DIFFERENT, "weights"}} == {
        key: value for key, value in done["contents"].items() if key not in {*DIFFERENT, "weights"}
    }
    recipes = [{key: value for key, value in done[name]["recipe"].items() if key != "calibration"} for name in ("messages", "contents")]
    assert recipes[0] == recipes[1]


def test_sampled_text_starts_as_the_template_starts(sources: dict[str, Path], tmp_path: Path) -> None:
    done = {name: job(source, tmp_path / name, "self") for name, source in sources.items()}
    for name, opening in {"instructed": [4, 5], "bare": [1]}.items():
        recipe = Recipe.of(calibration="self", **SETTINGS)
        source = load_source(str(sources[name]), recipe, "cpu", "float32")
        split = split_text(recipe, source, Notes(Silent()))
        assert data_hash(split.calibration) == done[name]["calibration"]["sha256"]
        for batch in (split.calibration, split.heldout):
            assert batch.ids[:, : len(opening)].tolist() == [opening] * len(batch)
    assert done["instructed"]["calibration"]["sha256"] != done["bare"]["calibration"]["sha256"]
    assert not same_weights(done["instructed"], done["bare"])
    assert done["instructed"]["recipe"] == done["bare"]["recipe"]
