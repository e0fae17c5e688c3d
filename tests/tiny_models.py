"""Small random models of every family that is supported; weights are drawn here, nothing is downloaded."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
HEAD = {"head_dim": 8}

FAMILIES = {
    "llama": lambda v: LlamaConfig(vocab_size=v, **SIZE),
    "llama_tied": lambda v: LlamaConfig(vocab_size=v, tie_word_embeddings=True, **SIZE),
    "mistral": lambda v: MistralConfig(vocab_size=v, sliding_window=5, **SIZE),
    "qwen2": lambda v: Qwen2Config(vocab_size=v, **SIZE),
    "qwen3": lambda v: Qwen3Config(vocab_size=v, **HEAD, **SIZE),
    "gemma2": lambda v: Gemma2Config(
        vocab_size=v, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **HEAD, **SIZE
    ),
    "gemma3": lambda v: Gemma3TextConfig(vocab_size=v, sliding_window=5, **HEAD, **SIZE),
    "granite": lambda v: GraniteConfig(vocab_size=v, logits_scaling=4.0, **SIZE),
    "cohere": lambda v: CohereConfig(vocab_size=v, logit_scale=0.25, **SIZE),
}


def tiny_lm(family: str = "llama", vocabulary: int = 512, seed: int = 0) -> torch.nn.Module:
    """A random causal LM of a family, in float32."""
    return random_lm(FAMILIES[family](vocabulary), seed)


def random_lm(config, seed: int = 0) -> torch.nn.Module:
    """A random causal LM in float32 whose weights are large enough for its parts to matter."""
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in lm.parameters():
            if p.ndim >= 2:
                p.normal_(std=0.15)
    return lm.eval()
