"""A job that ends early goes on where it was and ends with the same bytes; one that cannot be done leaves nothing behind."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import roundel
from e2e import ranks, tiny
from roundel.artifacts import curvatures, rounded
from roundel.artifacts.curvatures import Curvatures
from roundel.artifacts.rounded import RoundedFiles
from roundel.artifacts.work import open_work
from roundel.errors import MemoryLimitError, StorageError
from roundel.models import offload
from roundel.progress import Silent
from roundel.stages import quantize as quantize_stage
from roundel.stages import space
from roundel.stages.rounding import natural
from roundel.sweeps import HiddenStates, Layers, hidden

LAYERS = 3
GIVEN: dict[str, Any] = {
    "scheme": "int3-g16",
    "curvature": "kfac",
    "prefix_aware": True,
    "prefix_sequences": 6,
    "natural_places": 1,
    "sequences": 6,
    "seq_len": 16,
    "eval_sequences": 2,
    "sweeps": 1,
}
AUTO: dict[str, Any] = {"curvature": "auto:holdout=2", "sequences": 16, "include": ("*.mlp.*",)}
"""Enough sequences that some are held out to choose by."""


@pytest.fixture(scope="module", autouse=True)
def short_steps() -> Iterator[None]:
    """Natural-gradient steps on few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(natural, "STEP_TOKENS", 64)
        yield


class Watching(Silent):
    """Keeps what is said, and the largest size of a directory at any step."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.largest, self.said = directory, 0, list[str]()

    @contextmanager
    def stage(self, title: str, total: int, *, share: float = 1.0) -> Iterator[Callable[[int], None]]:
        yield lambda _units: self.look()
        self.look()

    def look(self) -> None:
        found = 0
        for path in self.directory.rglob("*"):
            with suppress(FileNotFoundError):
                found += path.stat().st_size
        self.largest = max(self.largest, found)

    def say(self, message: str) -> None:
        self.said.append(message)


class KilledError(BaseException):
    """Stands for the end of the process, which nothing may catch."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """A model of three layers."""
    directory = tmp_path_factory.mktemp("deep") / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**tiny.MODERN, "num_hidden_layers": LAYERS})).save_pretrained(directory)
    tiny.make_tokenizer(starts=False).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def whole(deep, quantize, tmp_path_factory) -> roundel.Quantized:
    """Without a work directory, in one go."""
    return quantize(deep, tmp_path_factory.mktemp("whole") / "out", **GIVEN)


def weights(result: roundel.Quantized | Path) -> bytes:
    return ((result if isinstance(result, Path) else result.path) / "model.safetensors").read_bytes()


def same(first: roundel.Quantized, second: roundel.Quantized) -> bool:
    """Bytes, and whatever is measured and reported of them; a model that stays on the disk continues no text."""
    volatile = {"seconds", "resources", "layers"}
    if not (first.details["continuations"] and second.details["continuations"]):
        volatile.add("continuations")
    rows = [{name: {**row, "seconds": 0} for name, row in result.details["layers"].items()} for result in (first, second)]
    details = [{key: value for key, value in result.details.items() if key not in volatile} for result in (first, second)]
    return weights(first) == weights(second) and rows[0] == rows[1] and details[0] == details[1]


class Kill:
    """Within the context no call of the method is made any more after so many."""

    def __init__(self, owner: type, method: str, after: int) -> None:
        self.owner, self.method, self.after, self.patch = owner, method, after, pytest.MonkeyPatch()
        self.calls = 0

    def __enter__(self) -> Kill:
        real = getattr(self.owner, self.method)

        def counted(*args: Any, **settings: Any) -> Any:
            self.calls += 1
            if self.calls > self.after:
                raise KilledError
            return real(*args, **settings)

        self.patch.setattr(self.owner, self.method, counted)
        return self

    def __exit__(self, *_error: object) -> None:
        self.patch.undo()


@pytest.fixture(scope="module")
def begun(deep, quantize, tmp_path_factory) -> Path:
    """The work directory of a job that was killed after its first group of codes; to be copied."""
    place = tmp_path_factory.mktemp("begun")
    with Kill(RoundedFiles, "save", 1), pytest.raises(KilledError):
        quantize(deep, place / "out", **GIVEN, work=place / "work")
    assert [path.name for path in place.iterdir()] == ["work"]
    return place / "work"


POINTS = [(HiddenStates, "write"), (HiddenStates, "finish"), (Curvatures, "save"), (RoundedFiles, "save")]


@pytest.fixture(scope="module")
def kept(deep, quantize, tmp_path_factory) -> tuple[Path, roundel.Quantized, dict[tuple[type, str], int]]:
    """A work directory, what was made with it, and how often each of `POINTS` was passed; not to be changed."""
    place = tmp_path_factory.mktemp("kept")
    with ExitStack() as stack:
        counting = {point: stack.enter_context(Kill(*point, after=1 << 30)) for point in POINTS}
        made = quantize(deep, place / "out", **GIVEN, work=place / "work")
    return place / "work", made, {point: kill.calls for point, kill in counting.items()}


def test_a_work_directory_changes_nothing(deep, kept, whole, quantize, tmp_path) -> None:
    work, made, _ = kept
    assert same(made, whole)
    assert {path.name for path in work.parent.iterdir()} == {"out", "work"}
    again = quantize(deep, tmp_path / "again", **GIVEN, work=work)
    assert same(again, whole)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point[0].__name__}-{point[1]}")
def test_killed_at_random_points_it_ends_with_the_same_bytes(point, kept, deep, whole, quantize, tmp_path) -> None:
    """Each run is killed after some more of what the last one still had to do."""
    owner, method = point
    generator = random.Random(f"{owner.__name__}.{method}")
    total, runs = kept[2][point], 0
    assert total >= LAYERS
    resumed = None
    while resumed is None:
        runs += 1
        after = generator.randrange(max(1, total // 2)) if runs <= 3 else 1 << 30
        with Kill(owner, method, after):
            try:
                resumed = quantize(deep, tmp_path / "out", **GIVEN, work=tmp_path / "work")
            except KilledError:
                assert not (tmp_path / "out").exists()
    assert runs > 1
    assert same(resumed, whole)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "work"}


def test_what_is_finished_is_not_done_again(deep, whole, quantize, tmp_path) -> None:
    work = tmp_path / "work"
    with Kill(Curvatures, "save", 2), pytest.raises(KilledError):
        quantize(deep, tmp_path / "out", **GIVEN, work=work)
    assert [path.name for path in sorted((work / "curvature").glob("????.safetensors"))] == ["0001.safetensors", "0002.safetensors"]
    with Kill(RoundedFiles, "save", 2), Kill(Curvatures, "save", 1), pytest.raises(KilledError):  # the other one and no more
        quantize(deep, tmp_path / "out", **GIVEN, work=work)
    assert [path.name for path in sorted((work / "rounded").glob("0*"))] == ["0000.safetensors", "0001.safetensors"]
    with Kill(RoundedFiles, "save", 1), Kill(Curvatures, "save", 0):
        assert same(quantize(deep, tmp_path / "out", **GIVEN, work=work), whole)


@pytest.mark.parametrize(
    "settings",
    [
        AUTO,
        {"scheme": "nvfp4", "prefix_aware": False},
        pytest.param({"bits": 4.5}, marks=pytest.mark.slow),
        pytest.param({"scheme": "lattice2", "include": ("*.v_proj",)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_recipes_go_on_too(settings, deep, quantize, tmp_path) -> None:
    given = {**GIVEN, **settings}
    expected = quantize(deep, tmp_path / "whole", **given)
    for owner in (Curvatures, RoundedFiles):
        with Kill(owner, "save", 2), pytest.raises(KilledError):
            quantize(deep, tmp_path / "out", **given, work=tmp_path / "work")
    assert same(quantize(deep, tmp_path / "out", **given, work=tmp_path / "work"), expected)


def test_killed_in_the_natural_steps_or_after_them(deep, whole, quantize, tmp_path) -> None:
    """Which are not taken again once they are."""
    assert [row["before_layer"] for row in whole.details["natural_steps"]] == ["model.layers.2"]
    with Kill(natural.NaturalSteps, "_step", 2), pytest.raises(KilledError):
        quantize(deep, tmp_path / "out", **GIVEN, work=tmp_path / "work")
    with Kill(RoundedFiles, "save", 0), pytest.raises(KilledError):  # the last layer, which they are taken before
        quantize(deep, tmp_path / "out", **GIVEN, work=tmp_path / "work")
    with Kill(natural.NaturalSteps, "_step", 0):
        assert same(quantize(deep, tmp_path / "out", **GIVEN, work=tmp_path / "work"), whole)


def test_from_factors_it_goes_on_too(deep, text, quantize, tmp_path) -> None:
    collected = {name: GIVEN[name] for name in ("curvature", "sequences", "seq_len", "eval_sequences")}
    roundel.collect_factors(deep, output=tmp_path / "factors", calibration=str(text), **collected)
    given = {**GIVEN, "factors": tmp_path / "factors"}
    expected = quantize(deep, tmp_path / "whole", **given)
    for owner in (Curvatures, RoundedFiles):
        with Kill(owner, "save", 1), pytest.raises(KilledError):
            quantize(deep, tmp_path / "out", **given, work=tmp_path / "work")
    assert same(quantize(deep, tmp_path / "out", **given, work=tmp_path / "work"), expected)


def line(model: Path, text: Path, place: Path) -> list[str]:
    options = [
        (f"--{name.replace('_', '-')}", str(value)) for name, value in {**GIVEN, "natural_places": 0}.items() if name != "prefix_aware"
    ]
    given = [*itertools.chain(*options), "--prefix-aware", "--calibration", str(text), "--batch-size", "1", "--quiet"]
    return ["quantize", str(model), "-o", str(place / "out"), "--work", str(place / "work"), *given]


@pytest.mark.slow
def test_real_kills_on_the_command_line(deep, text, quantize, tmp_path) -> None:
    expected = quantize(deep, tmp_path / "whole", **{**GIVEN, "natural_places": 0})
    generator = random.Random(11)

    def files(stage: str) -> int:
        return len(list((tmp_path / "work" / stage).glob("0*.safetensors")))

    for stage, least in (("curvature", 2), ("rounded", 1)):
        job = ranks.Job(1, *line(deep, text, tmp_path))
        (process,) = job.processes
        while process.is_alive() and files(stage) < least:
            time.sleep(0.002)
        time.sleep(0.05 * generator.random())
        process.kill()
        assert job.wait()[0].code == -signal.SIGKILL
        assert files(stage) >= least
        assert not (tmp_path / "out").exists()
    assert ranks.run(1, *line(deep, text, tmp_path))[0].code == 0
    assert weights(tmp_path / "out") == weights(expected)


# Whose directory it is


def test_a_second_process_is_refused(deep, text, quantize, tmp_path) -> None:
    with open_work(tmp_path / "work", beside=tmp_path / "out", memory=None):
        (other,) = ranks.run(1, *line(deep, text, tmp_path))
        assert other.code == StorageError.exit_code
        assert f"another process is at work in {tmp_path / 'work'}" in other.err
        with pytest.raises(StorageError, match=f"another process is at work in {tmp_path / 'work'}"):
            quantize(deep, tmp_path / "out", **GIVEN, work=tmp_path / "work")
    assert not (tmp_path / "out").exists()
    with open_work(tmp_path / "work", beside=tmp_path / "out", memory=None):
        pass  # the lock went with the process


CHANGES: list[dict[str, Any]] = [
    {"scheme": "int4-g16"},
    {"seed": 1},
    {"sequences": 7},
    {"prefix_aware": False},
    {"prefix_strength": 0.6},
    {"natural_places": 0},
    {"sweeps": 2},
    {"exclude": ("*.o_proj",)},
]


def test_another_job_is_refused(begun, deep, model, whole, quantize, tmp_path) -> None:
    work = tmp_path / "work"
    shutil.copytree(begun, work)
    for changed in CHANGES:
        with pytest.raises(StorageError, match="holds the work of another job") as caught:
            quantize(deep, tmp_path / "out", **{**GIVEN, **changed}, work=work)
        assert str(work) in str(caught.value)
    with pytest.raises(StorageError, match="another job"):
        quantize(model(), tmp_path / "out", **GIVEN, work=work)
    assert not (tmp_path / "out").exists()
    other = quantize(
        deep, tmp_path / "out", **{**GIVEN, "effort": "best", "tune": "none"}, work=work, batch_size=3
    )  # of which no code depends
    assert weights(other) == weights(whole)


@pytest.mark.parametrize("file", ["job.json", "curvature/0000.safetensors", "rounded/0000.safetensors"])
def test_a_damaged_directory_says_which_file_to_remove(file, begun, deep, quantize, tmp_path) -> None:
    shutil.copytree(begun, tmp_path / "work")
    path = tmp_path / "work" / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StorageError, match=r"remove .* and start again") as caught:
        quantize(deep, tmp_path / "out", **GIVEN, work=tmp_path / "work")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


# The disk


def full(*_args: object, **_settings: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def after(calls: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """Works so often, then the disk is full."""
    left = itertools.count()
    return lambda *args, **settings: real(*args, **settings) if next(left) < calls else full()


DISKS = {
    "forward": (hidden.os, "pwritev", GIVEN["sequences"] + 1),
    "backward": (hidden.os, "pwritev", GIVEN["sequences"] * (LAYERS + 2) + 1),
    "rounding": (hidden.os, "pwritev", GIVEN["sequences"] * (2 * LAYERS + 4) + 1),
    "factors": (curvatures, "save_file", 1),
    "codes": (rounded, "save_file", 1),
    "first file": (hidden.os, "ftruncate", 0),
    "rename": (hidden.Path, "replace", 1),
}


@pytest.mark.parametrize(("where", "stays"), list(zip(DISKS, itertools.cycle([True, False]))))
def test_a_full_disk_is_one_error_and_leaves_no_output(where: str, stays: bool, deep, whole, quantize, tmp_path) -> None:
    owner, name, calls = DISKS[where]
    place = {"work": tmp_path / "work"} if stays else {"memory": "1K"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, after(calls, getattr(owner, name)))
        with pytest.raises(StorageError, match="no space is left on the disk"):
            quantize(deep, tmp_path / "out", **GIVEN, **place)
    assert {path.name for path in tmp_path.iterdir()} == ({"work"} if stays else set())
    if stays:  # with more room it goes on
        assert same(quantize(deep, tmp_path / "out", **GIVEN, **place), whole)


# Memory


@pytest.fixture
def loads(monkeypatch) -> Iterator[list[str]]:
    """Modules whose weights were brought from the disk."""
    seen: list[str] = []
    loaded = offload.FileWeights.loaded

    def watched(self: offload.FileWeights, modules: list[str]) -> Any:
        seen.extend(modules)
        return loaded(self, modules)

    monkeypatch.setattr(offload.FileWeights, "loaded", watched)
    return seen


PASSING, KEPT = {"memory": "100K"}, {"memory": 1000, "work": "work"}


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({}, [PASSING, KEPT]),
        (AUTO, [PASSING]),
        ({"scheme": "int4-g32-affine", "format": "mlx"}, [PASSING]),  # with embedding and head
        pytest.param({"bits": 4.5}, [KEPT], marks=pytest.mark.slow),
        pytest.param({"scheme": "trellis2-s6", "include": ("*.?_proj",)}, [PASSING], marks=pytest.mark.slow),
        ({"prefix_aware": False}, [KEPT]),
    ],
    ids=str,
)
def test_without_memory_it_is_the_same(settings, places, deep, whole, quantize, tmp_path, loads, monkeypatch) -> None:
    """Everything goes to files and the model is loaded layer by layer; nothing is left beside the output."""
    monkeypatch.chdir(tmp_path)
    given = {**GIVEN, **settings}
    with_memory = quantize(deep, tmp_path / "with", **given) if settings else whole
    assert loads == []
    for place in places:
        result = quantize(deep, tmp_path / str(place["memory"]), **given, **place)
        assert same(result, with_memory)
        assert set(loads) == {f"model.layers.{index}" for index in range(LAYERS)}
        loads.clear()
    left = {str(place["memory"]) for place in places} | {place["work"] for place in places if "work" in place}
    assert {path.name for path in tmp_path.iterdir()} == left | ({"with"} if settings else set())


def test_a_head_is_in_memory_between_its_first_call_and_the_next_layer(deep, tmp_path) -> None:
    model, weights = offload.load_on_demand(deep, device=torch.device("cpu"), dtype=torch.float32, folder=tmp_path)
    whole, layers, ids = AutoModelForCausalLM.from_pretrained(deep), Layers(model, weights), torch.arange(9)[None]
    hidden = layers.embed(ids)
    for index in range(LAYERS):
        with layers.loaded(index):
            assert model.lm_head.weight.is_meta
            hidden = layers.run(index, ids, hidden)
    expected = whole(ids).logits
    torch.testing.assert_close(layers.logits(ids, hidden), expected)
    assert not model.lm_head.weight.is_meta
    for _ in range(2):  # there, and not
        with layers.replaced({"lm_head.weight": torch.zeros(expected.shape[-1], hidden.shape[-1])}):
            assert not layers.logits(ids, hidden).any()
            with layers.loaded(0):
                assert not layers.logits(ids, hidden).any()
        torch.testing.assert_close(layers.logits(ids, hidden), expected)
        with layers.loaded(0):
            assert model.lm_head.weight.is_meta


def test_without_memory_it_goes_on_too(deep, whole, quantize, tmp_path) -> None:
    for owner in (Curvatures, RoundedFiles):
        with Kill(owner, "save", 2), pytest.raises(KilledError):
            quantize(deep, tmp_path / "out", **GIVEN, work=tmp_path / "work", memory="1K")
    assert same(quantize(deep, tmp_path / "out", **GIVEN, work=tmp_path / "work"), whole)


def test_collecting_without_memory_is_the_same(deep, text, tmp_path, loads) -> None:
    collected = {name: GIVEN[name] for name in ("curvature", "sequences", "seq_len", "eval_sequences")}
    for name, memory in (("with", None), ("without", "1K")):
        roundel.collect_factors(deep, output=tmp_path / name, calibration=str(text), **collected, memory=memory)
    assert loads
    ours, theirs = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("with", "without"))
    assert ours == theirs
    assert {path.name for path in tmp_path.iterdir()} == {"with", "without"}


def test_what_needs_the_whole_model_says_so(command, deep, text, tmp_path) -> None:
    short = ["--sequences", 8, "--seq-len", 16, "--eval-sequences", 4, "--scheme", "int4-g16", "--memory", "1K", "--quiet"]
    for options in (["--calibration", "self"], ["--calibration", text, "--tune", "end-to-end", "--tune-steps", 1]):
        outcome = command("quantize", deep, "-o", tmp_path / "out", *short, *options)
        assert outcome.code == 2
        assert "needs the whole model in memory" in outcome.err
        assert "--memory" in outcome.err
    assert command("quantize", deep, "-o", tmp_path / "out", *short, "--calibration", text, "--memory", "much").code == 2
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("place", "error"), [("measure_curvature", MemoryError), ("round_model", KilledError), ("finish", KeyboardInterrupt)]
)
def test_whatever_ends_it_nothing_is_left_beside_the_output(place, error, deep, quantize, tmp_path, monkeypatch) -> None:
    def ends(*_args: object, **_settings: object) -> None:
        raise error

    monkeypatch.setattr(quantize_stage, place, ends)
    with pytest.raises(MemoryLimitError if error is MemoryError else error):
        quantize(deep, tmp_path / "out", **GIVEN, memory="1K")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings",
    [{}, {"curvature": "guided:groups=2", "factor_type": "bfloat16"}, {"tune": "end-to-end", "tune_steps": 8, "tune_tokens": 64}, AUTO],
    ids=str,
)
def test_what_a_job_takes_is_said_before(settings, model, text, tmp_path, monkeypatch) -> None:
    """A bound that holds, and is no more than some times what it bounds."""
    bounds: list[space.Space] = []
    real = space.bound
    monkeypatch.setattr(space, "bound", lambda *args: bounds.append(real(*args)) or bounds[-1])
    watching = Watching(tmp_path / "work")
    roundel.quantize(
        model(), output=tmp_path / "out", calibration=str(text), work=tmp_path / "work", progress=watching, **{**GIVEN, **settings}
    )
    (found,) = bounds
    said = next(message for message in watching.said if message.startswith(f"{tmp_path / 'work'}: up to"))
    assert "hidden states" in said
    assert ("tuning" in said) == ("tune" in settings)
    assert watching.largest <= found.total <= 5 * watching.largest
    before = len(watching.said)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _path: SimpleNamespace(free=found.total - 1))
    roundel.quantize(
        model(), output=tmp_path / "again", calibration=str(text), work=tmp_path / "work", progress=watching, **{**GIVEN, **settings}
    )
    assert any("may be needed" in message for message in watching.said[before:])
