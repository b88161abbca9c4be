"""The model card of a quantized checkpoint: recipe, calibration, measured loss, how to load it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from roundel.grids import parse_scheme

__all__ = ["model_card", "number", "refined_card", "with_error"]


def number(value: float | None) -> str:
    """Four significant digits, without an exponent for ordinary sizes."""
    if value is None:
        return "-"
    return f"{value:.4g}" if 1e-4 <= abs(value) < 1e6 or value == 0 else f"{value:.3e}"


def with_error(value: float, error: float | None) -> str:
    """A value and its standard error, which has two significant digits."""
    return number(value) if error is None or math.isnan(error) else f"{number(value)} ± {error:.2g}"


def _python(lines: str, note: str = "") -> str:
    return f"""```python
{lines}
tokenizer = AutoTokenizer.from_pretrained("PATH")
```{note}"""


CAUSAL = "AutoModelForCausalLM"
"""Transformers' class of most models."""

_PLAIN = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")"""

_USE = {
    "compressed-tensors": "vLLM: `vllm serve PATH`. Transformers (`pip install transformers compressed-tensors>=0.17`):\n\n"
    + _python(_PLAIN),
    "asymmetric": "vLLM: `vllm serve PATH`. Transformers refuses packed zero points by default "
    "(`pip install transformers compressed-tensors>=0.17`):\n\n"
    + _python(
        """from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

model = AutoModelForCausalLM.from_pretrained("PATH", quantization_config=CompressedTensorsConfig(dequantize=True))"""
    ),
    "gptq": "vLLM: `vllm serve PATH`. Transformers with GPTQModel (`pip install gptqmodel`):\n\n" + _python(_PLAIN),
    "awq": "vLLM: `vllm serve PATH`; SGLang; Transformers with GPTQModel (`pip install gptqmodel`):\n\n" + _python(_PLAIN),
    "auto-round": "vLLM (schemes without zero points): `vllm serve PATH --dtype float16`. Transformers (`pip install auto-round`):\n\n"
    + _python(_PLAIN),
    "mlx": "mlx-lm: `mlx_lm.generate --model PATH --prompt TEXT`, `mlx_lm.server --model PATH`; LM Studio.",
    "exl3": "exllamav3 and TabbyAPI: `python main.py --model-dir PARENT_OF_PATH --model-name PATH`.",
    "gguf": "llama.cpp: `llama-server -m PATH/model.gguf` or `llama-cli -m PATH/model.gguf -p TEXT`; Ollama: `FROM PATH/model.gguf`.",
    "native": "Transformers (`pip install roundel`), weights stay packed in memory:\n\n" + _python("import roundel  # first\n" + _PLAIN),
    "dense": _python(_PLAIN)
    + """

vLLM: `vllm serve PATH`.

The weights are stored as they are after rounding, in the original's type: any engine loads them, and the file is not smaller. The bits per
weight above are what the codes and scales take.""",
}
"""How each format is served."""


_LIBRARIES = {"gguf": "gguf", "mlx": "mlx", "exl3": "exllamav3", "native": "roundel"}
"""By which the Hub offers code that loads a model; of formats that are not named it is Transformers."""


def _continuations(found: list[dict[str, Any]]) -> str:
    """Indented, so that no text can end the block that it stands in; older reports have none."""
    if not found:
        return ""
    blocks = []
    for row in found:
        texts = {
            "beginning": row["prompt"],
            "original": row["original"]["text"],
            **{key: own["text"] for key, own in row["continued"].items()},
        }
        width = max(map(len, texts)) + 2
        blocks.append("\n".join(f"    {f'{key}:':<{width}}{json.dumps(text, ensure_ascii=False)}" for key, text in texts.items()))
    return "\n## Beginnings of that text, continued greedily\n\n" + "\n\n".join(blocks) + "\n"


def _metadata(report: dict[str, Any]) -> str:
    """The card's head, which the Hub reads: what is not known is left out, for it refuses a base model or a licence that is none."""
    model, form = report["model"], report["format"]
    base = model.get("repository")  # older reports have none
    return ModelCardData(
        base_model=base,
        base_model_relation=base and "quantized",
        library_name=_LIBRARIES.get(form, "transformers"),
        pipeline_tag="text-generation" if model.get("auto_class", CAUSAL) == CAUSAL else "image-text-to-text",
        tags=["roundel", form, report["scheme"].replace(" ", "-")],
        **model.get("terms", {}),
    ).to_yaml()


def model_card(report: dict[str, Any]) -> str:
    """README.md of the output directory, from the contents of roundel.json."""
    recipe, measured, bits = report["recipe"], report["evaluation"], report["bits_per_weight"]
    kl, predicted, by = measured["kl"], report["predicted_kl"], report["predicted_kl"].get("by", "total")
    share = report["coverage"]["share"] if "coverage" in report else None  # older reports have none
    covered = "" if share is None else f"| share of the decoder's weights that is quantized | {100 * share:.1f} % |\n"
    skipped = "".join(f"- `{name}`: {reason}\n" for name, reason in report["skipped"].items())
    left = f"\nLinears left in their precision:\n\n{skipped}" if skipped else ""
    form = report["format"]
    zero_points = any(row["scheme"].endswith("-asym") for row in report["layers"].values())
    alone = ", of rounded weights alone" if any(parse_scheme(row["scheme"]).inputs for row in report["layers"].values()) else ""
    return f"""---
{_metadata(report)}
---
# {report["model"].get("repository") or Path(report["model"]["name"]).name}, quantized to {report["scheme"]}

Quantized by [Roundel](https://pypi.org/project/roundel/) {report["roundel"]}: rounded against the curvature of the
whole model's output distribution.

| measured on {measured["tokens"]} held-out tokens | |
|---|---|
| KL(original, quantized), nats per token | **{with_error(kl["mean"], kl["stderr"])}** (standard error) |
| KL, median and 99th percentile | {number(kl["median"])}, {number(kl["p99"])} |
| KL predicted from the curvature{alone} | {with_error(predicted[by], predicted[f"{by}_stderr"])} |
| top-1 agreement | {100 * measured["top1_agreement"]:.1f} % |
| perplexity, quantized and original | {number(measured["perplexity"]["model"])}, {number(measured["perplexity"]["reference"])} |
| bits per weight: quantized linears, whole checkpoint | {bits["quantized"]:.3f}, {bits["model"]:.3f} |
{covered}
Evaluation text: `{measured["source"]}`; {100 * measured["overlap_with_calibration"]:.1f} % of its 32-token windows
occur in the calibration text.
{_continuations(report.get("continuations", []))}
## Load

`PATH` is the directory that has these files; vLLM and Transformers take the id of this repository as well.

{_USE["asymmetric" if form == "compressed-tensors" and zero_points else form].replace(CAUSAL, report["model"].get("auto_class", CAUSAL))}

## Recipe

| setting | value |
|---|---|
{"".join(f"| {key} | `{value}` |{chr(10)}" for key, value in recipe.items())}| calibration tokens | {report["calibration"]["tokens"]} |
| SHA-256 of the calibration tokens | `{report["calibration"]["sha256"]}` |
{left}
Every layer's numbers are in `roundel.json`.
"""


def refined_card(report: dict[str, Any]) -> str:
    """README.md of a model of others that was refined, from the contents of refined.json."""
    refined, model, recipe = report["refined"], report["model"], report["recipe"]
    head = ModelCardData(
        base_model=model.get("repository"),
        base_model_relation=model.get("repository") and "quantized",
        pipeline_tag="text-generation",
        tags=["roundel", "refined"],
        **model.get("terms", {}),
    ).to_yaml()
    rows = "".join(
        f"| {name} | {with_error(own['before']['kl']['mean'], own['before']['kl']['stderr'])} | "
        f"{with_error(own['after']['kl']['mean'], own['after']['kl']['stderr'])} | "
        f"{100 * own['before']['top1_agreement']:.1f} %, {100 * own['after']['top1_agreement']:.1f} % |\n"
        for name, own in refined["texts"].items()
    )
    what = (
        f"Codes and scales of {refined['linears_changed']} of {refined['linears']} quantized linears are other ones"
        if refined["better"]
        else "Nothing was found that loses less: all files are as they were"
    )
    return f"""---
{head}
---
# {Path(refined["from"]).name}, refined

`{refined["from"]}` was refined by [Roundel](https://pypi.org/project/roundel/) {report["roundel"]} with
`{model.get("repository") or model["name"]}` as its original. {what}; format, names and size ({refined["bytes"]} bytes) are the same.

| text | KL(original, quantized) before, nats per token | after | top-1 agreement before, after |
|---|---|---|---|
{rows}
Calibrated on `{recipe["calibration"]}` ({report["calibration"]["tokens"]} tokens); `held out` is text of
`{report["evaluation"]["source"]}`.
Every layer's numbers are in `refined.json`.
"""
