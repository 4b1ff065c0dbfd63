"""Small GGUF files for tests: a random llama of two layers with a tokenizer of bytes."""

from pathlib import Path

import numpy as np

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS, CONTEXT = 64, 4, 2, 16, 96, 2, 512


def byte_tokens() -> list[str]:
    """The 256 letters by which GPT-2's tokenizers write bytes, two special tokens, a pair."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, spare = {}, 0
    for byte in range(256):
        letters[byte] = chr(byte) if byte in plain else chr(256 + spare)
        spare += byte not in plain
    return ["<s>", "</s>", *letters.values(), "th", "ht"]


def write_gguf(
    path: Path, *, architecture: str = "llama", tokenizer: bool = True, chat: str | None = None,
    without: str | None = None, rope_freqs=None, **numbers,
) -> Path:  # fmt: skip
    """A file of random weights. `without`: a tensor left out; `numbers`: further float values."""
    import gguf

    tokens, random = byte_tokens(), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    for name, value in numbers.items():
        key = f"{architecture}.{name.replace('__', '.')}"
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3] + [1] * 258)
        writer.add_token_merges(["t h", "h t"])  # transformers 5.17 cannot read a single one
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        if chat:
            writer.add_chat_template(chat)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for n in range(LAYERS):
        shapes |= {
            f"blk.{n}.attn_norm": (HIDDEN,),
            f"blk.{n}.attn_q": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{n}.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{n}.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{n}.attn_output": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{n}.ffn_norm": (HIDDEN,),
            f"blk.{n}.ffn_gate": (INNER, HIDDEN),
            f"blk.{n}.ffn_up": (INNER, HIDDEN),
            f"blk.{n}.ffn_down": (HIDDEN, INNER),
        }
    for name, shape in shapes.items():
        weights = random.standard_normal(shape).astype(np.float32) * 0.1
        weights = weights + 1 if name.endswith("norm") else weights
        if name != without:
            writer.add_tensor(f"{name}.weight", weights.astype(np.float32))
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_freqs, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
