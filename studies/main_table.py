"""The main table of README and docs/results.md: nearest, GPTQ and the default, over seeds, on one model.

    python studies/main_table.py MODEL --calibration SPEC [--eval-data SPEC] --schemes int3-g64 int4-g64 -o results.json

Each cell is a whole run of `roundel.quantize`, from text to the checkpoint loaded back by Transformers. Evaluation
text is the same for all seeds.
"""

import argparse
import importlib.metadata
import json
import subprocess
import tempfile
from pathlib import Path
from statistics import mean

import roundel
from roundel.recipes import BEST, GPTQ, NEAREST

METHODS = {"nearest": NEAREST, "activation (GPTQ)": GPTQ, "Roundel": BEST}


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval-data")
    parser.add_argument("--schemes", nargs="+", required=True)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-sequences", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for scheme in args.schemes:
        for title, settings in METHODS.items():
            runs = []
            for seed in range(args.seeds):
                with tempfile.TemporaryDirectory() as scratch:
                    runs.append(
                        roundel.quantize(
                            args.model,
                            output=Path(scratch) / "out",
                            scheme=scheme,
                            calibration=args.calibration,
                            eval_data=args.eval_data,
                            sequences=args.sequences,
                            seq_len=args.seq_len,
                            eval_sequences=args.eval_sequences,
                            seed=seed,
                            **settings,
                        )
                    )
            kl = [run.report.kl_mean for run in runs]
            rows.append(
                {
                    "scheme": scheme,
                    "method": title,
                    "kl": mean(kl),
                    "kl_by_seed": kl,
                    "stderr": mean(run.report.kl_stderr for run in runs),
                    "predicted_over_measured": mean(run.details["predicted_kl"]["predicted_over_measured"] for run in runs),
                    "top1_agreement": mean(run.report.top1_agreement for run in runs),
                    "perplexity": mean(run.report.perplexity_model for run in runs),
                    "perplexity_reference": runs[0].report.perplexity_reference,
                    "bits_per_weight": runs[0].details["bits_per_weight"]["quantized"],
                    "seconds": mean(sum(run.details["seconds"].values()) for run in runs),
                    "skipped": len(runs[0].details["skipped"]),
                }
            )
            row = rows[-1]
            measured = f"{row['kl']:.4f} ± {row['stderr']:.4f} | {100 * row['top1_agreement']:.1f} % | {row['perplexity']:.3f}"
            rest = f"{row['predicted_over_measured']:.2f} | {row['bits_per_weight']:.2f} | {row['seconds']:.0f}"
            print(f"| {scheme} | {title} | {measured} | {rest} |", flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("roundel", "torch", "transformers", "compressed-tensors", "numba")}
    settings = {key: str(value) for key, value in vars(args).items()}
    args.output.write_text(json.dumps({"commit": commit(), "versions": versions, "settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
