"""The same questions answered by a model before and after it was quantized: greedily, in its chat template, by plain Transformers.

    python benchmarks/chat.py ORIGINAL WRITTEN [--question TEXT ...] [--tokens 96]

What a KL looks like in use, not a measure: one token that differs changes all that follow. Rows go to `benchmarks/results/chat.json`, one
for a model, a scheme and a question. One model is in memory at a time.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch
from commands import keep_row, read_json
from transformers import AutoModelForCausalLM, AutoTokenizer

from roundel.evaluate.continuations import equal_tokens
from roundel.stages.report import versions

QUESTIONS = (
    "Write a Python function that returns the n-th Fibonacci number, without recursion.",
    "What does HTTP status 404 mean? Answer in one sentence.",
)


def answers(model: Path, questions: list[str], tokens: int) -> list[list[int]]:
    """The tokens of each answer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    found = []
    for question in questions:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            made = loaded.generate(**inputs, max_new_tokens=tokens, do_sample=False, repetition_penalty=1.0)
        found.append(made[0, inputs["input_ids"].shape[1] :].tolist())
    del loaded
    gc.collect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("written", type=Path)
    parser.add_argument("--question", action="append")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "chat.json")
    given = parser.parse_args()
    questions = given.question or list(QUESTIONS)
    report = read_json(given.written / "roundel.json")
    before, after = (answers(path, questions, given.tokens) for path in (given.original, given.written))
    tokenizer = AutoTokenizer.from_pretrained(given.original)
    for question, own, other in zip(questions, before, after, strict=True):
        key = {"model": given.original.name, "scheme": report["scheme"], "question": question}
        row = {
            "kl": report["evaluation"]["kl"]["mean"],
            "original": tokenizer.decode(own, skip_special_tokens=True),
            "quantized": tokenizer.decode(other, skip_special_tokens=True),
            "equal_tokens": equal_tokens(own, other),
            "tokens": [len(own), len(other)],
            "versions": versions(),
        }
        keep_row(given.output, "chat", key, row)
        print(f"{question}\n  original: {row['original']}\n  quantized: {row['quantized']}\n", flush=True)


if __name__ == "__main__":
    main()
