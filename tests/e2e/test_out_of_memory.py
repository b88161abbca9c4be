"""An allocator that refuses: the batch is halved, the stage goes on to the same bytes, and the report says so; else there is one error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import roundel
from roundel.errors import MemoryLimitError, ModelError, damaged, is_out_of_memory
from roundel.stages import collecting, curvature, finish, passes
from roundel.stages import quantize as stage
from roundel.sweeps import Layers

GIVEN: dict[str, Any] = {
    "scheme": "int3-g32",
    "curvature": "kfac",
    "prefix_aware": True,
    "prefix_sequences": 8,
    "natural_places": 0,
    "batch_size": 4,
}


def refusing(most: int, calls: int, error: Exception) -> Callable[..., Any]:
    """`Layers.run` on a device on which the first so many calls with more than `most` sequences find no memory."""
    run, left = Layers.run, [calls]

    def refused(self: Layers, index: int, ids: torch.Tensor, hidden: torch.Tensor, **given: Any) -> torch.Tensor:
        if len(ids) > most and left[0] > 0:
            left[0] -= 1
            raise error
        return run(self, index, ids, hidden, **given)

    return refused


def gpu() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")


def cpu() -> Exception:
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
    )


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`limited(module, name, most, calls)`: within that function of a stage memory ends."""

    def limit(module: Any, name: str, most: int, calls: int = 1, error: Exception | None = None) -> None:
        real, refused = getattr(module, name), refusing(most, calls, error or gpu())

        def stage(*args: Any, **given: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(Layers, "run", refused)
                return real(*args, **given)

        monkeypatch.setattr(module, name, stage)

    return limit


STAGES = [(stage, "measure_curvature"), (stage, "round_model"), (finish, "evaluate_values"), (finish, "predict")]


@pytest.fixture(scope="module")
def whole(model, quantize, tmp_path_factory) -> roundel.Quantized:
    return quantize(model(), tmp_path_factory.mktemp("whole") / "out", **GIVEN)


def weights(result: roundel.Quantized) -> bytes:
    return (result.path / "model.safetensors").read_bytes()


def test_every_stage_goes_on_with_half_as_many(limited, whole, model, quantize, tmp_path: Path) -> None:
    for (module, name), error in zip(STAGES, [gpu, cpu, gpu, cpu], strict=True):
        limited(module, name, 1, error=error())
    found = quantize(model(), tmp_path / "out", **GIVEN)
    assert weights(found) == weights(whole)
    assert found.details["evaluation"]["kl"] == whole.details["evaluation"]["kl"]
    said = [warning for warning in found.details["warnings"] if "out of memory" in warning]
    assert said[0] == "out of memory with 4 sequences in a pass: the stage goes on with 2"
    assert len(said) == 2  # the second leaves one, with which no later stage is refused
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_the_trial_of_a_batch_counts_as_well(limited, whole, model, quantize, tmp_path: Path) -> None:
    limited(curvature, "safe_batch_size", 2, calls=1 << 30)
    sizes: list[int] = []
    real = stage.measure_curvature
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "measure_curvature", lambda *args, **given: sizes.append(given["batch_size"]) or real(*args, **given))
        assert weights(quantize(model(), tmp_path / "out", **GIVEN)) == weights(whole)
    assert sizes == [2]


def test_collecting_goes_on_too(limited, model, text, tmp_path: Path) -> None:
    given = {"curvature": "kfac", "sequences": 8, "seq_len": 32, "eval_sequences": 4, "batch_size": 4, "calibration": str(text)}
    roundel.collect_factors(model(), output=tmp_path / "whole", **given)
    limited(collecting, "as_many_as_fit", 2, calls=1)
    roundel.collect_factors(model(), output=tmp_path / "halved", **given)
    ours, theirs = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "halved"))
    assert ours == theirs


def test_where_one_sequence_is_too_much_it_is_one_error(limited, model, quantize, command, text, tmp_path: Path) -> None:
    limited(stage, "round_model", 0, calls=1 << 30)
    with pytest.raises(MemoryLimitError, match=r"out of memory \(CUDA out of memory. Tried to allocate 2.00 GiB.\): try"):
        quantize(model(), tmp_path / "out", **GIVEN)
    limited(stage, "measure_curvature", 0, calls=1 << 30)
    options = ["--sequences", 8, "--seq-len", 32, "--eval-sequences", 4, "--curvature", "kfac", "--scheme", "int3-g32", "--quiet"]
    outcome = command("quantize", model(), "-o", tmp_path / "out", "--calibration", text, *options)
    assert (outcome.code, outcome.out) == (6, "")
    assert outcome.err.startswith("error: out of memory")
    assert outcome.err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_memory_that_ends_anywhere_else_is_one_error_on_the_command_line(command, model, text, tmp_path: Path, monkeypatch) -> None:
    def refused(*_args: object, **_given: object) -> None:
        raise MemoryError

    monkeypatch.setattr(stage, "load_source", refused)
    outcome = command("quantize", model(), "-o", tmp_path / "out", "--calibration", text, "--quiet")
    assert outcome.code == 6
    assert outcome.err.startswith("error: out of memory: try")
    assert outcome.err.count("\n") == 1


def test_a_file_that_cannot_be_mapped_is_not_called_damaged() -> None:
    with pytest.raises(MemoryLimitError), damaged(ModelError, "x.safetensors"):
        raise RuntimeError("unable to mmap 527096 bytes from file <x.safetensors>: Cannot allocate memory (12)")
    with pytest.raises(ModelError), damaged(ModelError, "x.safetensors"):
        raise RuntimeError("can't allocate memory: you tried to allocate 72057594037927936 bytes")


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(OSError("out of memory"))
    with pytest.raises(RuntimeError, match="shapes"):
        passes.as_many_as_fit(lambda _size: torch.zeros(2, 3) @ torch.zeros(2, 3), 4, safe=int, warn=print)
