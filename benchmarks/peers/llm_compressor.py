"""llm-compressor: nearest rounding, GPTQ (Frantar et al. 2022) with scales from minima and maxima (its default) or from the least squared
error, and AWQ (Lin et al. 2023), which scales input channels before it rounds to the nearest.

Linears are named explicitly. Columns go by decreasing activation, its default, with groups of neighbouring columns. Scales stay float32. It
takes the GPU where it sees one.
"""

import re

from adapter import Job, changed

job = Job()
model, tokenizer = job.load()

import torch  # noqa: E402
from compressed_tensors.quantization import forward_quantize  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from llmcompressor.modifiers.transform.awq import AWQModifier, get_layer_mappings_from_model  # noqa: E402
from llmcompressor.pipelines.cache import IntermediatesCache  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

if job.device == "cpu":  # AWQ pins memory also where there is no accelerator to pin it for, and fails
    IntermediatesCache.pin_memory = lambda *_given, **_named: None

weights = {"num_bits": job.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": job.group}
if job.method == "gptq-mse":
    weights["observer"] = "mse"
scheme = {"config_groups": {"group_0": {"targets": job.linears, "weights": weights}}, "ignore": ["lm_head"]}
smoothed = [  # it fails where no layer of a mapping is quantized
    mapping
    for mapping in get_layer_mappings_from_model(model)
    if any(re.match(pattern.removeprefix("re:"), name) for pattern in mapping.balance_layers for name in job.linears)
]
recipes = {
    "rtn": [QuantizationModifier(**scheme)],
    "gptq": [GPTQModifier(**scheme)],
    "gptq-mse": [GPTQModifier(**scheme)],
    "awq": [AWQModifier(mappings=smoothed), QuantizationModifier(**scheme)],
}

original = {name: value.clone() for name, value in model.state_dict().items()}
tokens = job.tokens()
batches = DataLoader([{"input_ids": row} for row in tokens], batch_size=8)
with job.quantizing():
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=None if job.method == "rtn" else batches,
        recipe=recipes[job.method],
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
    )


def quantized(module: torch.nn.Module) -> bool:
    scheme = getattr(module, "quantization_scheme", None)
    return scheme is not None and scheme.weights is not None


def weight(_name: str, module: torch.nn.Module) -> torch.Tensor:
    return forward_quantize(module, module.weight, "weight", module.quantization_scheme.weights) if quantized(module) else module.weight


names = [name for name, module in model.named_modules() if quantized(module)]
job.done(names, ["llmcompressor", "compressed-tensors", "torch", "transformers"], changed(model, original, weight))
