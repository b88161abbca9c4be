"""Tiny random models of nine architectures, with a tokenizer, as directories that Transformers reads.

Weights are random but larger than usual (standard deviation 0.1), biases and norms too, so that every part of a layer
matters and the KL of a rounded model is far from 0.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

WIDTH, LAYERS, VOCABULARY, POSITIONS = 64, 2, 300, 128
BOS, EOS = 0, 1

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.1,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
GROUPED: dict[str, Any] = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2}
MODERN: dict[str, Any] = {**GROUPED, "head_dim": 16}

LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
QKV = LLAMA[:3]


class Architecture:
    """A configuration, and what is known of the model that it makes without asking the code under test."""

    def __init__(
        self,
        config: str,
        model: str,
        *,
        tied: bool = False,
        layers: str = "model.layers",
        linears: tuple[str, ...] = LLAMA,
        biased: tuple[str, ...] = (),
        starts: bool = False,
        settings: dict[str, Any] = MODERN,
        **extra: Any,
    ) -> None:
        self.config = getattr(transformers, config)(**settings, tie_word_embeddings=tied, **extra)
        self.model: Callable[[Any], PreTrainedModel] = getattr(transformers, model)
        self.tied, self.starts = tied, starts
        self.linears = {f"{layers}.{k}.{name}" for k in range(LAYERS) for name in linears}
        self.biased = {f"{layers}.{k}.{name}" for k in range(LAYERS) for name in biased}


def architectures() -> dict[str, Callable[[], Architecture]]:
    """By name; made when called, because some configurations are slow to import."""
    neox = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    opt = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
    opt_sizes = {key: value for key, value in SIZES.items() if key != "initializer_range"}
    gemma: dict[str, Any] = {"tied": True, "starts": True}
    return {
        "llama": lambda: Architecture("LlamaConfig", "LlamaForCausalLM"),
        "llama-tied": lambda: Architecture("LlamaConfig", "LlamaForCausalLM", tied=True, starts=True),
        "qwen2": lambda: Architecture("Qwen2Config", "Qwen2ForCausalLM", biased=QKV, settings=GROUPED),
        "qwen3": lambda: Architecture("Qwen3Config", "Qwen3ForCausalLM", tied=True),
        "mistral": lambda: Architecture("MistralConfig", "MistralForCausalLM", sliding_window=16),
        "gemma2": lambda: Architecture("Gemma2Config", "Gemma2ForCausalLM", **gemma, sliding_window=16),
        "gemma3": lambda: Architecture("Gemma3TextConfig", "Gemma3ForCausalLM", **gemma, sliding_window=16),
        "phi3": lambda: Architecture(
            "Phi3Config",
            "Phi3ForCausalLM",
            linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
            settings=GROUPED,
        ),
        "opt": lambda: Architecture(
            "OPTConfig",
            "OPTForCausalLM",
            tied=True,
            layers="model.decoder.layers",
            linears=opt,
            biased=opt,
            settings={**opt_sizes, "pad_token_id": 2},
            ffn_dim=96,
            init_std=0.1,
            word_embed_proj_dim=WIDTH,
        ),
        "gpt-neox": lambda: Architecture(
            "GPTNeoXConfig",
            "GPTNeoXForCausalLM",
            layers="gpt_neox.layers",
            linears=neox,
            biased=neox,
            settings=SIZES,
            intermediate_size=96,
        ),
    }


def make_text(characters: int, seed: int = 0) -> str:
    """Sentences of made-up words, some more frequent than others."""
    chooser = random.Random(seed)
    words = ["".join(chooser.choices("aeioulnrstmdkp", k=chooser.randint(2, 8))) for _ in range(200)]
    frequencies = [1 / (rank + 2) for rank in range(len(words))]
    text = ""
    while len(text) < characters:
        text += " ".join(chooser.choices(words, frequencies, k=chooser.randint(4, 12))).capitalize() + ".\n"
    return text[:characters]


def make_tokenizer(*, starts: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens; with `starts` it begins every text with its BOS."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([make_text(4000)], trainer)
    if starts:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = {"bos_token": "<s>"} if starts else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", **special)


def make_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of an architecture, in evaluation mode."""
    architecture = architectures()[name]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = architecture.model(architecture.config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def save_model(directory: Path, name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Writes such a model, and its tokenizer, to `directory`."""
    make_model(name, seed).to(dtype).save_pretrained(directory)
    make_tokenizer(starts=architectures()[name]().starts).save_pretrained(directory)
    return directory
