"""`evaluate --tasks` gives lm-eval's own numbers from local files without any network; `--perplexity` is ten lines of Transformers."""

from __future__ import annotations

import json
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import roundel
from e2e import tiny
from roundel.errors import DataError
from roundel.evaluate.tasks import TASKS, open_tasks

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: make test-tasks")

WORDS = tiny.make_text(4000, seed=3).replace("\n", " ").split()


def words(start: int, count: int) -> str:
    return " ".join(WORDS[start : start + count])


ROWS = {
    "arc_easy": [
        {"query": f"Question: {words(9 * k, 6)}?", "choices": [words(9 * k + j, 2) for j in range(4)], "gold": k % 4} for k in range(8)
    ],
    "boolq": [
        {"query": f"Passage: {words(7 * k, 9)}\nQuestion: is {words(k, 3)}?", "choices": ["no", "yes"], "gold": k % 2} for k in range(6)
    ],
    "lambada_openai": [{"context": words(8 * k, 7), "continuation": WORDS[8 * k + 7]} for k in range(5)],
    "piqa": [{"query": f"Question: {words(5 * k, 4)}\n", "choices": [words(k, 3), words(k + 50, 4)], "gold": k % 2} for k in range(7)],
    "winogrande": [
        {"context_options": [f"{words(k, 4)} {name}" for name in ("Ada", "Bo")], "continuation": words(k + 9, 3), "gold": k % 2}
        for k in range(6)
    ],
}
OWN_FIELDS = {  # the same documents as lm-eval's data sets have them
    "arc_easy": lambda row: {
        "question": row["query"].removeprefix("Question: "),
        "choices": {"text": row["choices"], "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[row["gold"]],
    },
    "piqa": lambda row: {
        "goal": row["query"].removeprefix("Question: ").strip(),
        "sol1": row["choices"][0],
        "sol2": row["choices"][1],
        "label": row["gold"],
    },
    "lambada_openai": lambda row: {"text": f"{row['context']} {row['continuation']}"},
    "winogrande": lambda row: {
        "sentence": f"{row['context_options'][0].removesuffix('Ada')}_ {row['continuation']}",
        "option1": "Ada",
        "option2": "Bo",
        "answer": str(row["gold"] + 1),
    },
}
HELLASWAG = [
    f"Title {k}: {words(k, 6).capitalize()}. he {words(k + 7, 2)}\n{k % 4}\n" + "\n".join(words(k + j, 3) for j in range(4))
    for k in range(5)
]


def write_rows(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path):
    for name, rows in ROWS.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "hellaswag.txt").write_text("\n".join(HELLASWAG) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def offline(monkeypatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@needs_lm_eval
@pytest.mark.usefixtures("offline")
def test_accuracies_are_those_of_a_direct_run(command, model, quantized, data, monkeypatch) -> None:
    names = [*ROWS, "hellaswag"]
    arguments = ("--reference", model(), "--tasks", ",".join(names), "--task-data", data, "--json", data / "report.json")
    code, stdout, stderr = command("evaluate", quantized.path, *arguments)
    assert code == 0, stderr
    assert "lambada_openai" in stdout
    found = json.loads((data / "report.json").read_text())
    assert set(found["tasks"]) == set(names)

    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    tokenizer = AutoTokenizer.from_pretrained(model())
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _results: None)  # slow: asks the system for its packages
    tasks = []
    for name, convert in OWN_FIELDS.items():
        config = load_yaml(Path(lm_eval.tasks.__file__).parent / TASKS[name].yaml)
        rows = Dataset.from_list([convert(row) for row in ROWS[name]])
        splits = {config[split]: rows for split in ("training_split", "validation_split", "test_split") if config.get(split)}
        tasks.append({**{k: v for k, v in config.items() if k != "tag"}, "custom_dataset": lambda splits=splits, **_: splits})
    for own, place in (("value", quantized.path), ("reference", model())):
        lm = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval(), tokenizer=tokenizer, batch_size=4)
        lm.get_model_info = dict  # asks the Hub
        direct = simple_evaluate(lm, tasks=tasks, bootstrap_iters=0, task_manager=TaskManager(include_defaults=False))["results"]
        for name in OWN_FIELDS:
            assert found["tasks"][name][own] == direct[name]["acc,none"]
            assert found["tasks"][name]["n"] == len(ROWS[name])
            for metric, both in found["tasks"][name]["metrics"].items():
                assert both[own] == pytest.approx(direct[name][f"{metric},none"], rel=1e-5)
    for each in found["tasks"].values():  # a mean of n zeros and ones
        p, n = each["value"], each["n"]
        assert each["stderr"] == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)


@needs_lm_eval
@pytest.mark.usefixtures("offline")
def test_prompts_are_those_of_lm_eval(data) -> None:
    write_rows(data / "arc_easy_train.jsonl", ROWS["arc_easy"][:3])
    tasks = open_tasks([*ROWS, "hellaswag"], data=data, shots=2)
    assert tasks["arc_easy"][1] == "arc_easy_train.jsonl"
    assert tasks["boolq"][1] == "boolq.jsonl"
    task = tasks["hellaswag"][0]
    document = task.test_docs()[0]
    context = task.fewshot_context(document, 2)
    assert context.endswith(f"Title 0: {words(0, 6).capitalize()}. He {words(7, 2).lower()}")
    assert context.count("Title") == 3
    assert context.count("Title 0") == 1
    boolq = tasks["boolq"][0]
    assert boolq.doc_to_text(boolq.test_docs()[0]) == f"{words(0, 9)}\nQuestion: is {words(0, 3)}?\nAnswer:"


def test_perplexity_is_that_of_plain_transformers(command, model, quantized, text, tmp_path) -> None:
    code, _, _ = command(
        "evaluate", quantized.path, "--reference", model(), "--perplexity", text, "--window", 64, "--json", tmp_path / "report.json"
    )
    assert code == 0
    found = json.loads((tmp_path / "report.json").read_text())["windowed_perplexity"][str(text)]
    ids = AutoTokenizer.from_pretrained(model())(text.read_text(), return_tensors="pt", verbose=False).input_ids
    assert (found["window"], found["windows"]) == (64, ids.shape[1] // 64)
    for name, place in (("model", quantized.path), ("reference", model())):
        plain = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        losses = []
        for start in range(0, ids.shape[1] - 63, 64):
            part = ids[:, start : start + 64]
            with torch.no_grad():
                losses.append(plain(input_ids=part, labels=part).loss.double())
        assert found[name] == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-6)


@needs_lm_eval
def test_errors_say_what_is_missing(model, data, monkeypatch) -> None:
    def fails(**settings) -> str:
        with pytest.raises(DataError) as caught:
            roundel.evaluate(model(), reference=model(), **settings)
        return str(caught.value)

    assert "--tasks" in fails()
    assert "no task 'arc_hard'" in fails(tasks=["arc_hard"], task_data=data)
    assert "no gsm8k.jsonl" in fails(tasks=["gsm8k"], task_data=data)
    assert "--task-limit" in fails(tasks=["piqa"], task_data=data, task_limit=0)
    assert "smaller --num-fewshot" in fails(tasks=["piqa"], task_data=data, num_fewshot=7)
    write_rows(data / "piqa.jsonl", [ROWS["piqa"][0], {"query": "Question: x", "gold": 0}])
    assert "line 2: no field 'choices'" in fails(tasks=["piqa"], task_data=data)
    write_rows(data / "piqa.jsonl", [{**ROWS["piqa"][0], "gold": 2}])
    assert "'gold' is 2" in fails(tasks=["piqa"], task_data=data)
    write_rows(data / "piqa.jsonl", [{**ROWS["piqa"][0], "choices": ["short", " ".join(WORDS[:2000])]}])
    assert "piqa: an answer has more tokens than" in fails(tasks=["piqa"], task_data=data)
    write_rows(data / "ifeval.jsonl", [{"key": 1, "prompt": "Hi.", "instruction_id_list": [], "kwargs": []}])
    monkeypatch.setattr("nltk.data.path", [])
    assert "nltk.downloader punkt_tab" in fails(tasks=["ifeval"], task_data=data)
    assert "smaller --window" in fails(perplexity=str(data / "piqa.jsonl") + ":field=query", window=128)
    monkeypatch.setitem(sys.modules, "lm_eval.api.task", None)
    assert "pip install 'roundel[tasks]'" in fails(tasks=["boolq"], task_data=data)
