"""Engines of tiny models, and what a request is compared with: `generate()` alone."""

from typing import Any

import numpy as np

import diffkv_jax as dkv
from diffkv_jax.serving.engine import Engine
from diffkv_jax.serving.request import Request
from diffkv_jax.testing.tiny import tiny_model

WINDOW = {"window": 16, "flush": 8}
DIFFKV = dkv.diffkv(1.0, 0.0, queries=16, **WINDOW)
SIZES = {"max_requests": 4, "max_len": 512, "prefill_chunk": 32}


def tiny():
    """(model, params): two KV heads in each of two layers."""
    return tiny_model(layers=2, kv_heads=2, q_heads=4)


def engine(policy: Any = DIFFKV, loaded: Any = None, **options: Any) -> Engine:
    """An engine of small sizes."""
    return Engine(*(loaded or tiny()), policy=policy, **{**SIZES, **options})


def prompts(count: int, seed: int = 0, longest: int = 150) -> list[list[int]]:
    """Of random ids and lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 97, rng.integers(3, longest)).tolist() for _ in range(count)]


def alone(request: Request, policy: Any, loaded: Any = None, **options: Any) -> tuple[list, str]:
    """Tokens and finish reason of `generate()` for a request."""
    out = dkv.generate(
        *(loaded or tiny()),
        [request.prompt.tolist()],
        policy=policy,
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        key=request.seed,
        stop_token_ids=[i for i in request.stop_token_ids.tolist() if i >= 0],
        prefill_chunk=SIZES["prefill_chunk"],
        max_len=SIZES["max_len"],
        **options,
    )
    return out.tokens[0, : out.lengths[0]].tolist(), out.finish_reason[0]


def finish(engine: Engine) -> list:
    """All events until nothing is left."""
    return list(engine.run())


def check_pool_whole(engine: Engine) -> None:
    """Every page is free, and there once."""
    slots = engine._scheduler.slots
    ring = slots.pool.ring
    assert slots.free == slots.fixed.spec.num_pages == int(ring.count)
    assert sorted(np.asarray(ring.ids).tolist()) == list(range(len(ring.ids)))
