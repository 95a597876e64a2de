"""Which tokens leave while text is written: the published rules in NumPy, on a first layer, whose
keys depend on the tokens alone.
"""

from functools import lru_cache

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.testing.readback import held_tokens
from diffkv_jax.testing.tiny import prompt, tiny_model

HEAD_DIM, GROUP, KV_HEADS = 32, 2, 2
WINDOW, FLUSH, KEEP, PROMPT, STEPS = 16, 8, 40, 100, 40
OPTIONS = {"sinks": 0, "window": WINDOW, "flush": FLUSH}
POLICIES = {
    "h2o": dkv.h2o(KEEP, **OPTIONS),
    "tova": dkv.tova(KEEP, **OPTIONS),
    "key_difference": dkv.key_difference(KEEP, **OPTIONS),
}


@lru_cache
def written(name: str):
    """(tokens that the cache has seen, positions that each KV head of the first layer holds)."""
    model, params = tiny_model(q_heads=4, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    out = dkv.generate(
        model, params, prompt(PROMPT)[None], policy=POLICIES[name], max_new_tokens=STEPS + 1
    )
    seen = np.concatenate([prompt(PROMPT), out.tokens[0, :STEPS]])
    return seen, [set(held_tokens(out.cache, 0, 0, head)) for head in range(KV_HEADS)]


def first_layer(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Queries [heads, n, d] and keys [KV heads, n, d] of the first layer, with their rotary
    embedding.
    """
    _, params = tiny_model(q_heads=4, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    h = np.asarray(params["embed_tokens"]["embedding"], np.float64)[tokens]
    h = (
        h
        / np.sqrt(np.square(h).mean(axis=-1, keepdims=True) + 1e-6)
        * np.asarray(params["layers"]["input_layernorm"]["weight"])[0]
    )
    turn = np.exp(
        1j * np.outer(np.arange(len(h)), 10000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))
    )

    def rotated(name: str) -> np.ndarray:
        x = h @ np.asarray(params["layers"]["self_attn"][name]["kernel"], np.float64)[0]
        x = x.reshape(len(h), -1, HEAD_DIM).swapaxes(0, 1)
        pairs = (x[..., : HEAD_DIM // 2] + 1j * x[..., HEAD_DIM // 2 :]) * turn
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    return rotated("q_proj"), rotated("k_proj")


def simulated(name: str, tokens: np.ndarray, head: int) -> set[int]:
    """The positions that a KV head holds at the end: at each event the window stays, and of the
    others those with the largest scores.
    """
    q, k = first_layer(tokens)
    q, k, scores = q[head * GROUP : (head + 1) * GROUP], k[head], np.zeros(len(tokens))

    def attention(query: int, held: np.ndarray) -> np.ndarray:
        logits = q[:, query] @ k[held].T / np.sqrt(HEAD_DIM)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)

    def unlikeness(of: np.ndarray, among: np.ndarray) -> np.ndarray:
        unit = k / np.linalg.norm(k, axis=1, keepdims=True)
        mean = unit[among].mean(axis=0)
        return -unit[of] @ mean / np.linalg.norm(mean)

    held, recent = np.arange(PROMPT), PROMPT
    for query in range(PROMPT if name == "h2o" else 0):
        scores[: query + 1] += attention(query, held[: query + 1])
    for seen in range(PROMPT, len(tokens) + 1):
        if seen > PROMPT:
            held, recent = np.append(held, seen - 1), recent + 1
            scores[held] += attention(seen - 1, held) * (name == "h2o")
        if seen > PROMPT and recent < WINDOW + FLUSH:
            continue
        leaving = held[len(held) - recent : len(held) - WINDOW]
        if name == "tova":
            scores[held] = attention(seen - 1, held)
        if name == "key_difference":
            scores[leaving] = unlikeness(leaving, held[len(held) - recent :])
        old = held[: len(held) - WINDOW]
        best = old[np.argsort(-scores[old], kind="stable")[: KEEP - WINDOW]]
        held, recent = np.concatenate([np.sort(best), held[len(held) - WINDOW :]]), WINDOW
    return set(held.tolist())


@pytest.mark.daily(3)
@pytest.mark.parametrize("name", POLICIES)
def test_the_tokens_that_the_rule_keeps(name):
    tokens, found = written(name)
    assert found == [simulated(name, tokens, head) for head in range(KV_HEADS)]
    assert all(
        len(head) == KEEP
        and sorted(head)[-WINDOW:] == [*range(PROMPT + STEPS - WINDOW, PROMPT + STEPS)]
        for head in found
    )
    for other in set(POLICIES) - {name}:
        # the comparison can fail
        assert found != [simulated(other, tokens, head) for head in range(KV_HEADS)]
