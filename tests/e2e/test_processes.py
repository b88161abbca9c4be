"""Several processes of one job make what one makes, and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e import ranks, tiny
from e2e.test_experts import original
from roundel import processes
from roundel.errors import ProcessesError
from roundel.stages.rounding import natural

GIVEN: dict[str, Any] = {"sequences": 16, "prefix_sequences": 16, "seq_len": 16, "eval_sequences": 5, "sweeps": 1}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "natural": ("llama", {"scheme": "int3-g16", "curvature": "pilot", "prefix_aware": True, "natural_places": 1}),
    "chosen": ("llama", {"scheme": "int4-g32", "sequences": 64, "prefix_aware": True, "natural_places": 0}),
    "experts": ("qwen3-moe", {"bits": 4.5, "schemes": "int3-g16,int4-g16", "format": "native", "curvature": "kfac"}),
    "inputs": ("llama", {"scheme": "nvfp4-a4", "curvature": "kfac", "prefix_aware": True}),
    "tiles": ("llama", {"scheme": "trellis2", "curvature": "fastkron:steps=2:batch=2", "prefix_aware": True, "natural_places": 0}),
}


def options(settings: dict[str, Any]) -> list[str]:
    """As on the command line."""
    found = []
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        found += [option] if value is True else [option, str(value)]
    return found


def same_report(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """But for what it took."""
    kept = [{key: value for key, value in report.items() if key not in ("seconds", "resources", "layers")} for report in (one, other)]
    rows = [{name: {**row, "seconds": 0} for name, row in report["layers"].items()} for report in (one, other)]
    return kept[0] == kept[1] and rows[0] == rows[1]


@pytest.fixture(autouse=True)
def short_steps(monkeypatch) -> None:
    """Natural-gradient steps on few tokens."""
    monkeypatch.setattr(natural, "STEP_TOKENS", 64)


@pytest.fixture(scope="module")
def source(model, tmp_path_factory) -> Callable[[str], Path]:
    """The directory of a model by name."""

    def made(name: str) -> Path:
        if name != "qwen3-moe":
            return model(name)
        path, tokenizer = tmp_path_factory.mktemp("experts") / "model", tiny.make_tokenizer(starts=False)
        original(name, len(tokenizer)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return made


@pytest.mark.parametrize(
    "kind", ["chosen", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("natural", "experts", "inputs", "tiles"))]
)
def test_the_same_codes_and_numbers(kind: str, source, text, command, tmp_path) -> None:
    name, settings = KINDS[kind]
    line = ["quantize", source(name), "--calibration", text, "--quiet", *options({**GIVEN, **settings})]
    assert command(*line, "-o", tmp_path / "1").code == 0
    report = json.loads((tmp_path / "1" / "roundel.json").read_text())
    count = 4 if kind == "natural" else 2
    found = ranks.run(count, *line, "-o", tmp_path / "several", step_tokens=64)
    assert [rank.code for rank in found] == [0] * count, found
    own = json.loads((tmp_path / "several" / "roundel.json").read_text())
    assert own["resources"]["processes"] == count
    assert same_report(report, own)
    for path in (tmp_path / "1").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "several" / path.name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "several"]


@pytest.mark.slow
def test_a_model_on_the_disk_and_hidden_states_in_files(model, text, command, tmp_path) -> None:
    line = ["quantize", model(), "--calibration", text, "--quiet", *options({**GIVEN, **KINDS["natural"][1]}), "--memory", "100K"]
    assert command(*line, "-o", tmp_path / "1").code == 0
    found = ranks.run(2, *line, "-o", tmp_path / "2", "--work", tmp_path / "work", step_tokens=64)
    assert [rank.code for rank in found] == [0, 0], found
    assert (tmp_path / "1" / "model.safetensors").read_bytes() == (tmp_path / "2" / "model.safetensors").read_bytes()


def test_tuning_end_to_end_in_shards(tmp_path) -> None:
    settings = {"scheme": "int3-g64", "curvature": "identity", "sequences": 12, "seq_len": 64, "eval_sequences": 8, "sweeps": 0}
    line = ["quantize", "demo", "--quiet", *options({**settings, "tune": "end-to-end", "tune_steps": 6, "tune_tokens": 320})]
    for count in (1, 2):
        found = ranks.run(count, *line, "-o", tmp_path / str(count), exact=True)
        assert [rank.code for rank in found] == [0] * count, found
    one, two = (json.loads((tmp_path / name / "roundel.json").read_text()) for name in "12")
    history, other = one["tuning"]["history"], two["tuning"]["history"]
    assert history[0] == other[0]
    assert history[1]["calibration_kl"] == pytest.approx(other[1]["calibration_kl"], rel=1e-4)
    assert two["tuning"]["held_out_kl"]["after"] == pytest.approx(one["tuning"]["held_out_kl"]["after"], rel=0.02)
    assert two["tuning"]["held_out_kl"]["after"] < two["tuning"]["held_out_kl"]["before"]
    assert two["evaluation"]["kl"]["mean"] == pytest.approx(one["evaluation"]["kl"]["mean"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "include"), [("int4-g32", "*"), ("lattice2", "*.[kv]_proj")])
def test_what_stays_whole_in_every_process(scheme, include, model, text, tmp_path) -> None:
    """Biases, norms and the embedding beside sharded codes or vectors."""
    settings = {
        **GIVEN,
        "scheme": scheme,
        "include": include,
        "curvature": "kfac",
        "tune": "end-to-end",
        "tune_steps": 4,
        "tune_tokens": 64,
    }
    line = ["quantize", model("qwen2"), "--calibration", text, "--quiet", *options(settings)]
    histories = []
    for count in (1, 2):
        found = ranks.run(count, *line, "-o", tmp_path / str(count), exact=True)
        assert [rank.code for rank in found] == [0] * count, found
        histories.append(json.loads((tmp_path / str(count) / "roundel.json").read_text())["tuning"]["history"])
    one, two = histories
    assert one[0] == two[0]
    assert two[1]["calibration_kl"] == pytest.approx(one[1]["calibration_kl"], rel=1e-4)


@pytest.mark.slow
def test_tuning_goes_on_with_another_number(model, text, quantized, tmp_path) -> None:
    line = ["tune", quantized.path, "--calibration", text, "--quiet", *options({"tune_steps": 8, "tune_tokens": 64})]
    whole = ranks.run(2, *line, "-o", tmp_path / "whole", "--work", tmp_path / "first")
    again = ranks.run(3, *line, "-o", tmp_path / "again", "--work", tmp_path / "first")
    assert [rank.code for rank in [*whole, *again]] == [0] * 5, (whole, again)
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_evaluation(model, text, quantized, command, tmp_path) -> None:
    line = ["evaluate", quantized.path, "--reference", model(), "--data", text, "--sequences", 11, "--seq-len", 16, "--quiet"]
    line += ["--perplexity", text, "--window", 32]
    assert command(*line, "--json", tmp_path / "1.json").code == 0
    found = ranks.run(3, *line, "--json", tmp_path / "3.json", "--cache", tmp_path / "cache")
    assert [rank.code for rank in found] == [0, 0, 0], found
    cached = ranks.run(2, *line, "--json", tmp_path / "2.json", "--cache", tmp_path / "cache")
    assert [rank.code for rank in cached] == [0, 0], cached
    one, two, three = (json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, 2, 3))
    for other in (two, three):
        assert other["kl"]["mean"] == pytest.approx(one["kl"]["mean"], rel=1e-6)
        assert other["windowed_perplexity"] == one["windowed_perplexity"]
    assert two["reference_logits"] == "cached"


def test_one_error(model, text, tmp_path) -> None:
    wrong = [
        (["quantize", tmp_path / "none", "-o", tmp_path / "out"], 2, "none"),
        (["quantize", model(), "-o", tmp_path / "out", "--scheme", "int4-g32", "--calibration", tmp_path / "none.txt"], 2, "none.txt"),
        (["compare", model()], 2, "runs in one process"),
    ]
    for line, code, message in wrong:
        found = ranks.run(2, *line)
        said = [rank.err for rank in found if "error" in rank.err]
        assert len(said) == 1, found
        assert message in said[0]
        assert "Traceback" not in said[0]
        assert all(rank.code in (code, 5) for rank in found), found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("victim", "after", "torchrun"),
    [(1, "curvature/*.safetensors", False), pytest.param(0, "rounded/*.safetensors", True, marks=pytest.mark.slow)],
    ids=["second", "torchrun"],
)
def test_a_killed_process_ends_the_job_with_one_error_and_another_number_goes_on(
    victim, after, torchrun, model, text, command, tmp_path
) -> None:
    settings = {**GIVEN, "scheme": "int3-g16", "curvature": "pilot", "prefix_aware": True, "natural_places": 0, "eval_sequences": 2}
    line = ["quantize", str(model()), "--calibration", str(text), "--quiet", *options(settings)]
    kept = [*line, "-o", str(tmp_path / "out"), "--work", str(tmp_path / "work")]

    def there(alive: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "work").glob(after)) and alive() and time.monotonic() < deadline:
            time.sleep(0.01)

    if torchrun:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "roundel", *kept]
        agent = subprocess.Popen(launch, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        there(lambda: agent.poll() is None)
        os.kill(_process_of(agent.pid, victim), signal.SIGKILL)
        _, err = agent.communicate(timeout=120)
        assert agent.returncode != 0
    else:
        job = ranks.Job(2, *kept)
        there(job.processes[victim].is_alive)
        job.processes[victim].kill()
        others = [rank for rank in job.wait() if rank.code != -signal.SIGKILL]
        assert [rank.code for rank in others] == [ProcessesError.exit_code]
        err = others[0].err
    assert len([part for part in err.splitlines() if part.startswith("error: ")]) == 1, err
    assert "roundel/commands" not in err, err
    assert not (tmp_path / "out").exists()
    found = ranks.run(3 if victim else 2, *kept)
    assert not any(rank.code for rank in found), found
    assert command(*line, "-o", tmp_path / "whole").code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def _process_of(launcher: int, rank: int) -> int:
    """The process of a rank, by its environment."""
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                environment = (path / "environ").read_bytes().split(b"\0")
            except (OSError, ValueError, IndexError):
                continue
            if parent == launcher and f"RANK={rank}".encode() in environment:
                return int(path.name)
    raise AssertionError("no such process")


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 15, 16, 64, 100])
@pytest.mark.parametrize("together", [1, 3])
def test_runs_are_all_sequences_in_order(count: int, together: int) -> None:
    found = processes.runs(range(5, 5 + count), together)
    assert [row for run in found for row in run] == list(range(5, 5 + count))
    assert 1 <= len(found) <= processes.RUNS
    if len(found) > 1:
        assert min(map(len, found)) >= 2
        assert all(run[0] % 1 == 0 and (run[0] - 5) % together == 0 for run in found)


def test_alone_nobody_waits() -> None:
    total = processes.summed([torch.zeros(2)], 3, lambda number: [torch.full((2,), float(number))])
    assert total[0].tolist() == [3.0, 3.0]
    assert processes.from_first(lambda: (1, 2)) == (1, 2)
    assert processes.shared_out({"small": 1.0, "large": 2.0}) == ["small", "large"]
    processes.wait()


def test_work_is_shared_out_by_size(monkeypatch) -> None:
    sizes = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 3.0, "e": 1.0}
    monkeypatch.setattr(processes, "world", lambda: 2)
    shares: list[list[str]] = []
    for rank in range(2):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(processes.shared_out(sizes))
    assert sorted(shares[0] + shares[1]) == list("abcde")
    assert abs(sum(sizes[name] for name in shares[0]) - sum(sizes[name] for name in shares[1])) <= 2
