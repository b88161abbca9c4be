"""Changes that once ended in anything but a right result or a `RoundelError`, one of each kind (`make fuzz` looks for more)."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from random import Random

import pytest

from fuzz.campaign import one, prepared
from fuzz.edits import apply, random_edit
from fuzz.targets import CALLS
from fuzz.watch import outcome
from roundel.errors import ModelError

CORPUS = json.loads((Path(__file__).parent / "corpus.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", CORPUS, ids=lambda entry: f"{entry['call']}: {entry['edit']['file']}")
def test_it_is_refused_or_right(entry, place, monkeypatch) -> None:
    bases, scratch = place
    CALLS[entry["call"]][0](bases)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    found = one(entry["call"], entry["edit"], bases, scratch)
    assert found.kind == entry["answer"], found


def test_what_is_wrong_is_seen(tmp_path) -> None:
    """By what watches the calls."""
    scratch, outside = tmp_path / "scratch", tmp_path / "elsewhere"
    scratch.mkdir()

    def refuses() -> None:
        raise ModelError("for a reason")

    def fails() -> None:
        raise KeyError("x")

    assert outcome(lambda: None, scratch, 1).kind == "right"
    assert outcome(refuses, scratch, 1).kind == "refused"
    assert outcome(fails, scratch, 1).kind == "foreign"
    assert outcome(lambda: (scratch / "x").write_text("in its place"), scratch, 1).kind == "right"
    assert outcome(lambda: outside.write_text("elsewhere"), scratch, 1).kind == "escape"
    assert outcome(lambda: bytearray(300 << 20), scratch, 1).kind == "memory"


def test_edits_are_of_every_kind_and_change_what_they_are_made_for(tmp_path) -> None:
    (tmp_path / "x.json").write_text('{"a": [1, 2], "b": {"c": "d"}}')
    header = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\1")
    (tmp_path / "x.gguf").write_bytes(bytes(100))
    (tmp_path / "x.txt").write_text("one\ntwo")
    random, kinds = Random(0), set()
    for number in range(200):
        edit = random_edit(random, tmp_path, links=True)
        kinds.add(edit["kind"])
        changed = tmp_path.parent / f"changed-{number}"
        shutil.copytree(tmp_path, changed)
        apply(json.loads(json.dumps(edit)), changed)
        assert {path.name for path in tmp_path.iterdir() if path.name != edit["file"]} <= {path.name for path in changed.iterdir()}
    assert kinds == {"delete", "cut", "grow", "bytes", "words", "json", "header", "line", "nest", "link"}
