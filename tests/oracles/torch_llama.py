"""The layers of a Llama on torch, around an attention of one's own."""

import torch


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x, positions, theta):
    """RoPE on [heads, tokens, head_dim], halves rotated against each other."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = positions.float()[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def project(config, layer, x, positions):
    """Rotated queries [heads, tokens, head_dim], rotated keys and values [kv_heads, tokens,
    head_dim].
    """
    normed = rms_norm(x, layer.input_layernorm.weight, config.rms_norm_eps)
    attention, theta = layer.self_attn, config.rope_parameters["rope_theta"]
    weights = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    queries, keys, values = (
        (normed @ weight.T).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
        for weight in weights
    )
    return rotate(queries, positions, theta), rotate(keys, positions, theta), values


def after_attention(config, layer, x, attended):
    """Output projection and SwiGLU, both with their residual; attended [heads, tokens,
    head_dim].
    """
    x = x + attended.transpose(0, 1).flatten(1) @ layer.self_attn.o_proj.weight.T
    normed = rms_norm(x, layer.post_attention_layernorm.weight, config.rms_norm_eps)
    mlp = layer.mlp
    return (
        x
        + (
            torch.nn.functional.silu(normed @ mlp.gate_proj.weight.T)
            * (normed @ mlp.up_proj.weight.T)
        )
        @ mlp.down_proj.weight.T
    )


def head(model, x):
    return (
        rms_norm(x, model.model.norm.weight, model.config.rms_norm_eps)
        @ model.model.embed_tokens.weight.T
    )
