"""Passkey recall: a number hidden at ten depths of a long text, asked for at its end, with the full
and with compressed caches.
"""

import dataclasses

import numpy as np

import diffkv_jax as dkv
from benchmarks.common.smollm2 import smollm2_gguf
from diffkv_jax.evaluation.needle import PASSKEY, passkey_prompts
from diffkv_jax.models import load_pretrained
from diffkv_jax.testing.texts import load_text

EXACT = dkv.Exact()  # keys and values as the papers have them
POLICIES = {
    "full": dkv.CompressionPolicy.none(),
    "alpha (1, 0)": dkv.diffkv(1.0, 0.0, transform=EXACT),
    "alpha (1, 0.02)": dkv.diffkv(1.0, 0.02, transform=EXACT),
}


def prompts(tokenizer, context: int, depths: int, text: str = "king_james") -> np.ndarray:
    """int32 [depths, context]: a text with the needle at evenly spaced depths, closed by the
    question.
    """
    return passkey_prompts(tokenizer, load_text(text), context, depths)


def found(
    model, params, tokenizer, tokens: np.ndarray, policy: dkv.CompressionPolicy, chunk: int, **more
) -> list[bool]:
    """Whether the greedy answer to each prompt holds the passkey; prints the answers. `more` goes
    to `generate`.
    """
    out = dkv.generate(
        model,
        params,
        tokens,
        policy=policy,
        max_new_tokens=8,
        cache_dtype="bfloat16",
        prefill_chunk=chunk,
        **more,
    )
    answers = [tokenizer.decode(row) for row in out.tokens]
    right = [str(PASSKEY) in answer for answer in answers]
    print(
        f"{policy.name:16s} {sum(right):2d} of {len(right)}  "
        f"{''.join('x' if f else '.' for f in right)}  {answers}",
        flush=True,
    )
    return right


def recall(
    context: int = 4096, depths: int = 10, policies=None, chunk: int = 1024
) -> dict[str, list[bool]]:
    """For each policy, whether the greedy answer holds the passkey, by depth."""
    model, params, tokenizer = load_pretrained(smollm2_gguf(), "float32")
    assert tokenizer is not None  # a GGUF file carries one
    tokens = prompts(tokenizer, context, depths)
    named = {
        name: dataclasses.replace(policy, name=name)
        for name, policy in (policies or POLICIES).items()
    }
    return {
        name: found(model, params, tokenizer, tokens, policy, chunk)
        for name, policy in named.items()
    }


def main(context: int = 4096, depths: int = 10, chunk: int = 1024) -> None:
    """Print how often each cache finds a passkey, and at which depths (x = answered, shallow to
    deep).
    """
    recall(context, depths, chunk=chunk)
