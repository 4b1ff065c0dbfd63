"""The reference model's architecture in plain PyTorch, parameters named as in `LlamaForCausalLM`.

Training needs nothing else of transformers; the saved file loads with `AutoModelForCausalLM`.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from saap.eval.reference.weaving import ANSWER_WEIGHT


@dataclass(frozen=True)
class DecoderConfig:
    vocab_size: int = 260
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192

    def to_hf(self) -> dict:
        config = asdict(self)
        theta = config.pop("rope_theta")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **config,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "attention_bias": False,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "pad_token_id": 258,
            "dtype": "float16",
        }


def rope_tables(positions: torch.Tensor, config: DecoderConfig):
    """cos and sin, float32 `[B, 1, T, D]`, for `positions [B, T]`."""
    half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, :, None].float() * config.rope_theta ** (-half / config.head_dim)
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.config = c
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        c = self.config
        q = self.q_proj(x).view(batch, length, -1, c.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, -1, c.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, -1, c.head_dim).transpose(1, 2)
        q, k = (rotate(t.float(), cos, sin).to(v.dtype) for t in (q, k))
        group = c.num_attention_heads // c.num_key_value_heads
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Decoder(nn.Module):
    """Logits for next tokens; output and input embeddings are tied."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                scale = config.hidden_size**-0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    scale *= (2 * config.num_hidden_layers) ** -0.5
                nn.init.normal_(parameter, std=0.02 if "embed" in name else scale * 0.6)

    def forward(self, tokens, positions):
        x = self.model.embed_tokens(tokens).float()
        cos, sin = rope_tables(positions, self.config)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def loss(self, tokens, positions, weights):
        """Weighted mean cross-entropy in nats of `tokens [B, T + 1]`, and the share of answers'
        bytes (weight ANSWER_WEIGHT and more) that are the likeliest, NaN where there are none."""
        logits = self(tokens[:, :-1], positions).flatten(0, 1)
        targets, weights = tokens[:, 1:].flatten(), weights[:, 1:].flatten()
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        asked = weights >= ANSWER_WEIGHT
        right = (logits.detach().argmax(-1) == targets) & asked
        return (losses * weights).sum() / weights.sum(), right.sum() / asked.sum()

    @torch.no_grad()
    def reset_head(self, layer: int, head: int, source: int, shift: int) -> None:
        """Make `head` a copy of `source` that attends `shift` tokens further back, with new output
        weights. Raises ValueError when they do not share a KV head."""
        config, attention = self.config, self.model.layers[layer].self_attn
        group = config.num_attention_heads // config.num_key_value_heads
        if head // group != source // group:
            raise ValueError(f"heads {head} and {source} of layer {layer} share no KV head")
        rows = [slice(h * config.head_dim, (h + 1) * config.head_dim) for h in (head, source)]
        weight = attention.q_proj.weight
        cos, sin = rope_tables(torch.tensor([[-shift]], device=weight.device), config)
        weight[rows[0]] = rotate(weight[rows[1]].T, cos[0, 0], sin[0, 0]).T
        out = attention.o_proj.weight[:, rows[0]]
        out.copy_(0.5 * torch.randn_like(out) * attention.o_proj.weight[:, rows[1]].std())
