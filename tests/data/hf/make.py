"""Makes tiny random checkpoints with torch and transformers, and what transformers computes with them, in float32:

    python make.py FOLDER [NAME ...]

Each folder: config.json, model.safetensors, and oracle.npz with ``tokens`` [2, 48] int32, ``logits`` [2, 48, 96] float32, and
``greedy`` [2, 24] int32, the first 8 tokens of each row continued greedily. All weights, norms and biases are random, so that a
swapped or forgotten tensor shows. (llama, qwen2 and qwen3 beside this file were made alike, elsewhere.) torch 2.14.1, transformers 5.24.0.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, MixtralConfig

SHARED = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
LATENT = SHARED | dict(
    num_key_value_heads=4,
    num_hidden_layers=3,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    kv_lora_rank=12,
    q_lora_rank=20,
    qk_rope_head_dim=8,
    qk_nope_head_dim=10,
    v_head_dim=6,
    first_k_dense_replace=1,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=1e4,
    factor=4.0,
    beta_fast=4,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=0.7,
    original_max_position_embeddings=32,
)
MADE = {
    "llama3": LlamaConfig(
        **SHARED, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "mixtral": MixtralConfig(**SHARED, num_local_experts=4, head_dim=6),
    "deepseek_v3": DeepseekV3Config(**LATENT, rope_parameters=YARN),
}


def make(folder, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, x in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" in name:
                continue
            noise = torch.randn(x.shape, generator=draw)
            x.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise if x.ndim == 1 else noise * x.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tokens = torch.randint(0, config.vocab_size, (2, 48), generator=draw)
    greedy = tokens[:, :8]
    with torch.no_grad():
        logits = model(tokens).logits
        for _ in range(16):
            greedy = torch.cat([greedy, model(greedy).logits[:, -1].argmax(-1, keepdim=True)], 1)
    arrays = dict(tokens=tokens.int().numpy(), logits=logits.float().numpy(), greedy=greedy.int().numpy())
    np.savez_compressed(Path(folder) / "oracle.npz", **arrays)
    (Path(folder) / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    for name in sys.argv[2:] or MADE:
        make(Path(sys.argv[1]) / name, MADE[name])
