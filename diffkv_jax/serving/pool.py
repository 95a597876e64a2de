"""The slots and the pool that an engine begins with."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from diffkv_jax.make_cache import CacheOptions, cache_for, check_options
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.stage import with_leaves
from diffkv_jax.serving.rows import apart
from diffkv_jax.serving.slots import Slots

READINGS = 4  # prompts that are read at once, each in a row of its own


def empty_slots(
    model: CausalLM,
    params: Any,
    most: int,
    max_len: int,
    prefill_chunk: int,
    options: CacheOptions,
) -> Slots:
    """For at most so many requests of up to `max_len` tokens. The pool is what `memory_budget` has
    left beside the rows of all of them; without one, enough for all in the highest tier.

    Raises:
        TypeError, ValueError: bad input, named; a budget in which not even one request of `max_len`
            tokens can fit.
    """
    check_options(options, caller="Engine")
    totals = np.array([max_len] + [0] * (most + READINGS - 1))
    options = {**options, "max_len": max_len}
    cache = cache_for(model, params, totals, max_len, prefill_chunk, options, fits_budget=False)
    one = with_leaves(cache.policy, keep=jax.tree.map(lambda x: x[:, :1], cache.policy.keep))
    fixed, pool, _ = apart(cache)
    fixed = replace(fixed, spec=replace(fixed.spec, num_requests=1))
    return Slots(model, params, fixed, pool, one, most)
