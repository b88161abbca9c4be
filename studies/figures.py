"""KL against size and against time, all methods of a model in one figure: `python studies/figures.py [--only NAME ...]`.

Drawn into docs/figures from the rows in benchmarks/results. In one figure are only rows that were measured on the same held-out text:

    sizes-demo              demo, standard library: other quantizers (peers), ours by scheme (schemes) and by stage (tuning)
    sizes-llama-cpp-demo    demo, C4: llama.cpp's mixes beside ours
    minutes-smollm2-135m    SmolLM2-135M, WikiText-2, one scheme: our efforts beside other quantizers, against CPU minutes

Values are means over seeds, errors those over sequences.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tables import PEERS, ROOT, Rows, first_seeds, load

from roundel.evaluate import plots

LINEARS = 2_949_120
"""Weights of the demo model's linears."""

OURS = "Roundel, --effort"
KL = "KL(original || quantized), nats per token"
Families = dict[str, list[tuple[str, float, float, float]]]
"""By method: name, size or time, KL, its standard error."""


def mean(rows: Rows, key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def grouped(rows: Rows, key: Callable[[Mapping[str, Any]], Any]) -> dict[Any, Rows]:
    found: dict[Any, Rows] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def sizes_demo() -> bytes:
    """Bits of the linears as bytes: all else is the same in all of them."""

    def points(rows: Rows, name: str) -> tuple[str, float, float, float]:
        return name, mean(rows, "bits_per_weight") * LINEARS / 8e6, mean(rows, "kl"), mean(rows, "kl_stderr")

    peers = [row for row in load("peers-demo")["rows"] if row["error"] is None]
    families: Families = {}
    for (peer, method, _), rows in grouped(peers, lambda row: (row["peer"], row["method"], row["bits_per_weight"])).items():
        if (peer, method) in (("llm_compressor", "awq"), ("gptq_model", "gptq"), ("gptq_model", "gptaq")):
            continue  # within a tenth of nearest rounding, and of the other GPTQ
        family = PEERS.get((peer, method), "llama.cpp, importance matrix")
        families.setdefault(family, []).append(points(rows, method if peer == "llamacpp" else ""))
    ours = load("schemes-demo")["summary"]
    kinds = {"llama.cpp's types": ("q2_k", "q3_k", "q4_k"), "trellises": ("trellis2", "trellis3", "trellis4")}
    for kind, schemes in kinds.items():
        families[f"Roundel, {kind}, --no-prefix-aware"] = [points([row], row["scheme"]) for row in ours if row["scheme"] in schemes]
    arms = {"prefix-aware": "Roundel, integers, the default", "end-to-end": "Roundel, integers, --tune end-to-end"}
    for (arm, scheme), rows in grouped(load("tuning-demo")["rows"], lambda row: (row["arm"], row["scheme"])).items():
        if arm in arms:
            families.setdefault(arms[arm], []).append(points(rows, scheme if arm == "prefix-aware" else ""))
    return plots.rates(
        families,
        title="A Qwen3 of 3.5M weights: KL against size, every method on the same text",
        xlabel="quantized linears, MB (5.9 MB in 16 bits)",
        ylabel=KL,
        bold=[family for family in families if family.startswith("Roundel")],
    )


def sizes_llama_cpp_demo() -> bytes:
    """The weights alone, as Transformers measures them, on the same windows of C4 in both files."""

    def points(name: str, wanted: Callable[[str], str | None]) -> list[tuple[str, float, float, float]]:
        rows = [(wanted(row["file"]), row["bytes"] / 1e6, row["transformers"]) for row in load(name)["rows"]]
        return [(label, size, found["kl"], found["kl_stderr"]) for label, size, found in rows if label is not None]

    ours, theirs = "Roundel, --target-size", "llama.cpp's mixes, importance matrix"
    return plots.rates(
        {
            ours: points("llama-cpp-equal-bytes-demo", lambda file: "" if file.startswith("ours: ") else None),
            theirs: points("llama-cpp-demo", lambda file: None if file.startswith("ours: ") or file == "f16" else file),
        },
        title="A Qwen3 of 3.5M weights as GGUF: KL on C4 against the size of the file",
        xlabel="whole file, MB (7.0 MB in 16 bits)",
        ylabel=KL,
        bold=[ours],
    )


def minutes_smollm2() -> bytes:
    """Each method once, on the text that no method has seen any of."""
    families: Families = {OURS: []}
    for row in sorted(first_seeds("smollm2-135m", "int3-g64"), key=lambda row: -row["cpu_seconds"]):
        name, label = (OURS, row["method"]) if row["tool"] == "roundel" else (PEERS[row["tool"], row["method"]], "")
        kl = row["texts"]["wikitext2"]
        families.setdefault(name, []).append((label, row["cpu_seconds"] / 60, kl["kl"], kl["kl_stderr"]))
    return plots.rates(
        families,
        title="SmolLM2-135M-Instruct in int3-g64: KL on WikiText-2 against time",
        xlabel="CPU minutes of the whole command",
        ylabel=KL,
        bold=[OURS],
        logarithmic=True,
    )


FIGURES = {"sizes-demo": sizes_demo, "sizes-llama-cpp-demo": sizes_llama_cpp_demo, "minutes-smollm2-135m": minutes_smollm2}


def draw(names: Iterable[str]) -> None:
    """Into docs/figures."""
    for name in names:
        (ROOT / "docs" / "figures" / f"{name}.png").write_bytes(FIGURES[name]())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=FIGURES, default=list(FIGURES))
    draw(parser.parse_args().only)


if __name__ == "__main__":
    main()
