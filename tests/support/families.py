"""Families of causal language models that transformers has, each built tiny and random.

A family is transformers' name of a model's type; words after it name settings that make another model of it. All that
transformers has are here, or in `NOT_TRIED`: a test says so after an upgrade.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fedloom.model.source import byte_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 0,
    # The same by older names.
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "d_model": 32, "n_layers": 2, "n_heads": 4,
    "num_layers": 2, "num_heads": 4, "max_seq_len": 64, "ffn_dim": 48, "word_embed_proj_dim": 32,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 1,
    # Experts.
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
    # Latent attention.
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    # Windows that are narrower than the longest document.
    "sliding_window": 8,
}  # fmt: skip
"""Sizes, by every name that a configuration may have for them; each takes those that it knows."""


@dataclass(frozen=True)
class Family:
    """A family: what its configuration needs beside `SMALL`, the layers that are adapted, and how it is judged."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    targets: Sequence[str] | None = None
    """Layers that are adapted; where left out, PEFT's choice, or `q_proj` and `v_proj` where PEFT has none."""
    dtype: str = "float64"
    attention: str = "eager"
    """Attention of the oracle, which is not to be the one that is judged."""
    scale: float = 4.0
    """Factor of the random matrices: freshly drawn ones are so small that layers hardly change anything."""
    rate: float = 1.0
    """Learning rate; smaller where training would not be smooth enough to compare."""
    random: bool = False
    """True where the model draws random numbers in training, so that nobody can repeat it by hand."""

    def targets_of(self, name: str) -> Sequence[str] | None:
        """Return the layers that the recipe names."""
        known = type_of(name) in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        return self.targets or (None if known else ["q_proj", "v_proj"])


def decoder(**changes: Any) -> Family:
    """Return an encoder made a decoder, which looks to the left only because its configuration says so."""
    return Family({"is_decoder": True, **changes}, ["query", "value"])


def experts(*targets: str, rate: float = 1.0, random: bool = False, **changes: Any) -> Family:
    """Return a mixture of experts, in the dtype that transformers' fused product of experts has."""
    return Family(changes, targets or None, dtype="float32", rate=rate, random=random)


MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_d_head": 16}
DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
LATENT: dict[str, Any] = {"num_key_value_heads": 4}
OF_LATENT = ("q_b_proj", "kv_b_proj")
GEMMA_3N = {
    "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 260, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, Family] = {
    "afmoe": experts(),
    "apertus": Family(),
    "arcee": Family(),
    "aria_text": experts(),
    "axk1": experts(*OF_LATENT, **LATENT),
    "axk2": experts("q_a_proj", "kv_b_proj", **LATENT),
    "bailing_hybrid": experts(
        "q_proj", "v_proj", "kv_b_proj", **LATENT, layer_types=["linear_attention", "full_attention"]
    ),
    "bamba": Family({**MAMBA, "attn_layer_indices": [1]}, ["q_proj", "v_proj", "in_proj"]),
    "bart": Family(),
    "beam": Family(),
    "bert": decoder(),
    "bert is_decoder=false": decoder(is_decoder=False),
    "bert-generation": decoder(),
    "big_bird": decoder(attention_type="original_full"),
    "bigbird_pegasus": Family(),
    "biogpt": Family(),
    "bitnet": Family(),
    "blenderbot": Family(),
    "blenderbot-small": Family(),
    "bloom": Family(),
    "camembert": decoder(),
    "codegen": Family({"rotary_dim": 4}),
    "cohere": Family(),
    "cohere2": Family(MIXED),
    "cohere2_moe": experts(),
    "cohere_compass_text": Family(
        {
            **MIXED,
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in MIXED["layer_types"]},
        }
    ),
    "cpmant": Family({"dim_head": 8, "dim_ff": 48}, ["project_q", "project_v"]),
    "ctrl": Family({"dff": 48}, ["Wq", "Wv"]),
    "cwm": Family(MIXED),
    "data2vec-text": decoder(),
    "dbrx": experts(
        "Wqkv",
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    ),
    "deepseek_v2": experts(*OF_LATENT, **LATENT),
    "deepseek_v3": experts(*OF_LATENT, **LATENT),
    "deepseek_v32": experts(*OF_LATENT, **LATENT),
    "deepseek_v4": experts("q_b_proj", "kv_proj"),
    "diffllama": Family(),
    "doge": Family(),
    "dots1": experts(),
    "dots3_note_text": experts(*OF_LATENT, **LATENT),
    "electra": decoder(),
    "ernie": decoder(),
    "ernie4_5": Family(),
    "ernie4_5_moe": experts(),
    "exaone4": Family(MIXED),
    "exaone_moe": experts(),
    "falcon": Family(),
    # Its eager attention in transformers adds alibi twice.
    "falcon alibi": Family({"alibi": True}, attention="sdpa"),
    "falcon_h1": Family({**MAMBA, "mamba_d_ssm": 64}, ["q_proj", "v_proj", "in_proj"]),
    "falcon_mamba": Family({}, ["in_proj", "x_proj"]),
    "flex_olmo": experts(),
    "flint": Family(),
    "gemma": Family(),
    "gemma2": Family(),
    "gemma3": Family(
        {
            "text_config": {
                key: value
                for key, value in SMALL.items()
                if key
                in (
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "head_dim",
                    "max_position_embeddings",
                    "sliding_window",
                )
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        }
    ),
    "gemma3_text": Family(MIXED),
    "gemma3_text use_bidirectional_attention": Family({"use_bidirectional_attention": True}),
    "gemma3n_text": Family(GEMMA_3N, scale=1.0, rate=0.05),
    # Their eager attention rounds to float32, and with heads of 512 features a small difference grows.
    "gemma4_text": Family(
        {"vocab_size_per_layer_input": 260, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
        attention="sdpa",
        rate=0.02,
    ),
    "gemma4_unified_text": Family(attention="sdpa", rate=0.02),
    "glm": Family(),
    "glm4": Family(),
    "glm4_moe": experts(),
    "glm4_moe_lite": experts(*OF_LATENT, **LATENT),
    "glm_moe_dsa": experts(*OF_LATENT, **LATENT),
    "gpt2": Family(),
    "gpt2 scale_attn_by_inverse_layer_idx": Family(
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}, dtype="float32"
    ),
    "gpt_bigcode": Family(),
    "gpt_neo": Family({"attention_types": [[["global", "local"], 1]], "window_size": 8}),
    "gpt_neox": Family(),
    "gpt_neox_japanese": Family({}, ["query_key_value"]),
    "gpt_oss": experts(),
    "gptj": Family({"rotary_dim": 4}),
    "granite": Family({"logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "granite_swa": Family(),
    "granitemoe": experts(),
    "granitemoe_swa": experts(),
    "granitemoehybrid": Family(
        {**MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0}, ["q_proj", "v_proj", "in_proj"]
    ),
    "granitemoeshared": experts(),
    "helium": Family(),
    "hrm_text": Family(),
    "hunyuan_v1_dense": Family(),
    "hunyuan_v1_moe": experts(),
    "hy_v3": experts(),
    "hy_v4": experts(*OF_LATENT, **LATENT),
    "hyperclovax": Family(),
    "inkling2_text": experts(),
    "inkling_text": experts(),
    "jais2": Family(),
    "jamba": experts("q_proj", "v_proj", "in_proj", attn_layer_offset=1, attn_layer_period=2),
    "jetmoe": experts("kv_proj"),
    "kimi_linear": experts(
        "q_proj", "kv_b_proj", **LATENT, linear_head_dim=8, layer_types=["linear_attention", "full_attention"]
    ),
    "kolibri1": experts(),
    "laguna": experts(),
    "lfm2": Family({"layer_types": ["conv", "full_attention"]}, ["q_proj", "v_proj", "in_proj"]),
    "lfm2_moe": experts("q_proj", "v_proj", "in_proj", layer_types=["conv", "full_attention"], num_dense_layers=1),
    "lfm3": experts("q_proj", "v_proj", "in_proj", layer_types=["conv", "full_attention"]),
    "llama": Family(),
    "llama4_text": experts(
        intermediate_size_mlp=48, attention_chunk_size=8, layer_types=["chunked_attention", "full_attention"]
    ),
    "longcat_flash": experts(
        *OF_LATENT, **LATENT, ffn_hidden_size=48, expert_ffn_hidden_size=16, zero_expert_num=2, moe_topk=2
    ),
    "mamba": Family({}, ["in_proj", "x_proj"]),
    "mamba2": Family({"num_heads": 8, "head_dim": 8, "chunk_size": 8, "n_groups": 1}, ["in_proj"]),
    "marian": Family(),
    "mbart": Family(),
    "megatron-bert": decoder(),
    "mellum": experts(),
    "mimo_v2_flash": experts(),
    "minicpm3": Family(LATENT, OF_LATENT, rate=0.05),
    "minimax": experts("q_proj", "v_proj", "qkv_proj"),
    "minimax_m2": experts(),
    "minimax_m3_vl_text": experts(),
    "ministral": Family(),
    "ministral3": Family(),
    "mistral": Family(),
    "mixtral": experts(),
    "mixtral output_router_logits": experts(output_router_logits=True),
    "mixtral router_jitter_noise": experts(random=True, router_jitter_noise=0.1),
    "modernbert-decoder": Family(),
    "moshi": Family({}, ["linear"]),
    "mpt": Family(),
    "mvp": Family(),
    "nanochat": Family(),
    "nemotron": Family(),
    "nemotron_h": experts(
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        moe_shared_expert_intermediate_size=16,
        chunk_size=8,
        n_groups=1,
    ),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family(MIXED),
    "olmo_hybrid": Family(),
    "olmoe": Family(),
    "openai-gpt": Family({}, ["c_attn"]),
    "opt": Family(),
    "opt layerdrop": Family({"layerdrop": 0.1}),
    "opt word_embed_proj_dim": Family({"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "pegasus": Family(),
    "persimmon": Family({}, ["query_key_value"]),
    "phi": Family(),
    "phi3": Family({}, ["qkv_proj"]),
    "phimoe": experts(random=True),
    "plbart": Family(),
    "prophetnet": Family({}, ["query_proj", "value_proj"]),
    "qwen2": Family(),
    "qwen2 use_sliding_window": Family({"use_sliding_window": True, "max_window_layers": 1}),
    "qwen2_moe": experts(),
    "qwen3": Family(),
    "qwen3_5_moe_text": experts("q_proj", "v_proj", "in_proj_qkv", **DELTA),
    "qwen3_5_text": Family(DELTA, ["q_proj", "v_proj", "in_proj_qkv"]),
    "qwen3_moe": experts(),
    "qwen3_next": experts("q_proj", "v_proj", "in_proj_qkvz", rate=0.3, **DELTA),
    "recurrent_gemma": Family(
        {"block_types": ["recurrent", "attention"], "attention_window_size": 8}, ["q_proj", "v_proj", "linear_x"]
    ),
    "reformer": Family(
        {
            "is_decoder": True,
            "attn_layers": ["local", "local"],
            "attention_head_size": 8,
            "axial_pos_embds": False,
            "feed_forward_size": 48,
            "local_attn_chunk_length": 8,
        },
        ["query", "value"],
    ),
    "rembert": decoder(input_embedding_size=32, output_embedding_size=32),
    "roberta": decoder(),
    "roberta-prelayernorm": decoder(),
    "roc_bert": decoder(pronunciation_embed_dim=8, pronunciation_vocab_size=10, shape_embed_dim=8, shape_vocab_size=10),
    "roformer": decoder(),
    "rwkv": Family({"rescale_every": 0}),
    "rwkv rescale_every": Family(),
    "seed_oss": Family(),
    "smollm3": Family(),
    "solar_open": experts(),
    "stablelm": Family(),
    "starcoder2": Family(),
    "trocr": Family(),
    "vaultgemma": Family(MIXED),
    "whisper": Family(),
    "xglm": Family(dtype="float32"),
    "xlm": Family({"emb_dim": 32, "causal": True}, ["q_lin", "v_lin"]),
    "xlm-roberta": decoder(),
    "xlm-roberta-xl": decoder(),
    "xlnet": Family({"d_inner": 48}, ["layer_1"], dtype="float32"),
    "xlstm": Family({}, ["q", "v"]),
    "xmod": decoder(default_language="en_XX"),
    "youtu": Family(LATENT, OF_LATENT, rate=0.05),
    "zamba": Family(
        {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
        ["q_proj", "v_proj", "in_proj"],
    ),
    "zamba2": Family(
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_d_state": 8,
        },
        ["q_proj", "v_proj", "in_proj"],
    ),
    "zaya": experts("q_proj", "v_proj_current", num_experts_per_tok=1),
}


NOT_TRIED: dict[str, str] = {
    **dict.fromkeys(["internlm3", "iquestcoder"], "the class of `llama`"),
    "gpt-sw3": "the class of `gpt2`",
    **dict.fromkeys(
        ["emu3", "fuyu", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2", "llama4", "mllama", "dots3_note",
         "moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe",
         "qwen4_exp"],
        "reads or writes more than text; of some, the text part is a family of its own",
    ),
    **dict.fromkeys(["gemma4_assistant", "gemma4_unified_assistant"], "drafts for another model, and is none alone"),
    "blt": "its patches come from a second model",
    "qwen4_exp_text": "transformers can't build it from sizes alone",
}  # fmt: skip
"""Families of transformers that are not tried, with the reason."""


def type_of(name: str) -> str:
    """Return transformers' name of a family's type."""
    return name.split()[0]


def build_tiny_config(name: str) -> PretrainedConfig:
    """Return a family's tiny configuration, without any dropout."""
    kind = type(AutoConfig.for_model(type_of(name)))
    known = {field.name: field.default for field in dataclasses.fields(kind)}
    values = {key: value for key, value in SMALL.items() if key in known}
    values |= {key: 0.0 for key, default in known.items() if "drop" in key and isinstance(default, float)}
    return kind(**{**values, **FAMILIES[name].changes})


def save_tiny_model(name: str, folder: Path) -> PreTrainedModel:
    """Write a family's tiny model, with random weights that are the same each time, and a tokenizer of bytes."""
    family = FAMILIES[name]
    config = build_tiny_config(name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, family.dtype))
        for value in model.parameters():
            if value.dim() > 1:
                value.mul_(family.scale)
            else:  # biases are 0 and factors 1, which would hide whether they are used
                value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model
