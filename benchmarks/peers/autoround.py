"""AutoRound (Cheng et al. 2023, "SignRound"): signed gradient descent on rounding and clipping, one decoder layer at a time.

Methods are numbers of iterations; everything else is its default for symmetric integers (scales in float16), but that nothing is
compiled, which for small models costs more than it saves, and that processors without products in bfloat16 compute in float32.

Left to itself it skips linears of which a side is no multiple of 32, which is about packing, not about rounding. The side that groups
divide must be; here that rule is lifted for the other one, so that it quantizes what all others do.
"""

import copy
from typing import Any

from adapter import Job, changed

job = Job()
model, tokenizer = job.load()

import torch  # noqa: E402
from auto_round import AutoRound  # noqa: E402
from auto_round.compressors import layer_config_resolver as resolver  # noqa: E402

original = {name: value.clone() for name, value in model.state_dict().items()}
rules = resolver.apply_layer_config_special_cases


def all_linears(layer_config: dict[str, Any], model: Any, default: dict[str, Any], *rest: Any) -> Any:
    layer_config, *others = rules(layer_config, model, default, *rest)
    for name in job.linears:
        if layer_config[name]["bits"] == 16:
            layer_config[name] = {**copy.deepcopy(default), "fixed_by_user": False, "in_blocks": True}
    return layer_config, *others


resolver.apply_layer_config_special_cases = all_linears
tokens = job.tokens()
texts = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens]
with job.quantizing():
    rounder = AutoRound(
        model,
        tokenizer,
        bits=job.bits,
        group_size=job.group,
        sym=True,
        iters=int(job.method.removeprefix("iters-")),
        dataset=texts,
        nsamples=len(texts),
        seqlen=tokens.shape[1],
        seed=job.seed,
        device_map=job.device,
        amp=job.device != "cpu" or torch.cpu._is_avx512_bf16_supported(),
        enable_torch_compile=False,
    )
    model, _ = rounder.quantize()
quantized = [name for name, module in model.named_modules() if hasattr(module, "scale") and hasattr(module, "weight")]
job.done(quantized, ["auto-round", "torch", "transformers"], changed(model, original))
