"""What the compressed cache costs on a real model, at allocated bytes, and that it costs nothing
beyond its codec and its drops.
"""

from functools import cache

import numpy as np
import pytest

import diffkv_jax as dkv
from benchmarks.methods import quality
from diffkv_jax.testing.texts import text_tokens
from helpers_model import smollm2_gguf_path

pytestmark = [pytest.mark.slow, pytest.mark.optimized]
CONTEXT, STEPS = 4096, 256
SIMULATED = 2048, 128  # context and steps: in torch it takes minutes
KEEP_ALL, DROPPING = "alpha (1, 0)", "alpha (1, 0.02)"
TEXTS = ("hamlet", "king_james", "stdlib_source")


@cache
def measured(
    text: str, context: int = CONTEXT, steps: int = STEPS, forgets: bool = True
) -> dict[str, quality.Line]:
    """Every policy on one text, prompt in one chunk: attended exactly, compressed once, as the
    simulation does, which does not forget.
    """
    smollm2_gguf_path()  # skips, with the reason, where the model's package is missing
    alphas = {KEEP_ALL: (1.0, 0.0), DROPPING: (1.0, 0.02)}
    given = {"forgets": forgets, "transform": dkv.Exact()}
    policies = {name: dkv.diffkv(*alpha, **given) for name, alpha in alphas.items()}
    lines = quality.measure(context, steps, (text,), policies, chunk=context)
    print("\n" + quality.markdown(lines))
    return {line.policy: line for line in lines}


@pytest.mark.long
@pytest.mark.parametrize("text", TEXTS)
def test_keeping_everything_is_nearly_free(text):
    line = measured(text)[KEEP_ALL]
    assert line.of_bf16 <= 0.32
    assert 1e-4 < line.mean_kl <= 0.03
    assert line.dropped == 0
    assert 0 < line.high < line.low


@pytest.mark.long
@pytest.mark.parametrize("text", TEXTS)
def test_dropping_saves_more(text):
    line = measured(text)[DROPPING]
    assert line.of_bf16 <= 0.23
    assert line.dropped > 0.1
    assert line.mean_kl > measured(text)[KEEP_ALL].mean_kl


@pytest.mark.parametrize(("policy", "alpha_low"), [(KEEP_ALL, 0.0), (DROPPING, 0.02)])
def test_nothing_is_lost_beyond_codec_and_drops(policy, alpha_low):
    """The independent simulation (torch, dense tensors, fake quantisation) makes the same decisions
    and comes to the same KL.
    """
    simulation = pytest.importorskip(
        "oracles.fake_quant_simulation", reason="needs torch", exc_type=ImportError
    )
    model, tokens, prefilled, full = simulated_prompt("hamlet")
    context = SIMULATED[0]
    run = simulation.decode(model, prefilled, tokens[context:-1], simulation.Policy(1.0, alpha_low))
    figures = simulation.metrics(full.logits, run.logits, tokens[context + 1 :])
    line = measured("hamlet", *SIMULATED, forgets=False)[policy]
    print(
        f"\n{policy}: KL {line.mean_kl:.4f}, simulated {figures['mean_kl']:.4f}; fractions "
        f"{run.fractions.mean(axis=(0, 1))}"
    )
    assert line.mean_kl == pytest.approx(figures["mean_kl"], rel=0.25)
    assert line.perplexity_full == pytest.approx(figures["perplexity_full"], rel=0.01)
    recent, high, low, dropped = run.fractions.mean(axis=(0, 1))
    assert np.allclose(
        [line.recent, line.high, line.low, line.dropped], [recent, high, low, dropped], atol=0.01
    )


@cache
def simulated_prompt(text: str):
    """(torch model, token list, simulated prefill, simulated full-cache run) of one text."""
    import torch

    from oracles import fake_quant_simulation as simulation

    model, tokenizer = simulation.load(smollm2_gguf_path())
    context, steps = SIMULATED
    tokens = text_tokens(tokenizer, [text], context + steps + 1)[0]
    prefilled = simulation.prefill(
        model, tokens[:context], context + steps + 1, cache_dtype=torch.bfloat16
    )
    return model, tokens, prefilled, simulation.decode(model, prefilled, tokens[context:-1])
