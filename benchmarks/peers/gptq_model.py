"""GPTQModel: GPTQ with its default order of columns within and between groups, and GPTAQ (Li et al. 2025), which aims at the original's
outputs given the quantized layers' inputs.

The weights are taken where it would pack them, since packing needs heights that are multiples of 32, which not all models have.
"""

import os
import re

from adapter import Job, changed

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # the fewest that it starts with; each computes on one thread
job = Job()

import torch  # noqa: E402
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # noqa: E402
from gptqmodel.looper import gptq_processor  # noqa: E402
from gptqmodel.quantization.config import GPTAQConfig  # noqa: E402

original_model, tokenizer = job.load()
original = original_model.state_dict()
others = [
    name for name, module in original_model.named_modules() if isinstance(module, torch.nn.Linear) and name not in (*job.linears, "lm_head")
]
config = QuantizeConfig(
    bits=job.bits,
    group_size=job.group,
    sym=True,
    gptaq=GPTAQConfig(device=job.device) if job.method == "gptaq" else None,
    dynamic={f"-:^{re.escape(name)}$": {} for name in others} or None,
    offload_to_disk=False,
    device=job.device,
)
values: dict[str, torch.Tensor] = {}


def take(name: str, layers: dict[str, torch.nn.Module], **_others: object) -> str:
    values[f"{name}.weight"] = layers[name].weight.detach().float().cpu().clone()
    return "none"


gptq_processor.pack_module = take
tokens = job.tokens()
texts = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens]
torch.manual_seed(job.seed)
peer = GPTQModel.load(job.model, config, dtype=torch.float32)
with job.quantizing():
    peer.quantize(texts, tokenizer=tokenizer, batch_size=8, backend=BACKEND.GPTQ_TORCH)
quantized = [name.removesuffix(".weight") for name in values]
job.done(quantized, ["gptqmodel", "torch", "transformers"], {**changed(peer.model, original), **values})
