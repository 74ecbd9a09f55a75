"""Tiny random models of every architecture that `transformers` can build as a causal language model, offline.

Sizes are put wherever a configuration has a field of that name; `_MORE` holds what an architecture needs beside.
Weights are drawn anew with a wide spread, so that what a token attends to moves the log-probabilities by whole nats.
"""

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, CONTEXT = 97, 256

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "dim_model": 32, "emb_dim": 32,
    "embedding_size": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 64, "ffn_hidden_size": 64, "ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64,
    "dff": 64, "dim_ff": 64, "n_inner": 64, "d_inner": 64, "intermediate_size_mlp": 64, "attention_hidden_size": 32,
    "dense_intermediate_size": 64, "expert_intermediate_size": 32, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "num_hidden_layers": 4, "n_layer": 4, "num_layers": 4, "n_layers": 4, "decoder_layers": 4, "encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "n_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "kv_channels": 8, "qk_head_dim": 16, "attention_head_dim": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "max_position_embeddings": CONTEXT, "n_positions": CONTEXT, "n_ctx": CONTEXT, "max_seq_len": CONTEXT,
    "max_sequence_length": CONTEXT, "context_length": CONTEXT,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "n_shared_experts": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_num_heads": 8,
    "mamba_head_dim": 8, "mamba_n_groups": 1, "mamba_d_ssm": 64, "mamba_dt_rank": 4, "mamba_chunk_size": 16,
    "state_size": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16,
    "index_n_heads": 2, "index_head_dim": 16, "lru_width": 32,
    "dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0,
    "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0, "resid_dropout": 0.0, "embed_dropout": 0.0, "dropout_rate": 0.0, "classifier_dropout": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

_MORE = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "vocab_size_per_layer_input": 97,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mpt": {"attn_pdrop": 0},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"num_hidden_layers": 54},
}
"""Fields that the sizes above do not make consistent, by architecture."""

_VARIANTS = {
    "mistral-window": ("mistral", {"sliding_window": 32}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "phi3-window": ("phi3", {"sliding_window": 32}),
    "gpt_neo-w32": ("gpt_neo", {"window_size": 32}),
    "llama4-chunk64": ("llama4_text", {"attention_chunk_size": 64}),
    "deepseek_v32-topk16": ("deepseek_v32", {"index_topk": 16}),
    "glm_moe_dsa-topk16": ("glm_moe_dsa", {"index_topk": 16}),
    "doge-keep24": ("doge", {"keep_window_size": 24}),
    "gemma2-w32": ("gemma2", {"sliding_window": 32}),
    "gpt_oss-w32": ("gpt_oss", {"sliding_window": 32}),
    "cohere2-w32": ("cohere2", {"sliding_window": 32}),
    "olmo3-w32": ("olmo3", {"sliding_window": 32}),
    "gemma3-w32": ("gemma3_text", {"sliding_window": 32}),
    "recurrent_gemma-w32": ("recurrent_gemma", {"attention_window_size": 32}),
    "llama-dynamic": (
        "llama",
        {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0,
                "original_max_position_embeddings": 64, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0],
            },
        },
    ),
}  # fmt: skip
"""Architectures again, with windows small enough to be met by short texts, and positions that look at the length."""


def names():
    """Every architecture, and the variants."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) + sorted(_VARIANTS)


def _sized(cls, more):
    """The configuration of a class, small wherever it has a size."""
    own = cls()
    known = {*own.to_dict(), *own.attribute_map}
    sizes = {k: v for k, v in _SIZES.items() if k in known}
    if "kv_lora_rank" in sizes:  # keys and values are made for every head
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for part in own.sub_configs:
        if (inner := getattr(own, part, None)) is not None:
            sizes[part] = _sized(type(inner), {}).to_dict()
    return cls(**{**sizes, **more})


def configuration(name):
    kind, more = _VARIANTS.get(name, (name, {}))
    return _sized(CONFIG_MAPPING[kind], {**_MORE.get(kind, {}), **more})


def build(name, dtype=torch.float64, seed=0, spread=0.15):
    """A model in evaluation mode; ValueError where its configuration cannot be made tiny in general terms."""
    config = configuration(name)
    config._experts_implementation = "eager"  # grouped products are not for float64
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    weights = sum(p.numel() for p in shapes.parameters())
    if weights > 1.5e7:
        raise ValueError(f"{name}: {weights} weights are not tiny")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=draw) * spread)
    return model.to(dtype).eval()
