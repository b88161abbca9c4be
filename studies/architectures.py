"""Every causal architecture of the installed Transformers that can be built small, and every one for pictures and text: what of it is
quantized, written and read back.

    python studies/architectures.py [KIND ...] [-o benchmarks/results/architectures.json] [--page docs/architectures.md]

Each is a random model of two or so layers, quantized to int4-g32 with the default settings and by nearest rounding, in a process of its
own. The written directory is loaded by Transformers (after `import roundel` where it is in the native format), and the weights that it has
are compared with the ones that were rounded to. Rows that the file has already are not run again.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "lru_width", "block_dim"), 64),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "dim_ffn", "dff", "decoder_ffn_dim", "block_ff_dim"), 128
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "global_head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim", "index_head_dim"), 16
    ),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "mamba_d_head", "mamba_headdim"), 16),
    **dict.fromkeys(("qk_head_dim", "q_lora_rank", "kv_lora_rank", "moe_latent_size", "encoder_ffn_dim"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "context_length", "max_sequence_length"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "mamba_expand", "expand"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "intermediate_size_mlp", "attn_intermediate_size"), 64),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(
        ("state_size", "mamba_d_state", "ssm_state_size", "mamba_num_heads", "mamba_n_heads", "n_mamba_heads", "time_step_rank"), 8
    ),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "hidden_size_per_layer_input", "index_topk"), 16),
    **dict.fromkeys(("laurel_rank", "mamba_dt_rank", "dt_rank"), 8),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 64),
    **dict.fromkeys(("num_nextn_predict_layers", "num_kv_shared_layers", "num_hash_layers", "zero_expert_num"), 0),
    "conv_L_cache": 3,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "o_groups": 2,
    "o_lora_rank": 32,
}
"""Of attributes of configurations; those that one does not have are left out."""

GEMMA4 = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
OTHERWISE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma4": {"text_config": GEMMA4, "vision_config": {"position_embedding_size": 64}},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "laguna": {
        "num_attention_heads_per_layer": [4, 4],
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
        "hidden_size": 64,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "zamba2": {  # a block that two layers use
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "layer_types": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "adapter_rank": 32,
    },
}
"""What is made differently of some, beside `SMALL`: from the beginning if it is complete, else afterwards."""

LISTS = (
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "attention_types",
    "mixer_types",
    "block_types",
    "no_rope_layers",
    "moe_layers",
)
"""Attributes with an entry for each layer."""

SECTIONED = ("vl", "glm4v", "glm46v", "glm_ocr", "glmga", "omni")
"""In the names of types whose rotary embedding has a part for time, height and width each."""

TOKENS = ("pad_token_id", "bos_token_id", "image_token_id", "audio_token_id", "video_token_id")


def shrunk(config: Any, vocabulary: int) -> None:
    """Makes a configuration small, and those inside of it."""
    for name, value in SMALL.items():
        held = attribute(config, name)
        if isinstance(held, int) and not isinstance(held, bool):
            put(config, name, value)
    if isinstance(attribute(config, "kv_lora_rank"), int) and isinstance(attribute(config, "num_key_value_heads"), int):
        config.num_key_value_heads = config.num_attention_heads  # latent attention has one for each
    if any(part in config.model_type for part in SECTIONED) and isinstance(rope := attribute(config, "rope_parameters"), dict):
        rope["mrope_section"] = [2, 3, 3]
    if hasattr(config, "vocab_size"):
        config.vocab_size = vocabulary
    if hasattr(config, "vocab_size_per_layer_input"):
        config.vocab_size_per_layer_input = vocabulary
    for name in TOKENS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 1)
    if getattr(config, "eos_token_id", None) is not None:
        config.eos_token_id = 2
    for name in LISTS:
        held = getattr(config, name, None)
        if isinstance(held, list | tuple) and held:
            kinds = list(dict.fromkeys(held))
            put(config, name, (kinds * 2)[:2])
    for inner in list(vars(config).values()):
        if hasattr(inner, "to_dict") and hasattr(inner, "model_type"):
            shrunk(inner, vocabulary)


def attribute(config: Any, name: str) -> Any:
    """One that it has, and the same for all layers."""
    with contextlib.suppress(Exception):
        return getattr(config, name, None)
    return None


def put(config: Any, name: str, value: Any) -> None:
    """Sets an attribute, if it is one and not computed from others."""
    with contextlib.suppress(AttributeError, ValueError, TypeError):
        setattr(config, name, value)


def one(kind: str, work: Path, *, nearest: bool = True) -> dict[str, Any]:
    """The row of an architecture; rounded to `nearest` as well, to compare with."""
    from transformers import AutoConfig, AutoTokenizer

    import roundel
    from roundel.artifacts.checkpoints import read
    from roundel.models.experts import split_experts
    from roundel.models.load import auto_class, load_model, locate
    from roundel.recipes import NEAREST
    from roundel.rounding.round import dequantized

    torch.set_num_threads(1)
    torch.manual_seed(0)
    demo = locate("demo")
    tokenizer = AutoTokenizer.from_pretrained(demo)
    try:
        otherwise = OTHERWISE.get(kind, {})
        given = {name: value for name, value in otherwise.items() if isinstance(value, dict) or "hidden_size" in otherwise}
        config = AutoConfig.for_model(kind, **given)
        shrunk(config, len(tokenizer))
        for name in otherwise.keys() - given.keys():
            put(config, name, otherwise[name])
        model = auto_class(config).from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(1.5)
            if not torch.isfinite(model(torch.arange(3, 51)[None], use_cache=False).logits).all():
                return {"state": "not built", "why": "the random model's logits are not finite"}
        model.save_pretrained(work / "model")
        auto_class(config).from_pretrained(work / "model")  # not all that can be made
    except Exception as error:
        return {"state": "not built", "why": reason(error)}
    tokenizer.save_pretrained(work / "model")
    row: dict[str, Any] = {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
    settings = {"scheme": "int4-g32", "calibration": "stdlib", "sequences": 24, "seq_len": 48, "eval_sequences": 8}
    began = time.monotonic()
    try:
        result = roundel.quantize(str(work / "model"), output=work / "out", **settings)
    except Exception as error:
        return {**row, "state": "refused" if isinstance(error, roundel.RoundelError) else "failed", "why": reason(error)}
    coverage = result.details["coverage"]
    row |= {
        "state": "quantized",
        "seconds": round(time.monotonic() - began, 1),
        "format": result.details["format"],
        "share": coverage["share"],
        "left": coverage["left"],
        "experts": any("text_rows" in layer for layer in result.details["layers"].values()),
        "kl": result.report.kl_mean,
        "warnings": result.details["warnings"],
    }
    try:
        if nearest:
            row["kl_nearest"] = roundel.quantize(str(work / "model"), output=work / "nearest", **settings, **NEAREST).report.kl_mean
        loaded = load_model(work / "out", device=torch.device("cpu"), dtype=torch.float32)
        with torch.no_grad():
            row["finite"] = bool(torch.isfinite(loaded(torch.arange(3, 51)[None], use_cache=False).logits).all())
        if row["format"] != "native":
            split_experts(loaded)
        differences = []
        for name, weight in read(work / "out").rounded.items():
            module, wanted = loaded.get_submodule(name), dequantized(weight)
            W = module.dequantized() if row["format"] == "native" else module.weight
            differences.append(float((W - wanted).abs().max() / wanted.abs().max()))
        row["difference"] = max(differences)
        row["changed"] = changed(work, result.details["layers"].values())
    except Exception as error:
        row["unread"] = reason(error)
    return row


def changed(work: Path, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Stored tensors, beside the quantized ones, of which what was written is not the source's bit for bit."""
    from roundel.models.checkpoint import Checkpoint

    before, after = Checkpoint.open(work / "model"), Checkpoint.open(work / "out")
    replaced = {row["tensor"] for row in rows} | {row.get("part_of") for row in rows}
    return [name for name in before if name not in replaced and not (name in after and same(before.read(name), after.read(name)))]


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def run(kind: str) -> dict[str, Any]:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        line = [sys.executable, __file__, "--one", kind, scratch]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=600, env=environment, check=False)
        except subprocess.TimeoutExpired:
            return {"state": "failed", "why": "more than ten minutes"}
        found = [text.removeprefix("ROW ") for text in done.stdout.splitlines() if text.startswith("ROW ")]
        return json.loads(found[-1]) if found else {"state": "failed", "why": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}


def page(content: dict[str, Any]) -> str:
    """docs/architectures.md."""
    rows = content["rows"]
    built = {kind: row for kind, row in rows.items() if row["state"] != "not built"}
    good = [row for row in built.values() if row["state"] == "quantized" and row["share"] >= 0.95 and "unread" not in row]
    share = 100 * len(good) / max(1, len(built))
    lines = [
        "# Architectures",
        "",
        f"All {len(rows)} architectures of Transformers {content['versions']['transformers']}, as random models of few layers.",
        f"{len(built)} can be built so small; {len(good)} of them ({share:.1f} %) are read back with 95 % or more of the weights of",
        "their decoder layers' matrices quantized. Made by `make architectures`: int4-g32, 24 sequences of 48 tokens. Random models",
        "say what can be done, not how well. The difference is the largest between the weights that Transformers has after it has",
        "loaded the directory and those that were rounded to, relative to the largest weight; experts that it decodes itself it",
        "rounds to 16 bits (a model in bfloat16 has the very weights, rounded). What is not quantized is the source's bit for bit,",
        "under its names, but where a row says so: Transformers",
        "does not join stored pieces (convolutions of q, k, v) while it loads a packed directory, so they are written joined.",
        "",
        "| architecture | share | format | difference | KL | nearest | what stays, and why |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, row in sorted(built.items()):
        if row["state"] != "quantized":
            lines.append(f"| {kind} | – | – | – | – | – | {row['state']}: {clean(row['why'])} |")
            continue
        left = "; ".join(
            f"{clean(why)} ({100 * count / (count + 1e-9 + total(row)):.1f} %)" for why, count in list(row["left"].items())[:2]
        )
        if row.get("changed"):
            left = "; ".join([*([left] if left else []), f"{len(row['changed'])} tensors are written joined"])
        read = f"{row['difference']:.1g}" if "difference" in row else f"not read: {clean(row['unread'])}"
        nearest = f"{row['kl_nearest']:.2g}" if "kl_nearest" in row else "–"
        lines.append(f"| {kind} | {100 * row['share']:.1f} % | {row['format']} | {read} | {row['kl']:.2g} | {nearest} | {left} |")
    missing = [f"{kind} ({clean(row['why'])})" for kind, row in sorted(rows.items()) if row["state"] == "not built"]
    return "\n".join([*lines, "", f"Not built: {'; '.join(missing)}.", ""])


def total(row: dict[str, Any]) -> float:
    """Weights in the decoder's matrices that are quantized."""
    left = sum(row["left"].values())
    return left * row["share"] / (1 - row["share"]) if row["share"] < 1 else 1.0


def clean(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:160]


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print("ROW " + json.dumps(one(sys.argv[2], Path(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "architectures.json")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    from roundel.stages.report import versions
    from roundel.store import write_json

    content = json.loads(given.output.read_text(encoding="utf-8")) if given.output.is_file() else {"kind": "architectures", "rows": {}}
    content["versions"] = versions()
    for kind in given.kinds or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}):
        if kind in content["rows"] and not given.kinds:
            continue
        content["rows"][kind] = run(kind)
        row = content["rows"][kind]
        print(
            kind,
            row["state"],
            f"{row.get('share', 0):.3f}",
            row.get("format", ""),
            row.get("difference", row.get("unread", row.get("why", ""))),
            flush=True,
        )
        write_json(given.output, content)
    if given.page is not None:
        given.page.write_text(page(content), encoding="utf-8")


if __name__ == "__main__":
    main()
