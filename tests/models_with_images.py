"""Small random models that see images: a decoder of some family behind a vision part."""

import copy

import torch
import transformers

from .conftest import SMALL

EYE = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
QWEN_EYE = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "embed_dim": 32,
    "out_hidden_size": SMALL["hidden_size"], "patch_size": 14, "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "mlp_ratio": 1,
}  # fmt: skip
ON_AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWS = {
    "num_hidden_layers": 4, "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
IMAGE, VIDEO, START, END = 90, 91, 92, 93
QWEN = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START,
    "vision_end_token_id": END,
}  # fmt: skip
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}


def _qwen(hidden: str, **text) -> dict:
    eye = {**QWEN_EYE, "hidden_size": SMALL["hidden_size"]} if hidden == "own" else QWEN_EYE
    own = {**SMALL, **TOKENS, **text, "rope_parameters": ON_AXES}
    return {"text_config": own, "vision_config": eye, **QWEN}


CONFIGS = {
    "gemma3": {
        "text_config": {**SMALL, **WINDOWS, "query_pre_attn_scalar": 16},
        "vision_config": EYE, "mm_tokens_per_image": 4, "image_token_index": IMAGE,
    },
    "gemma4": {
        "text_config": {
            **SMALL, **WINDOWS, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
            "global_head_dim": 32, "use_bidirectional_attention": "vision",
        },
        "vision_config": EYE, "audio_config": None, "image_token_id": IMAGE,
    },
    "llava": {
        "text_config": {**SMALL, "model_type": "llama"}, "image_token_index": IMAGE,
        "vision_config": {**EYE, "model_type": "clip_vision_model"}, "image_seq_length": 4,
    },
    "mistral3": {
        "text_config": {**SMALL, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**EYE, "head_dim": 16},
    },
    "mistral4": {
        "model_type": "mistral3",
        "text_config": {
            **SMALL, "head_dim": 32, "model_type": "mistral4", "num_key_value_heads": 4,
            "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16, "v_head_dim": 24,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
            "moe_intermediate_size": 32,
        },
        "vision_config": {**EYE, "head_dim": 16},
    },
    "qwen2_vl": _qwen("own"),
    "qwen2_5_vl": _qwen("other"),
    "qwen3_vl": _qwen("other"),
    "qwen3_vl_moe": _qwen("other", **EXPERTS),
}  # fmt: skip


def with_images(name: str):
    """A random model of a family of `CONFIGS`."""
    own = copy.deepcopy(CONFIGS[name])
    config = transformers.AutoConfig.for_model(own.pop("model_type", name), **own)
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(config).eval()
