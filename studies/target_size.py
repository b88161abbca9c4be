"""`--target-size` beside every uniform type that fits, and beside llama.cpp's rule for embedding and head: KL on held-out text.

    python studies/target_size.py MODEL --calibration SPEC [--eval-data SPEC] [--sizes 1.6M,2M] [-o FILE]

GGUF files, of which embedding and head count: "mix" is `--target-size` alone, "head as in llama.cpp" the same with `--head q6_k`, which the
rule is for a tied matrix. A uniform type has the linears in one type and the ends as llama.cpp has them beside it, or (`, head too`)
everything in it. Same text, seed and settings for all.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import roundel
from roundel.formats.gguf_mixes import CANDIDATES
from roundel.recipes import size_in_bytes
from roundel.stages.report import versions
from roundel.store import write_json


def row(name: str, model: str, work: Path, **settings: Any) -> dict[str, Any]:
    result = roundel.quantize(model, output=work / "out", format="gguf", scheme=settings.pop("scheme", "q4_k"), **settings)
    file = result.path / "model.gguf"
    ends = {each["end"]: each["scheme"] for each in result.details["layers"].values() if "end" in each}
    kl = result.details["evaluation"]["kl"]
    found = {"name": name, "bytes": file.stat().st_size, "kl": kl["mean"], "kl_stderr": kl["stderr"], "ends": ends}
    if (allocation := result.details["allocation"]) is not None:
        found |= {"predicted_kl": allocation["predicted_kl"], "uniform": allocation.get("uniform")}
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval-data")
    parser.add_argument("--eval-sequences", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--effort", default="quick")
    parser.add_argument("--sizes", default="1.6M,2M")
    parser.add_argument("--types", default=",".join(CANDIDATES))
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    common = {name: getattr(args, name) for name in ("calibration", "eval_data", "eval_sequences", "sequences", "seq_len", "effort")}
    sizes, types = args.sizes.split(","), args.types.split(",")
    uniform, mixes = [], {}

    def measured(name: str, **settings: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as work:
            return row(name, args.model, Path(work), **common, **settings)

    for size in sizes:
        mixes[size] = [measured("mix", target_size=size), measured("head as in llama.cpp", target_size=size, head="q6_k")]
    for kind in types:
        uniform += [measured(kind, scheme=kind), measured(f"{kind}, head too", scheme=kind, head=kind)]
    rows = []
    for size in sizes:
        fitting = [each for each in uniform if each["bytes"] <= size_in_bytes(size)]
        best = min(fitting, key=lambda each: each["kl"]) if fitting else None
        rows.append({"size": size, **{each["name"]: each for each in mixes[size]}, "best uniform type": best})
    record = {
        "settings": {"model": Path(args.model).name, **common, "sizes": sizes, "types": types},
        "versions": versions(),
        "rows": rows,
        "uniform": uniform,
    }
    if args.output:
        write_json(args.output, record)


if __name__ == "__main__":
    main()
