"""Everything that can go wrong gives one clear line and an exit code, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import roundel
from e2e import tiny

SHORT = ("--sequences", 8, "--seq-len", 32, "--eval-sequences", 4, "--scheme", "int4-g32")


@pytest.fixture
def copy(model, tmp_path_factory) -> Path:
    """A copy of the tiny Llama, to be damaged."""
    return Path(shutil.copytree(model(), tmp_path_factory.mktemp("damaged") / "model"))


@pytest.fixture
def fails(command, model, text, tmp_path) -> Callable[..., str]:
    """`fails(options..., model=...)`: a run of `quantize` that must fail cleanly; returns what it says after `error: `."""

    def run(*options: object, source: object = None, out: Path | None = None, code: int = 2) -> str:
        before = sorted(tmp_path.rglob("*"))
        source, out = source or model(), out or tmp_path / "out"
        outcome = command("quantize", source, "-o", out, "--calibration", text, *SHORT, "--quiet", *options)
        assert outcome.code == code, outcome
        assert outcome.out == ""
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1, outcome.err
        assert "Traceback" not in outcome.err
        assert sorted(tmp_path.rglob("*")) == before
        return outcome.err.removeprefix("error: ").strip()

    return run


# Models


def test_no_such_directory(fails, tmp_path) -> None:
    assert "no model at" in fails(source=tmp_path / "nowhere")
    assert "a Hub id like" in fails(source="nowhere")


def test_names_that_no_file_system_takes(fails, command, model, tmp_path) -> None:
    name = "a" * 300
    assert "no model at" in fails(source=name)
    assert "too long" in fails(out=tmp_path / name, code=4)
    assert "no file or directory" in fails("--calibration", name)
    for line in (("export", name, "-o", tmp_path / "x", "--to", "dense"), ("refine", name, "--reference", model(), "-o", tmp_path / "x")):
        found = command(*line)
        assert (found.code, found.err.count("\n")) == (2, 1), found


def test_hub_cannot_be_reached(fails) -> None:
    """Offline (HF_HUB_OFFLINE in tests/conftest.py), so no network is needed to fail."""
    message = fails(source="nobody-at-all/no-such-model")
    assert "nobody-at-all/no-such-model" in message
    assert "Hub" in message


class BrokenOffError(Exception):
    """As those of the clients that huggingface_hub has had, which are of no common type."""


@pytest.mark.parametrize(
    "error", [BrokenOffError("peer closed connection"), ConnectionResetError(104, "reset"), TimeoutError(), RuntimeError()]
)
def test_a_download_that_breaks_off(error, fails, monkeypatch) -> None:
    def breaks_off(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr("roundel.models.load.snapshot_download", breaks_off)
    message = fails(source="someone/some-model")
    assert "the Hub could not deliver" in message
    assert not message.endswith(": ")
    monkeypatch.setattr("datasets.load_dataset", breaks_off)
    assert "no Hub dataset of that name could be read: " in fails("--calibration", "someone/some-text")


def test_directory_without_config(fails, copy) -> None:
    (copy / "config.json").unlink()
    assert "has no config.json" in fails(source=copy)


def test_config_is_not_json(fails, copy) -> None:
    (copy / "config.json").write_text('{"model_type": "llama", ')
    message = fails(source=copy)
    assert str(copy) in message
    assert "JSON" in message


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_unknown_architecture(fails, copy) -> None:
    change_config(copy, model_type="zebra", architectures=["ZebraForCausalLM"])
    assert "zebra" in fails(source=copy)


def test_not_a_causal_language_model(fails, copy) -> None:
    change_config(copy, model_type="vit", architectures=["ViTModel"])
    assert str(copy) in fails(source=copy)


def test_no_tokenizer(fails, copy) -> None:
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in fails(source=copy)


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(name, value, fails, copy) -> None:
    change_weights(copy, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    message = fails(source=copy)
    assert name in message
    assert "NaN" in message


def test_a_missing_weight(fails, copy) -> None:
    change_weights(copy, lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.weight"))
    message = fails(source=copy)
    assert "model.layers.0.self_attn.k_proj.weight" in message
    assert "lacks 1 weight" in message


def test_a_weight_of_another_shape(fails, copy) -> None:
    change_weights(copy, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    message = fails(source=copy)
    assert "model.norm.weight" in message
    assert "(7,)" in message
    assert "(64,)" in message


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden_size": "abc"}, "hidden_size"),
        ({"num_attention_heads": 0}, "zero"),
        ({"num_attention_heads": 5}, "heads"),
        ({"hidden_act": "zz"}, "zz"),
    ],
    ids=str,
)
def test_config_that_describes_no_model(change, word, fails, copy) -> None:
    change_config(copy, **change)
    message = fails(source=copy)
    assert str(copy) in message
    assert word in message


def test_tokenizer_that_cannot_be_read(fails, copy) -> None:
    """Tokenizers raises a bare `Exception`."""
    path = copy / "tokenizer.json"
    path.write_text(path.read_text().replace('"BPE"', '"XYZ"'))
    assert f"cannot load the tokenizer in {copy}" in fails(source=copy)


def test_tokenizer_of_another_model(fails, copy) -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(200, 64), "lm_head.weight": torch.ones(200, 64)}
    change_weights(copy, lambda stored: stored.update(tensors))
    change_config(copy, vocab_size=200)
    assert "vocabulary has 200 tokens" in fails(source=copy)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_truncated_file(kept, fails, copy) -> None:
    path = copy / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    assert str(copy) in fails(source=copy)


def test_only_pickled_weights(fails, copy) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    message = fails(source=copy)
    assert "no *.safetensors" in message
    assert "pickled" in message


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "another"])
def test_quantized_already(method, fails, copy) -> None:
    change_config(copy, quantization_config={"quant_method": method, "bits": 4, "group_size": 32, "load_in_4bit": True})
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, "model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)}, copy / "model.safetensors")
    message = fails(source=copy)
    assert f"{copy} is quantized already ({method})" in message


EVIL = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig as EvilConfig, LlamaForCausalLM as EvilModel
"""


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_in_a_checkpoint_is_never_executed(model_type, fails, copy, quantize, tmp_path, tmp_path_factory, monkeypatch) -> None:
    # An answer to "do you wish to run the custom code?", should anything ask.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    marker = tmp_path_factory.mktemp("evil") / "executed"
    (copy / "evil.py").write_text(EVIL.format(marker=str(marker)))
    code = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel", "AutoTokenizer": ["evil.EvilTokenizer", None]}
    change_config(copy, model_type=model_type, auto_map=code)
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": code["AutoTokenizer"]}}))
    if model_type == "llama":
        result = quantize(copy, tmp_path / "out", scheme="int4-g32")
        assert not list(result.path.glob("*.py"))
    else:
        assert str(copy) in fails(source=copy)
    assert not marker.exists()


# Settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scheme", "int4-g40"), ("group size 40", "int4-g64")),
        (("--scheme", "int4-g128"), ("width 64;", "int4-g64")),  # of six linears in a layer, 96 of one
        (("--scheme", "int9-g32"), ("int9", "2 to 8")),
        (("--scheme", "int4-g0"), ("group size 0",)),
        (("--scheme", "fp4"), ("unknown scheme 'fp4'", "int4-g128")),
        (("--curvature", "hessian"), ("unknown curvature 'hessian'", "kfac")),
        (("--curvature", "kfac:rounds=2"), ("'kfac'", "'rounds=2'")),
        (("--curvature", "sketch-a:rounds=two"), ("rounds=two",)),
        (("--curvature", "sketch-a:rounds=0"), ("rounds",)),
        (("--sequences", "0"), ("sequences", "1 or more")),
        (("--seq-len", "1"), ("seq_len", "2 or more")),
        (("--eval-sequences", "-3"), ("eval_sequences",)),
        (("--sweeps", "-1"), ("sweeps",)),
        (("--damping", "0"), ("damping",)),
        (("--damping", "nan"), ("damping",)),
        (("--seed", "-1"), ("seed",)),
        (("--include", "*.nothing"), ("*.nothing",)),
        (("--exclude", "*"), ("no linear is left",)),
        (("--exclude", "*.q_proj"), ("k_proj, model.layers.0.self_attn.q_proj", "one product", "--format native")),
        (("--include", "*.up_proj", "--format", "gptq", "--scheme", "int4-g32"), ("gate_proj", "one product", "in gptq")),
        (("--include", "re:("), ("re:(", "regular expression")),
        (("--device", "abacus"), ("abacus",)),
        (("--dtype", "float8"), ("float8", "bfloat16")),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_settings_that_cannot_work(options, words, fails) -> None:
    message = fails(*options)
    assert all(word in message for word in words), message


def test_unknown_setting_in_python(model, tmp_path) -> None:
    with pytest.raises(TypeError, match="colour"):
        roundel.quantize(model(), output=tmp_path / "out", colour="red")
    assert not (tmp_path / "out").exists()


def test_a_group_that_fits_some_linears_skips_the_others(model, quantize, tmp_path) -> None:
    result = quantize(model(), tmp_path / "out", scheme="int4-g64")
    assert set(result.details["skipped"]) == {f"model.layers.{k}.mlp.down_proj" for k in range(2)}
    assert all("group size 64" in reason for reason in result.details["skipped"].values())


# Text


@pytest.fixture
def texts(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("texts")


def test_empty_text(fails, texts) -> None:
    (texts / "empty.txt").write_text("")
    message = fails("--calibration", texts / "empty.txt")
    assert "it has 0 tokens" in message
    assert f"needed are {12 * 32} tokens" in message
    (texts / "blank.jsonl").write_text('{"text": "  "}\n\n')
    assert "it has 0 tokens" in fails("--calibration", texts / "blank.jsonl")


def test_short_text(fails, texts) -> None:
    (texts / "short.txt").write_text(tiny.make_text(600))
    message = fails("--calibration", texts / "short.txt")
    assert "too little text" in message
    has = int(message.partition("it has ")[2].split()[0])
    assert 0 < has < 12 * 32
    assert f"{has // 32} sequences of 32" in message
    assert f"needed are {12 * 32} tokens, 8 sequences to calibrate and 4 held out" in message


def test_short_evaluation_text(fails, texts) -> None:
    (texts / "short.txt").write_text("Hi.")
    assert "not one sequence of 32 tokens" in fails("--eval-data", texts / "short.txt")


def test_missing_text(fails, texts) -> None:
    message = fails("--calibration", texts / "nothing.txt")
    assert str(texts / "nothing.txt") in message


def test_bad_lines(fails, texts) -> None:
    good = json.dumps({"text": tiny.make_text(9000)})
    path = texts / "lines.jsonl"
    path.write_text("{broken\n")
    assert f"{path}, line 1: expected a JSON object with the key 'text'" in fails("--calibration", path)
    path.write_text(f'{{"body": 1}}\n{good}\n')
    assert "line 1" in fails("--calibration", path)
    path.write_text('{"text": 1}\n')
    assert "is no string" in fails("--calibration", path)
    path.write_text("[1, 2]\n")
    assert "line 1" in fails("--calibration", path)
    path.write_text(good)
    assert "key 'body'" in fails("--calibration", f"{path}:field=body")
    assert "num=x" in fails("--calibration", f"{path}:num=x")
    assert "'split'" in fails("--calibration", f"{path}:split=train")
    assert "expected key=value" in fails("--calibration", f"{path}:train")


def test_text_that_is_not_text(fails, texts) -> None:
    (texts / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 100)
    assert "not UTF-8" in fails("--calibration", texts / "latin.txt")
    (texts / "empty").mkdir()
    assert "holds no .txt" in fails("--calibration", texts / "empty")


def test_evaluate_fails_as_clearly(command, model, quantized, text, texts, copy) -> None:
    (texts / "short.txt").write_text("Hi.")
    good = {"--reference": model(), "--data": text, "--seq-len": 32, "--sequences": 2}
    change_weights(
        copy, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.ones(200, 64), "lm_head.weight": torch.ones(200, 64)})
    )
    change_config(copy, vocab_size=200)
    for change, word in [
        ({"--data": texts / "short.txt"}, "not one sequence of 32"),
        ({"--data": texts / "none.txt"}, "none.txt"),
        ({"--data": "self"}, "evaluation needs text"),
        ({"--reference": texts / "none"}, "no model at"),
        ({"--seq-len": 1}, "at least 2"),
        ({"--sequences": 0}, "at least 1"),
        ({"--reference": copy}, "vocabular"),
    ]:
        options = [part for pair in {**good, **change}.items() for part in pair]
        code, stdout, stderr = command("evaluate", quantized.path, *options, "--quiet")
        assert (code, stdout) == (2, ""), stderr
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1
        assert word in stderr


# The disk


def test_output_that_is_not_empty(fails, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    assert "not an empty directory" in fails()
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    assert "not an empty directory" in fails(out=tmp_path / "out" / "mine.txt")


def test_output_in_an_impossible_place(fails, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made" in fails(out=tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_in_an_unwritable_place(fails, tmp_path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "may write to" in fails(out=tmp_path / "locked" / "out")


def test_output_on_a_read_only_file_system(fails) -> None:
    """What only shows when the directory is made, as for root."""
    message = fails(out=Path("/proc/roundel/out"), code=4 if os.geteuid() == 0 else 2)
    assert "/proc" in message


@pytest.fixture
def small_disk(quantized) -> Iterator[None]:
    """No file may grow beyond 20 000 bytes: a real error of the file system. (`quantized`: compiled kernels are in their cache before.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_disk")
def test_file_too_large_for_the_disk(fails) -> None:
    message = fails(code=4)
    assert "0001-00.safetensors failed" in message  # the first group's curvature
    assert "arge" in message
    message = fails("--curvature", "identity", "--include", "*.o_proj", code=4)  # whose curvature and codes fit
    assert "model.safetensors failed" in message
    assert "arge" in message


@pytest.mark.parametrize("where", ["save_file", "json.dumps", "os.replace", "tempfile.mkdtemp", "shutil.copyfile"])
def test_full_disk(where, fails, monkeypatch) -> None:
    """Wherever writing stops."""

    def full(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "json.dumps":  # the first small file, after the weights
        monkeypatch.setattr("pathlib.Path.write_text", full)
    else:
        monkeypatch.setattr(f"roundel.store.{where}", full)
    assert "no space is left on the disk" in fails(code=4)


def test_report_that_cannot_be_written(command, model, text, quantized, tmp_path) -> None:
    report = tmp_path / "missing" / "report.json"
    arguments = ("--data", text, "--sequences", 1, "--seq-len", 32, "--json", report, "--quiet")
    code, stdout, stderr = command("evaluate", quantized.path, "--reference", model(), *arguments)
    assert (code, stdout) == (4, "")
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


# Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminated"])
def test_signals_while_the_output_is_half_written(number, code, command, model, text, tmp_path, monkeypatch) -> None:
    seen = []

    def interrupt(*_args: object, **_options: object) -> None:
        seen.extend(tmp_path.rglob("model.safetensors"))
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr("roundel.stages.finish.evaluate_values", interrupt)
    outcome = command("quantize", model(), "-o", tmp_path / "out", "--calibration", text, *SHORT, "--quiet")
    assert len(seen) == 1
    assert outcome.code == code
    assert "Traceback" not in outcome.err
    assert not any(tmp_path.iterdir())


ANNOUNCED = """
import roundel.stages.curvature
from roundel.commands.app import main

def announced(*args, collect_visit=roundel.stages.curvature.collect_visit, **options):
    print("curvature", flush=True)
    return collect_visit(*args, **options)

roundel.stages.curvature.collect_visit = announced
main()
"""


def test_signals_in_the_curvature_stage(model, tmp_path) -> None:
    """To two real processes at once, because each takes seconds to start; the stage would go on for minutes."""
    text = tmp_path / "long.txt"
    text.write_text(tiny.make_text(60_000))
    wanted = {signal.SIGINT: 130, signal.SIGTERM: 143}
    options = ["--calibration", text, *SHORT, "--sequences", 400, "--curvature", "sketch-a:rounds=200", "--batch-size", 1]
    running = {}
    try:
        for number in wanted:
            place = tmp_path / number.name
            place.mkdir()
            line = [sys.executable, "-c", ANNOUNCED, "quantize", model(), "-o", place / "out", *options]
            running[number] = subprocess.Popen([str(part) for part in line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number, process in running.items():
            assert process.stdout.readline() == "curvature\n"
            time.sleep(0.5)
            process.send_signal(number)
        for number, process in running.items():
            _, stderr = process.communicate(timeout=60)
            assert process.returncode == wanted[number], stderr
            assert "Traceback" not in stderr
            assert ("interrupted" in stderr) == (number == signal.SIGINT)
            assert not any((tmp_path / number.name).iterdir())
    finally:
        for process in running.values():
            process.kill()
            process.communicate()
