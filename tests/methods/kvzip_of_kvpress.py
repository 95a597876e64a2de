"""KVzip as kvpress does it on the tiny Llama in torch, and the scores of ours."""

import dataclasses
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_llama import LAYERS, LENGTH, PROMPT, models

import diffkv_jax as dkv
from diffkv_jax.make_cache import make_cache
from diffkv_jax.methods.replay import FIRST, LATER
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.read_prompts import prefill
from diffkv_jax.testing.readback import held_tokens

torch = pytest.importorskip("torch")
choice = pytest.importorskip("oracles.kvpress_choice")
# in the ids of a tokenizer that the tiny model never had
WORDS = {FIRST: (11, 7, 90), LATER: (3, 55, 6, 41), "\n": (8,)}
REPLAY = dkv.Replay(WORDS[FIRST], WORDS[LATER], WORDS["\n"])
HEADS = [(layer, head) for layer in range(LAYERS) for head in range(2)]


class Tokenizer:
    """As much of one as KVzip asks for."""

    chat_template = None

    def encode(self, text, return_tensors=None, add_special_tokens=True):
        ids = WORDS.get(text, ())
        return torch.tensor([ids], dtype=torch.long) if return_tensors else list(ids)


@lru_cache
def of_kvpress(
    chunk: int, ratio: float = 0.5, layerwise: bool = False
) -> tuple[list[list[set[int]]], np.ndarray]:
    """What KVzipPress keeps of the prompt, the last token protected as in our window, and its
    scores [LAYERS, 2, N].
    """
    theirs, _, _ = models(2)
    theirs.set_attn_implementation("sdpa")
    choice.presses()
    module = __import__("kvpress.presses.kvzip_press", fromlist=["AutoTokenizer"])
    press, scores = (
        module.KVzipPress(compression_ratio=ratio, chunk_size=chunk, layerwise=layerwise),
        [],
    )
    compress = press.compress_post

    def protecting(model):
        scores.append(press.score_val[:, 0].numpy().copy())
        press.score_val[..., -1] = 1e9
        compress(model)

    press.compress_post = protecting
    tokenizer, module.AutoTokenizer = (
        module.AutoTokenizer,
        SimpleNamespace(from_pretrained=lambda _: Tokenizer()),
    )
    try:
        found = choice.kept_by_mask(press, theirs, PROMPT)
    finally:
        module.AutoTokenizer = tokenizer
    return found, scores[0]


def kvzip(
    keep: float = 0.5, chunk: int = 2048, window: int = 1, **changes
) -> dkv.CompressionPolicy:
    """`changes` of the budget and the tiers, others as `dkv.kvzip` takes them."""
    budget = {name: changes.pop(name) for name in ("share_layers", "keep_high") if name in changes}
    tiers = changes.pop("tiers", ("full",))
    replay = dataclasses.replace(REPLAY, chunk=chunk)
    policy = dkv.kvzip(keep, replay=replay, window=window, **changes)
    return dataclasses.replace(policy, tiers=tiers, keep=dataclasses.replace(policy.keep, **budget))


def scores(policy: dkv.CompressionPolicy, chunk: int = 512, kernels: str = "xla") -> np.ndarray:
    """The scores [LAYERS, 2, N] in our cache that keeps everything; nan for the sinks and what is
    in the window.
    """
    _, model, params = models(2)
    cache = make_cache(
        model,
        dataclasses.replace(policy, keep=dkv.Budget(keep=1.0)),
        [LENGTH],
        kernels=Kernels(kernels),
    )
    _, cache = prefill(model, params, cache, PROMPT[None], np.array([LENGTH]), chunk)
    found = np.full((LAYERS, 2, LENGTH), np.nan)
    for layer, head in HEADS:
        held = held_tokens(cache, layer, 0, head)
        assert set(held) == set(range(LENGTH))
        for at, (tier, _, _, score) in held.items():
            if tier != "recent" and at >= policy.protect.sinks:
                found[layer, head, at] = score
            assert at >= policy.protect.sinks or score == np.float32(1e30)
    return found
