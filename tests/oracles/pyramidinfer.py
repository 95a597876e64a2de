"""PyramidInfer (arXiv:2405.12532) from its equations: a small Llama in NumPy whose layers drop
tokens while they read a prompt.
"""

import numpy as np

from oracles.fastgen import rotated, softmax


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """RMSNorm."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * weight


def read(
    params,
    tokens: np.ndarray,
    q_heads: int,
    kv_heads: int,
    budgets: list[int],
    *,
    window: int,
    sinks: int,
    newest: float,
    nested: bool = True,
) -> tuple[list[set[int]], np.ndarray]:
    """The positions that each layer keeps, `budgets[layer]` of them, and the logits of the last
    token.

    Keys are turned by their position in the prompt; a layer attends to what the one before it kept
    (to everything unless `nested`).
    """
    stack = {
        name: np.asarray(part["kernel"], np.float64)
        for name, part in [*params["layers"]["self_attn"].items(), *params["layers"]["mlp"].items()]
    }
    norms = {
        name: np.asarray(params["layers"][name]["weight"])
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    x = np.asarray(params["embed_tokens"]["embedding"], np.float64)[tokens]
    alive, kept = np.arange(len(tokens)), []
    for layer, budget in enumerate(budgets):
        h = normed(x, norms["input_layernorm"][layer])
        q, k, v = (h @ stack[name][layer] for name in ("q_proj", "k_proj", "v_proj"))
        q, k = (
            np.stack([rotated(part) for part in np.split(y, n, axis=1)])
            for y, n in ((q, q_heads), (k, kv_heads))
        )
        k, v = (
            np.repeat(y, q_heads // kv_heads, axis=0)
            for y in (k, np.stack(np.split(v, kv_heads, axis=1)))
        )
        key, row = np.arange(len(tokens)), np.arange(len(tokens))[:, None]
        seen = np.isin(key, alive) & (key <= row) | (key == row)
        p = softmax(np.where(seen, q @ k.swapaxes(1, 2) / np.sqrt(q.shape[2]), -np.inf))
        x = x + np.concatenate(p @ v, axis=1) @ stack["o_proj"][layer]
        h = normed(x, norms["post_attention_layernorm"][layer])
        gate = h @ stack["gate_proj"][layer]
        x = (
            x
            + (gate / (1 + np.exp(-gate)) * (h @ stack["up_proj"][layer]))
            @ stack["down_proj"][layer]
        )
        score = (np.linspace(1, newest, window)[:, None] * p.mean(axis=0)[-window:]).mean(axis=0)
        stay = {*range(sinks), *range(len(tokens) - window, len(tokens))}
        others = sorted((at for at in alive if at not in stay), key=lambda at: -score[at])
        kept.append(stay | {int(at) for at in others[: budget - len(stay)]})
        alive = np.array(sorted(kept[-1])) if nested else alive
    return kept, normed(x[-1], np.asarray(params["norm"]["weight"])) @ np.asarray(
        params["lm_head"]["kernel"]
    )
