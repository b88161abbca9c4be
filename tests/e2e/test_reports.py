"""The pages are whole, need nothing from elsewhere, and open in a browser; the original's logits are kept and found again."""

from __future__ import annotations

import base64
import copy
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import roundel
from e2e import tiny
from roundel.evaluate import cached
from roundel.evaluate.report import evaluated_page, labels, quantized_page
from roundel.formats import gguf
from roundel.models import Checkpoint, load_model

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

LOADED = """<script>addEventListener("load", () => {
  document.title = JSON.stringify([...document.images].map(image => image.complete && image.naturalWidth > 0));
})</script>"""


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "other.txt"
    path.write_text(tiny.make_text(3000, seed=9), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def evaluated(model, quantized, text, other, tmp_path_factory) -> tuple[dict[str, object], Path]:
    """All that `evaluate` can measure without lm-evaluation-harness, and its page."""
    found = roundel.evaluate(
        quantized.path, reference=model(), data=[str(text), str(other)], sequences=6, seq_len=32, perplexity=[str(text)], window=64
    )
    path = tmp_path_factory.mktemp("page") / "evaluation.html"
    path.write_text(evaluated_page(found.details), encoding="utf-8")
    return found.details, path


def pictures(page: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"data:image/png;base64,([^\"]+)", page)]


def test_the_report_of_a_checkpoint_is_one_file_with_every_number(quantized) -> None:
    page = (quantized.path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=\"(?!data:)|<script|<link|url\(|@import", page)
    found = quantized.details["evaluation"]
    assert f"{found['kl']['mean']:.4g}" in page
    assert f"{100 * (1 - found['top1_agreement']):.2f} %" in page
    for name, row in quantized.details["layers"].items():
        assert f"<td>{name}</td>" in page
        assert f"{row['bits_per_weight']:.3f}" in page
    shown = pictures(page)
    assert len(shown) == page.count("<figure>") == 3  # predicted and measured, where it is lost, along a sequence
    assert all(image.width > 400 and len(image.convert("L").getcolors()) > 20 for image in shown)


def test_what_was_done_besides_is_on_the_page(quantized) -> None:
    details = copy.deepcopy(quantized.details)
    details["warnings"] = ["something <odd>"]
    details["skipped"] = {"model.layers.1.x": "for a reason"}
    history = [{"step": 0, "held_out_kl": 0.2}, {"step": 5, "held_out_kl": 0.1, "calibration_kl": 0.08}]
    kls = {"before": 0.2, "after": 0.1}
    details["tuning"] = {"method": "end-to-end", "best_step": 5, "history": history, "held_out_kl": kls}
    first, *_ = details["layers"].values()
    first["scheme"] = "int3-g32"
    page = quantized_page(details)
    assert "something &lt;odd&gt;" in page
    assert "for a reason" in page
    assert "<td>KL on other text before and after tuning</td><td>0.2, 0.1</td>" in page
    for heading in ("Warnings", "Tuning", "Bits", "Left as they were"):
        assert f"<h2>{heading}</h2>" in page
    assert len(pictures(page)) == page.count("<figure>") == 5


def test_the_page_of_an_evaluation_has_all_texts_and_perplexities(evaluated, text, other) -> None:
    details, path = evaluated
    page = path.read_text(encoding="utf-8")
    assert list(details["texts"]) == [str(text), str(other)]
    for spec, found in details["texts"].items():
        assert f"<h2>{spec}</h2>" in page
        assert f"{found['kl']['mean']:.4g}" in page
        assert found["duplicate"]["kl"] < 1e-6 * found["kl"]["mean"] + 1e-9
        assert found["duplicate"]["batch_sizes"] == [1, 6]
    assert details["kl"] == details["texts"][str(text)]["kl"]
    assert f"<h2>Perplexity, {text}</h2>" in page
    assert len(pictures(page)) == page.count("<figure>") == 2


@pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH")
def test_pages_open_offline_in_a_browser(quantized, evaluated, tmp_path) -> None:
    for page in (quantized.path / "report.html", evaluated[1]):
        whole = page.read_text(encoding="utf-8")
        opened = tmp_path / page.name
        opened.write_text(whole.replace("</body>", f"{LOADED}</body>"), encoding="utf-8")
        done = subprocess.run(
            [
                str(BROWSER),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--host-resolver-rules=MAP * ~NOTFOUND",
                "--enable-logging=stderr",
                "--virtual-time-budget=5000",
                "--dump-dom",
                opened.as_uri(),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        assert "CONSOLE" not in done.stderr
        loaded = json.loads(re.search(r"<title>(.*?)</title>", done.stdout).group(1))  # type: ignore[union-attr]
        assert loaded == [True] * whole.count("<figure>")


def test_ten_lines_of_transformers_find_the_same_kl(quantized, model, text) -> None:
    found = roundel.evaluate(quantized.path, reference=model(), data=str(text), sequences=6, seq_len=32)
    tokenizer = AutoTokenizer.from_pretrained(model())
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"][: 6 * 32]).reshape(6, 32)
    log_q, log_p = (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)(input_ids=ids).logits.detach().double().log_softmax(-1)
        for place in (quantized.path, model())
    )
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert found.report.kl_mean == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.report.kl_stderr == pytest.approx(kl.mean(1).std().item() / 6**0.5, rel=1e-3)


def test_logits_from_the_cache_give_the_same_bits_without_the_original(quantized, model, text, tmp_path, monkeypatch) -> None:
    settings = {"reference": model(), "data": str(text), "sequences": 6, "seq_len": 32, "cache": tmp_path / "cache"}
    plain = roundel.evaluate(quantized.path, **{**settings, "cache": None}).details
    first = roundel.evaluate(quantized.path, **settings).details
    (entry,) = (tmp_path / "cache").iterdir()
    assert len(list(entry.glob("*.safetensors"))) == 6
    loaded: list[Path] = []
    monkeypatch.setattr("roundel.commands.evaluate.load_model", lambda path, **_: loaded.append(path))
    again = roundel.evaluate(quantized.path, **settings).details
    assert loaded == []
    assert (first["reference_logits"], again["reference_logits"]) == ("run", "cached")
    for found in (first, again):
        assert {**found, "reference_logits": "run"} == plain


def test_the_cache_does_not_take_one_thing_for_another(quantized, model, text, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("roundel.models.load.multiplies_bfloat16", lambda: True)

    def run(**settings: object) -> str:
        given = {"reference": model(), "data": str(text), "sequences": 2, "seq_len": 32, "cache": tmp_path / "cache"}
        return str(roundel.evaluate(quantized.path, **{**given, **settings}).details["reference_logits"])

    copied = tmp_path / "copy"
    shutil.copytree(model(), copied)
    assert run() == "run"
    assert run(sequences=3) == "run"
    assert run(dtype="bfloat16") == "run"
    assert run(batch_size=1) == "run"
    assert run(reference=copied) == "run"
    assert run(reference=copied) == "cached"
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # a new time of change, for all that is known a new model
    assert run(reference=copied) == "run"
    assert run() == "cached"


def test_the_cache_keeps_within_its_cap_and_what_was_used_last(tmp_path) -> None:
    cache = cached.LogitCache(path=tmp_path, cap=9000)
    for number, key in enumerate("abc"):
        with cache.entry(key, 3000, {"duplicate": 0.0}) as keep:
            keep(0, slice(0, 25), torch.full((25, 25), float(number)))
        cached.os.utime(tmp_path / key, (number, number))
    assert cache.find("a") is not None  # used: now the youngest
    with cache.entry("d", 3000, {}) as keep:
        keep(0, slice(0, 25), torch.zeros(25, 25))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "d"]
    with pytest.raises(RuntimeError), cache.entry("e", 3000, {}):
        raise RuntimeError
    assert cache.find("e") is None
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_logits_larger_than_the_cap_are_not_kept_and_that_is_said(command, quantized, model, text, tmp_path) -> None:
    arguments = ("--data", text, "--sequences", 2, "--seq-len", 32, "--cache", tmp_path / "cache", "--cache-gib", 0.000001)
    code, out, err = command("evaluate", quantized.path, "--reference", model(), *arguments, "--html", tmp_path / "page.html")
    assert code == 0
    assert "are not kept" in err
    assert not (tmp_path / "cache").exists()
    assert "KL of the original against itself" in out
    assert "</html>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_damaged_cache_says_which_directory_to_remove(command, quantized, model, text, tmp_path) -> None:
    arguments = ("evaluate", quantized.path, "--reference", model(), "--data", text, "--sequences", 2, "--seq-len", 32)
    assert command(*arguments, "--cache", tmp_path / "cache").code == 0
    for file in (tmp_path / "cache").glob("*/*.safetensors"):
        file.write_bytes(b"x")
    code, _, err = command(*arguments, "--cache", tmp_path / "cache")
    assert code != 0
    assert "remove" in err


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        (["stdlib", "/texts/news.txt"], ["stdlib", "news.txt"]),
        (["a/x.txt", "b/x.txt", "stdlib"], ["a/x.txt", "b/x.txt", "stdlib"]),
        (["texts/", "other/texts/"], ["texts/", "other/texts/"]),
        ([""], [""]),
    ],
)
def test_texts_whose_paths_end_alike_are_told_apart(specs, expected) -> None:
    assert list(labels(specs).values()) == expected


def test_the_report_has_texts_that_the_original_and_the_written_model_continue(quantized, model) -> None:
    rows = quantized.details["continuations"]
    assert len(rows) == 3
    tokenizer = AutoTokenizer.from_pretrained(model())
    for place, key in ((model(), "original"), (quantized.path, "quantized")):
        generator = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        for row in rows:
            ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
            written = generator.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=tokenizer.eos_token_id)
            found = row["original"] if key == "original" else row["continued"][key]
            assert found["text"] == tokenizer.decode(written[0], skip_special_tokens=True).removeprefix(row["prompt"])
            assert 0 < found["tokens"] <= 24
    page, card = ((quantized.path / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    for row in rows:
        assert f"<h2>{html.escape(row['prompt'])} …</h2>" in page
        assert json.dumps(row["continued"]["quantized"]["text"], ensure_ascii=False) in card


@pytest.fixture(scope="module")
def others(model, quantized, tmp_path_factory) -> tuple[Path, Path]:
    """A GGUF file of the original in 16 bits, alone, and GPTQ of the codes without a report: as others write them."""
    folder = tmp_path_factory.mktemp("others")
    checkpoint = Checkpoint.open(model())
    gguf.write(folder / "f16.gguf", model=model(), tensors=checkpoint.sizes, read=checkpoint.read, rounded={}, name="tiny", dense="f16")
    roundel.export(quantized.path, to="gptq", output=folder / "gptq")
    (folder / "gptq" / "roundel.json").unlink()
    return folder / "f16.gguf", folder / "gptq"


def test_several_checkpoints_on_one_page(command, quantized, model, text, others, tmp_path, monkeypatch) -> None:
    loaded: list[Path] = []

    def load(path: Path, **settings: Any) -> Any:
        loaded.append(path)
        return load_model(path, **settings)

    monkeypatch.setattr("roundel.commands.evaluate.load_model", load)
    files = ("--json", tmp_path / "several.json", "--html", tmp_path / "several.html")
    arguments = ("--reference", model(), "--data", text, "--sequences", 6, "--seq-len", 32, "--new-tokens", 4)
    code, out, _ = command("evaluate", quantized.path, *others, *arguments, *files)
    assert code == 0
    assert loaded == [model()]
    details = json.loads((tmp_path / "several.json").read_text(encoding="utf-8"))
    ours, dense, gptq = (details["models"][str(path)]["texts"][str(text)] for path in (quantized.path, *others))
    alone = roundel.evaluate(quantized.path, reference=model(), data=str(text), sequences=6, seq_len=32).details
    assert ours == {**{key: alone[key] for key in ours}, "reference_logits": "run"}
    assert [found["reference_logits"] for found in (dense, gptq)] == ["cached"] * 2
    assert dense["kl"]["mean"] < 1e-3 * ours["kl"]["mean"]
    assert gptq["kl"]["mean"] == pytest.approx(ours["kl"]["mean"], rel=0.02)  # the same codes, decoded to 16 bits
    assert 0 < ours["kl"]["p99"] <= ours["kl"]["p999"]
    for row in details["continuations"]:
        copy_of_the_original = row["continued"][str(others[0])]
        assert copy_of_the_original["text"] == row["original"]["text"]
        assert copy_of_the_original["equal_tokens"] == copy_of_the_original["tokens"] <= 4
    page = (tmp_path / "several.html").read_text(encoding="utf-8")
    assert len(pictures(page)) == page.count("<figure>") == 1
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert [line.split()[1] for line in lines[2:]] == ["out", "f16.gguf", "gptq", "original"]
    assert len({len(line) for line in lines}) == 1
    for path, line in zip((quantized.path / "model.safetensors", others[0]), lines[2:], strict=False):
        assert f"{path.stat().st_size / 1e6:.2f}" in line
    flips = round(ours["tokens"] * (1 - ours["top1_agreement"]))
    assert f" {flips} of {6 * 32} " in lines[2]
    assert f"<td>{flips} of {6 * 32}</td>" in page


def test_what_several_checkpoints_cannot_be_asked(command, quantized, model, text, others, tmp_path) -> None:
    for arguments, word in [
        (("--data", text, "--perplexity", text), "one model at a time"),
        ((), "give some (--data)"),
        (("--data", text, "--prompt", ""), "0 tokens"),
        (("--data", text, "--new-tokens", 0), "at least 1"),
    ]:
        code, out, err = command("evaluate", quantized.path, others[0], "--reference", model(), *arguments)
        assert (code, out) == (2, "")
        assert word in err
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    assert "2 GGUF files" in command("evaluate", tmp_path, "--reference", model(), "--data", text).err
