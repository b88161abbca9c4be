"""Accuracies of the quantized and the original model on tasks of lm-evaluation-harness (`lm-eval`).

Prompts, answers and metrics are those of lm-eval, by its names of tasks: its own YAML files are loaded as they are. Only where the
documents come from may differ: with a directory of local files, whose rows have either lm-eval's fields or a flatter form (below), nothing
is asked of the network. Both models are handed over as they are loaded, so that every format that Roundel reads can be measured.

    NAME.jsonl        lm-eval's fields                              flat form
    arc_challenge     question, choices {text, label}, answerKey    query ("Question: ..."), choices [text], gold
    arc_easy          the same                                      the same
    boolq             passage, question, label                      query ("Passage: ...\\nQuestion: ...?"), gold (0 no, 1 yes)
    gsm8k             question, answer
    hellaswag         activity_label, ctx_a, ctx_b, endings, label  context, choices [4], gold; or .txt: six lines for each,
                                                                    the context, the index of the right ending, four endings
    ifeval            key, prompt, instruction_id_list, kwargs
    lambada_openai    text                                          context, continuation (the last word)
    piqa              goal, sol1, sol2, label                       query ("Question: ..."), choices [2], gold
    winogrande        sentence, option1, option2, answer            context_options [2], continuation, gold

Examples for few shots come from `NAME_train.*` of the same form, else from the documents themselves, never the one that is asked.

Standard errors are lm-eval's for a mean, `sqrt(sum (x - mean)^2 / (n - 1) / n)`; that of the difference is the same of the paired
differences, which is far smaller, as both models see the same documents. lm-eval's bootstraps of other metrics are left out: they fork
a process per core. Cost: one forward pass per answer and model, or a generation per document (gsm8k, ifeval).

Reference: Gao et al., A framework for few-shot language model evaluation (2021).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from roundel.errors import DataError

__all__ = ["TASKS", "open_tasks", "task_results"]

Row = dict[str, Any]

LETTERS = "ABCDEFGH"

SEED = 1234
"""Of the few shots; lm-eval's own."""


def _after(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(f"expected a text that starts with {start!r}")
    return text[len(start) :].strip()


def _arc(row: Row) -> Row:
    choices = row["choices"]
    return {
        "question": _after(row["query"], "Question:"),
        "choices": {"text": choices, "label": list(LETTERS[: len(choices)])},
        "answerKey": LETTERS[_index(row["gold"], choices)],
    }


def _boolq(row: Row) -> Row:
    passage, mark, question = _after(row["query"], "Passage:").rpartition("\nQuestion:")
    if not mark:
        raise ValueError("expected a line that starts with 'Question:'")
    return {"passage": passage, "question": question.strip().removesuffix("?"), "label": _index(row["gold"], "ny")}


def _lambada(row: Row) -> Row:
    word = row["continuation"].strip()
    if not word or " " in word:
        raise ValueError(f"expected one word in 'continuation' but found {word!r}")
    return {"text": f"{row['context']} {word}"}


def _piqa(row: Row) -> Row:
    first, second = row["choices"]
    return {"goal": _after(row["query"], "Question:"), "sol1": first, "sol2": second, "label": _index(row["gold"], row["choices"])}


def _winogrande(row: Row) -> Row:
    first, second = row["context_options"]  # lm-eval puts an option after what is before "_", here nothing
    answer = str(_index(row["gold"], row["context_options"]) + 1)
    return {"sentence": f"_ {row['continuation'].strip()}", "option1": first, "option2": second, "answer": answer}


def _hellaswag(row: Row) -> Row:
    """Only the joined context is known: an unfinished last sentence is what lm-eval capitalizes."""
    label, colon, context = row["context"].partition(": ")
    if not colon:
        raise ValueError("expected a context such as 'Canoeing: Two women ...'")
    begin = max((found.end() for found in re.finditer(r"[.!?] +(?=[a-z])", context)), default=len(context))
    return {
        "activity_label": label,
        "ctx_a": context[:begin].rstrip(),
        "ctx_b": context[begin:],
        "endings": row["choices"],
        "label": str(_index(row["gold"], row["choices"])),
    }


def _index(gold: Any, choices: Sequence[str]) -> int:
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"'gold' is {gold!r}: expected 0 to {len(choices) - 1}")
    return int(gold)


def _unchanged(row: Row) -> Row:
    raise KeyError("no other form is known")


@dataclass(frozen=True)
class _Task:
    """Where lm-eval has a task, the fields that it reads, and how rows of the flat form become those."""

    yaml: str
    fields: tuple[str, ...]
    flat: tuple[str, ...] = ()
    convert: Callable[[Row], Row] = _unchanged


ARC = (("question", "choices", "answerKey"), ("query", "choices", "gold"), _arc)

TASKS = {
    "arc_challenge": _Task("arc/arc_challenge.yaml", *ARC),
    "arc_easy": _Task("arc/arc_easy.yaml", *ARC),
    "boolq": _Task("super_glue/boolq/default.yaml", ("passage", "question", "label"), ("query", "gold"), _boolq),
    "gsm8k": _Task("gsm8k/gsm8k.yaml", ("question", "answer")),
    "hellaswag": _Task(
        "hellaswag/hellaswag.yaml", ("activity_label", "ctx_a", "ctx_b", "endings", "label"), ("context", "choices", "gold"), _hellaswag
    ),
    "ifeval": _Task("ifeval/ifeval.yaml", ("key", "prompt", "instruction_id_list", "kwargs")),
    "lambada_openai": _Task("lambada/lambada_openai.yaml", ("text",), ("context", "continuation"), _lambada),
    "piqa": _Task("piqa/piqa.yaml", ("goal", "sol1", "sol2", "label"), ("query", "choices", "gold"), _piqa),
    "winogrande": _Task(
        "winogrande/default.yaml",
        ("sentence", "option1", "option2", "answer"),
        ("context_options", "continuation", "gold"),
        _winogrande,
    ),
}
"""The tasks that local files can hold."""


def _find(directory: Path, stem: str) -> Path | None:
    found = (directory / f"{stem}{suffix}" for suffix in (".jsonl", ".txt"))
    return next((path for path in found if path.is_file()), None)


def _documents(name: str, path: Path, most: int | None = None) -> list[Row]:
    """The rows of a file in lm-eval's fields."""
    task = TASKS[name]
    rows: list[Row] = []
    for where, row in _six_lines(path) if path.suffix == ".txt" else _json_lines(path):
        if most is not None and len(rows) == most:
            break
        if all(field in row for field in task.fields):
            rows.append({field: row[field] for field in task.fields})
            continue
        missing = [field for field in task.flat or task.fields if field not in row]
        if missing:
            forms = " or ".join(", ".join(form) for form in (task.flat, task.fields) if form)
            raise DataError(f"{where}: no field {missing[0]!r}; {name} takes rows with {forms}")
        try:
            rows.append(task.convert(row))
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: this is no document of {name}: {error}") from error
    if not rows:
        raise DataError(f"{path} holds no document")
    return rows


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: expected a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object")
        yield f"{path}, line {number}", row


def _six_lines(path: Path) -> Iterator[tuple[str, Row]]:
    lines = _lines(path)
    while lines and not lines[-1].strip():
        lines.pop()
    for start in range(0, len(lines), 6):
        where = f"{path}, line {start + 1}"
        context, *rest = lines[start : start + 6]
        if len(rest) != 5 or not rest[0].strip().isdecimal():
            raise DataError(f"{where}: expected six lines: a context, the index of the right ending, and four endings")
        yield where, {"context": context, "choices": rest[1:], "gold": int(rest[0])}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without lm-eval's bars, prints and logs: standard output is for results."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def open_tasks(
    names: Sequence[str], *, data: Path | None = None, limit: int | None = None, shots: int | None = None
) -> dict[str, tuple[Any, str | None]]:
    """lm-eval's task objects with their documents, and where the examples of local few shots come from (None: no shots, or the Hub).

    Args:
        names: lm-eval's names.
        data: A directory of local files; without it lm-eval loads the documents from the Hub.
        limit: At most so many documents of each are evaluated.
        shots: Examples before each question; the task's own number by default.

    Raises:
        DataError: lm-eval is not installed; a task is unknown; a file or a field is missing; the Hub cannot be read.
    """
    if limit is not None and limit < 1:
        raise DataError(f"--task-limit {limit}: expected at least 1 document")
    if shots is not None and shots < 0:
        raise DataError(f"--num-fewshot {shots}: expected 0 or more examples")
    if data is not None:
        for name in names:  # before anything slow
            if name not in TASKS:
                raise DataError(f"no task {name!r} in local files: known are {', '.join(TASKS)}; without --task-data lm-eval loads others")
            if _find(data, name) is None:
                raise DataError(f"no {name}.jsonl{' or .txt' if name == 'hellaswag' else ''} in {data}, where --task-data points")
    try:
        with _silent():
            import lm_eval.tasks._yaml_loader as loader
            from lm_eval.api.task import ConfigurableTask
    except ImportError as error:
        raise DataError(
            f"tasks are run by lm-evaluation-harness, which cannot be imported: pip install 'roundel[tasks]' ({error})"
        ) from error
    found: dict[str, tuple[Any, str | None]] = {}
    for name in names:
        source = None
        if name == "ifeval" and data is not None:
            _check_punkt()
        with _silent():
            if name in TASKS:  # by its file: the index of all thousands of tasks takes long
                config = _loaded(name, functools.partial(loader.load_yaml, Path(loader.__file__).parent / TASKS[name].yaml))
                for key in ("tag", "group", "task_list"):
                    config.pop(key, None)
                usual = config.get("num_fewshot")
                wanted = (usual or 0) if shots is None or usual == 0 else shots
                if data is not None:
                    source = _localize(config, name, data, wanted, limit)
                task = _loaded(name, functools.partial(ConfigurableTask, config=config))
            else:
                task = _from_index(name)
            if task.config.num_fewshot != 0:  # a task that says 0 has no examples to give
                task.set_config(key="num_fewshot", value=shots if shots is not None else task.config.num_fewshot or 0)
        found[name] = task, source
    return found


def _check_punkt() -> None:
    """Lm-eval would download it."""
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab")
    except (ImportError, LookupError) as error:
        raise DataError(
            "ifeval needs NLTK's punkt_tab on this disk: python -m nltk.downloader punkt_tab, where there is a network"
        ) from error


def _localize(config: Row, name: str, directory: Path, shots: int, limit: int | None) -> str | None:
    """Makes a configuration read local files; the name of the file that few shots come from."""
    from datasets import Dataset

    path, examples = _find(directory, name), _find(directory, f"{name}_train") if shots else None
    assert path is not None
    rows = {"test": _documents(name, path, None if shots and examples is None else limit)}
    if examples is not None:
        rows["train"] = _documents(name, examples)
    pool, split = (path, "test") if examples is None else (examples, "train")
    if shots and len(rows[split]) <= shots:
        raise DataError(f"{pool} has too few documents for {shots} examples before each question; use a smaller --num-fewshot")
    splits = {key: Dataset.from_list(each) for key, each in rows.items()}
    for key in ("dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split"):
        config.pop(key, None)
    config |= {
        "custom_dataset": lambda **_metadata: splits,
        "test_split": "test",
        "fewshot_split": split,  # of its own documents, lm-eval leaves out the one that is asked
    }
    return pool.name if shots else None


def _from_index(name: str) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if name not in manager.all_subtasks:
        close = difflib.get_close_matches(name, manager.all_subtasks, n=4)
        raise DataError(
            f"lm-eval has no task {name!r}" + (f"; near are {', '.join(close)}" if close else "; `lm-eval ls tasks` lists them")
        )
    return _loaded(name, lambda: manager.load([name])["tasks"][name])


def _loaded(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (ImportError, OSError, ValueError, RuntimeError, LookupError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"lm-eval cannot load {name}: {reason}; without a network give local files with --task-data") from error


def task_results(
    task: Any, models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None, batch_size: int = 8
) -> dict[str, Any]:
    """What `task` says of the model and its reference, which are `models`.

    Raises:
        DataError: the model is too short for an answer.

    Returns:
        `metric`, `value`, `stderr`, `reference`, `reference_stderr` of the accuracy (the first metric where the task has none of that
        name); `difference` and its paired `difference_stderr`; `n` documents, `shots`; and `metrics`, the values of all metrics as
        `{name: {value, reference}}`. A standard error of one document, or of what is no mean over documents, is None.
    """
    from lm_eval.api.metrics import mean_stderr
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    values: list[dict[str, float]] = []
    samples: list[list[Row]] = []
    for model in models:
        with _silent():
            task.set_fewshot_seed(seed=SEED)
            harness: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            try:  # `evaluate`, not `simple_evaluate`, which asks the Hub about the model and the system for its packages
                result: Any = evaluate(harness, {"tasks": {task.task_name: task}}, limit=limit, bootstrap_iters=0)
            except AssertionError as error:
                reason = str(error) or f"an answer has more tokens than the {harness.max_length} positions of the model"
                raise DataError(f"lm-eval cannot ask this model for {task.task_name}: {reason}; leave the task out") from error
        values.append({k: v for k, v in result["results"][task.task_name].items() if isinstance(v, float | int) and "," in k})
        samples.append(result["samples"][task.task_name])
    names = [name for name in values[0] if not name.split(",")[0].endswith("_stderr")]
    chosen = next((name for name in names if name.split(",")[0] == "acc"), names[0])
    metric, kind = chosen.split(",")
    scores = [[float(row[metric]) for row in rows if row["filter"] == kind] for rows in samples]
    differences = [own - other for own, other in zip(*scores, strict=True)]
    n = len(differences)
    errors = [mean_stderr(each) if n > 1 else None for each in (*scores, differences)]
    return {
        "metric": metric if kind == "none" else chosen,
        "value": values[0][chosen],
        "stderr": errors[0],
        "reference": values[1][chosen],
        "reference_stderr": errors[1],
        "difference": values[0][chosen] - values[1][chosen],
        "difference_stderr": errors[2],
        "n": n,
        "shots": task.config.num_fewshot,
        "metrics": {name.removesuffix(",none"): {"value": values[0][name], "reference": values[1][name]} for name in names},
    }
