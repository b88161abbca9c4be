"""KL against CPU time on a real model: our efforts beside other quantizers, drawn from benchmarks/results/real-NAME.json.

    python studies/efforts.py smollm2-135m

The points of others are its `peers`, and what it holds as measured `elsewhere`: the same model, text and scheme on another machine.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    name = parser.parse_args().name
    found = json.loads((ROOT / "benchmarks" / "results" / f"real-{name}.json").read_text(encoding="utf-8"))
    mpl.use("agg")
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    ours = sorted((row for row in found["rows"] if not row["options"]), key=lambda row: row["cpu_seconds"])
    minutes = [row["cpu_seconds"] / 60 for row in ours]
    axes.errorbar(minutes, [row["kl"] for row in ours], [row["kl_stderr"] for row in ours], marker="o", label="Roundel")
    for row, x in zip(ours, minutes, strict=True):
        axes.annotate(f"--effort {row['effort']}", (x, row["kl"]), (6, 6), textcoords="offset points")
    here = [{**row, "cpu_minutes": row["cpu_seconds"] / 60} for row in found.get("peers", [])]
    others = here + found.get("elsewhere", [])
    axes.scatter([row["cpu_minutes"] for row in others], [row["kl"] for row in others], marker="s", color="0.4", label="others")
    for row in others:
        axes.annotate(row["method"], (row["cpu_minutes"], row["kl"]), (6, 3), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="CPU minutes", ylabel="KL, nats per token", title=f"{name}, {ours[0]['scheme']}")
    axes.set_xlim(right=3 * max(minutes))
    for axis, ticks in ((axes.xaxis, (5, 10, 20, 50, 100, 200, 500)), (axes.yaxis, (0.1, 0.2, 0.3, 0.5, 1, 2))):
        low, high = axis.get_view_interval()
        axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(ROOT / "docs" / "figures" / f"efforts-{name}.png", dpi=130)


if __name__ == "__main__":
    main()
