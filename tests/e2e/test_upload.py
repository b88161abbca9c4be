"""`roundel upload`: huggingface_hub's own code against a Hub on this machine, and what is refused before it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, metadata_load
from huggingface_hub.utils import close_session

from e2e import hub as local
from e2e.hub import OWNER, READS, TOKEN, Hub
from roundel import upload
from roundel.artifacts.source import load_source
from roundel.errors import ModelError, OutputError
from roundel.evaluate.card import model_card
from roundel.recipes import Recipe

REPO = f"{OWNER}/tiny-int4"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub, when it sends a large file


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Which `HF_ENDPOINT` would name: the library reads its environment when it is imported."""
    with local.running() as hub:
        for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield hub
    close_session()


@pytest.fixture
def written(quantized, tmp_path: Path) -> Path:
    """A directory as users have it, with what is none of the Hub's business."""
    path = tmp_path / "out"
    shutil.copytree(quantized.path, path)
    (path / "work" / "rounded").mkdir(parents=True)
    for name in ("work/job.json", "work/rounded/0.safetensors", ".README.md.tmp", "quantize.log"):
        (path / name).write_text("mine")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return path


def goes_up(path: Path) -> dict[str, bytes]:
    mine = ("work", ".README.md.tmp", "quantize.log")
    files = (file for file in path.rglob("*") if file.is_file())
    return {name: file.read_bytes() for file in files if not (name := file.relative_to(path).as_posix()).startswith(mine)}


def test_a_directory_becomes_a_repository(hub: Hub, written: Path, command, tmp_path: Path) -> None:
    done = command("upload", written, REPO, "--private", "--message", "first", "--json", tmp_path / "up.json")
    assert (done.code, done.err.count("uploading: done")) == (0, 1), done.err
    assert f"files in {hub.url}/{REPO}, commit {'a' * 40}" in done.out
    assert hub.branches == {(REPO, "main"): goes_up(written)}
    assert hub.public == {REPO: False}
    assert hub.commits == [(REPO, "main", "first")]
    details = json.loads((tmp_path / "up.json").read_text())
    assert details["left_out"] == [".README.md.tmp", "quantize.log", "work/"]
    assert {file["path"]: file["size"] for file in details["files"]} == {name: len(data) for name, data in goes_up(written).items()}


def test_a_second_call_sends_what_has_changed_to_the_branch_named(hub: Hub, written: Path) -> None:
    upload(written, REPO)
    assert "in int4-g32 as compressed-tensors, by Roundel" in hub.commits[0][2]
    sent = list(hub.sent)
    (written / "README.md").write_text((written / "README.md").read_text() + "\nMore.\n")
    details = upload(written, "tiny-int4", revision="v2", token=TOKEN)
    assert details["repository"] == REPO
    assert hub.sent == sent
    assert hub.branches[REPO, "v2"] == goes_up(written) != hub.branches[REPO, "main"]


def test_an_interrupted_upload_goes_on(hub: Hub, written: Path) -> None:
    (written / "model-extra.safetensors").write_bytes(_empty())
    hub.fails_after = 1
    with pytest.raises(OutputError, match="given again, sends what is missing"):
        upload(written, REPO)
    assert (len(hub.sent), hub.commits) == (1, [])
    hub.fails_after = None
    upload(written, REPO)
    assert sorted(hub.sent) == sorted(hub.stored)  # each once
    assert hub.branches[REPO, "main"] == goes_up(written)


def _empty() -> bytes:
    header = b"{}      "
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize("xet", [False, True])
def test_what_the_hub_refuses_is_one_error_with_the_way_out(xet: bool, hub: Hub, written: Path, command, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    hub.create("another/model", public=True)
    hub.create(REPO, public=True)
    for repo, settings, reason in (
        ("another/model", {}, "the repository or its owner is another's"),
        (REPO, {"token": READS}, "the token only reads"),
        (REPO, {"token": "hf_nobody"}, "does not know this token"),
        (REPO, {"private": True}, "exists and is public"),
    ):
        with pytest.raises(OutputError, match=reason):
            upload(written, repo, **settings)
    (written / "README.md").write_text("---\nlicense: my-own\n---\n")
    done = command("upload", written, REPO)
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith(f"error: the Hub did not take {REPO}")
    assert '"license" must be one of' in done.err
    assert "Traceback" not in done.err
    assert hub.commits == hub.sent == []


def test_no_network_is_needed_to_look(written: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    done = command("upload", written, REPO, "--branch", "v2", "--dry-run")
    assert done.code == 0
    for part in (
        f"would go to {REPO}, branch v2",
        "model.safetensors",
        "large storage",
        "stays here: work/",
        "pipeline_tag: text-generation",
    ):
        assert part in done.out, part
    assert "warning: README.md has no base_model" in done.err
    assert "name paths of this machine: /" in done.err
    done = command("upload", written, REPO, "--dry-run", "--quiet", "--json", "-")
    assert json.loads(done.out)["bytes"] == sum(map(len, goes_up(written).values()))
    assert command("upload", written, REPO, "--quiet").err.startswith("error: no token for the Hub: set HF_TOKEN")


def test_what_is_not_whole_or_not_ours_is_refused_without_the_network(written: Path, model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no roundel\.json"):
        upload(model(), REPO, dry_run=True)
    with pytest.raises(OutputError, match="cannot be the name of a repository, such as me/out"):
        upload(written, "a/b/c", dry_run=True)
    weights = (written / "model.safetensors").read_bytes()
    for name, content, reason in (
        ("model.safetensors", weights[:-8], "cannot be read"),
        ("model.safetensors", None, r"lacks model\.safetensors: it is not whole"),
        ("model.safetensors", _empty(), r"lacks model\.layers\.0"),
        ("README.md", None, r"has no README\.md"),
    ):
        damaged = tmp_path / "damaged"
        shutil.copytree(written, damaged)
        (damaged / name).write_bytes(content) if content is not None else (damaged / name).unlink()
        with pytest.raises(ModelError, match=reason):
            upload(damaged, REPO, dry_run=True)
        shutil.rmtree(damaged)
    for card, reason in (
        ("---\nbase_model: /home/me/x\n---\n", "base_model is no model of the Hub"),
        ("---\na: [\n---\n", "cannot be read"),
    ):
        (written / "README.md").write_text(card)
        with pytest.raises(OutputError, match=reason):
            upload(written, REPO, dry_run=True)


@pytest.mark.parametrize(("form", "library"), [("gptq", "transformers"), ("gguf", "gguf"), ("native", "roundel")])
def test_the_card_has_what_the_hub_reads(form: str, library: str, quantized, tmp_path: Path) -> None:
    terms = {"license": "other", "license_name": "its: own", "license_link": "LICENSE"}
    of_hub = {**quantized.details["model"], "repository": "Qwen/Qwen3-0.6B", "terms": terms}
    report = {**quantized.details, "format": form, "scheme": "4.5 bits", "model": of_hub}
    (tmp_path / "README.md").write_text(model_card(report), encoding="utf-8")
    assert metadata_load(tmp_path / "README.md") == {
        "base_model": "Qwen/Qwen3-0.6B",
        "base_model_relation": "quantized",
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["roundel", form, "4.5-bits"],
        **terms,
    }
    assert local.faults_of(model_card(report)) == []
    assert "base_model" not in metadata_load(quantized.path / "README.md")  # a directory's path is none


def test_the_originals_id_and_terms_are_found_in_the_hubs_cache(model, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123abcd"
    shutil.copytree(model(), snapshot)
    (snapshot / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\ndatasets: secret\n---\n# Some model\n")
    source = load_source(str(snapshot), Recipe(scheme="int4-g32"), "cpu", "float32")
    assert (source.repository, source.revision) == ("some/model", "0123abcd")
    assert source.terms == {"license": "mit", "language": ["en"]}
    (snapshot / "README.md").write_text("---\nlicense: [\n---\n")
    assert source.terms == {}
    plain = load_source(str(model()), Recipe(scheme="int4-g32"), "cpu", "float32")
    assert (plain.repository, plain.terms) == (None, {})
