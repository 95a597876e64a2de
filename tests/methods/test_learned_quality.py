"""Learned codecs on a real model: the order of the papers (arXiv:2405.03917, tables 1 and 5, at one
bit; arXiv:2401.18079, table 1).
"""

from functools import cache

import numpy as np
import pytest

import diffkv_jax as dkv
from benchmarks.methods import quality
from diffkv_jax.evaluation import teacher_forced
from diffkv_jax.models import load_pretrained
from helpers_model import smollm2_gguf_path

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.optimized]
CONTEXT, STEPS = 64, 448
TEXTS = ("king_james", "stdlib_source")


@cache
def smollm2():
    """Model, params, tokens to be scored [2, CONTEXT + STEPS + 1] and, of another text, tokens to
    learn from [4, 512].
    """
    model, params, tokenizer = load_pretrained(smollm2_gguf_path(), "float32")
    scored = np.concatenate(
        [quality.text_tokens(tokenizer, [text], CONTEXT + STEPS + 1) for text in TEXTS]
    )
    return (
        model,
        params,
        scored,
        quality.text_tokens(tokenizer, ["hamlet"], 4 * 512).reshape(4, 512),
    )


def coupled(channels: int, bits: int) -> dkv.CompressionPolicy:
    return dkv.coupled_quantization(channels, bits, window=16, flush=16)


@cache
def perplexity(policy: dkv.CompressionPolicy, fisher: bool = True) -> np.ndarray:
    """Of each text, float64 [2], all but the latest tokens coded."""
    model, params, scored, text = smollm2()
    learned = None
    if any(fmt.learned for fmt in policy.formats("bfloat16")):
        learned = dkv.calibrate(
            model, params, text, policy, fisher=fisher, samples=2048, iterations=20
        )
    log_probs, _ = teacher_forced(
        model, params, scored[:, :-1], CONTEXT, policy, cache_dtype="bfloat16", calibration=learned
    )
    right = np.take_along_axis(
        np.asarray(log_probs, np.float64), scored[:, CONTEXT + 1 :, None], axis=-1
    )
    found = np.exp(-right[..., 0].mean(axis=1))
    print(
        f"\n{policy.name}, fisher={fisher}: perplexity "
        f"{dict(zip(TEXTS, np.round(found, 2).tolist(), strict=True))}"
    )
    return found


def test_fisher_weights_beat_plain_codebooks_at_one_bit():
    assert (perplexity(coupled(8, 8)) < 0.95 * perplexity(coupled(8, 8), fisher=False)).all()


def test_coupled_channels_beat_independent_ones_at_equal_bits():
    assert (perplexity(coupled(8, 8)) < 0.7 * perplexity(coupled(1, 1))).all()


def test_learned_levels_beat_even_ones_at_two_bits():
    """At fewer bits: KVQuant's keys have no numbers of their own beside the codes."""
    assert (
        perplexity(dkv.kvquant(2, 0, window=16, flush=16))
        < 0.5 * perplexity(dkv.quantized("K2V2", window=16, flush=16, transform=dkv.Exact()))
    ).all()
