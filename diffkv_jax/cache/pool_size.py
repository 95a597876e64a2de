"""Bytes to pages: how large a pool a memory budget buys, and what cannot fit."""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import humanize
import jax
import numpy as np

from diffkv_jax.cache.cache import CacheSpec, KVCache, empty_cache
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.steps.pairs import pages_of_pair
from diffkv_jax.units import parse_bytes


def tree_bytes(tree) -> int:
    """Bytes of all arrays (or array shapes) of a pytree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def cache_bytes(spec: CacheSpec) -> int:
    """Bytes of all arrays of the cache that `spec` describes, from their shapes."""
    limits = np.zeros(
        (len(spec.paged_layers), spec.num_requests, spec.attention.num_kv_heads, 2), np.float32
    )
    shapes: KVCache = jax.eval_shape(partial(empty_cache, spec), limits)
    return tree_bytes(shapes)


def with_pool(
    spec: CacheSpec,
    policy: CompressionPolicy,
    totals: Sequence[int],
    room: Sequence[int],
    budget: int | str | None,
) -> CacheSpec:
    """`spec` with `num_pages` set from the budget; without one, enough for every token that there
    is room for in the highest tier.

    Args:
        totals: tokens that each request will come to now.
        room: tokens that each request may ever come to.

    Raises:
        ValueError: even with every token in the cheapest form the policy allows, the tokens do not
            fit; names the smallest budget with which they can, and the one that always suffices.
    """
    limits = policy.limits(len(spec.paged_layers), spec.num_requests, spec.attention.num_kv_heads)
    # a prompt is stored as it is before anything is dropped
    once_whole = spec.selection.replay is not None
    least, most = (
        most_pages(spec, totals) if once_whole else _least_pages(spec, totals, limits),
        most_pages(spec, room),
    )
    if budget is None:
        return _addressable(dataclasses.replace(spec, num_pages=most))
    amount = parse_bytes(budget)
    fixed, per_page = _fixed_and_page_bytes(spec)
    pages = (amount - fixed) // per_page
    if pages < least:
        needs, suffices = (
            humanize.naturalsize(fixed + n * per_page, binary=True, format="%.3f")
            for n in (least, most)
        )
        raise ValueError(
            f"memory_budget={budget!r} cannot hold {list(totals)} tokens with policy "
            f"{policy.name!r}: the smallest budget that can is "
            f"{fixed + least * per_page} bytes ({needs}), {fixed + most * per_page} bytes "
            f"({suffices}) always suffice; "
            "raise the budget, ask for fewer tokens or choose a smaller policy"
        )
    return _addressable(dataclasses.replace(spec, num_pages=min(pages, most)))


def kept_within(
    spec: CacheSpec, policy: CompressionPolicy, room: Sequence[int]
) -> CompressionPolicy:
    """`policy`, whose `keep` is memory for the whole cache, with the most tokens a head that fit
    it. `room` as in `with_pool`.

    A prompt for which that is too little room is compressed chunk by chunk.

    Raises:
        ValueError: not even the recent window, the sinks and a page a head fit; names the smallest
            amount.
    """

    def limits(tokens: int) -> np.ndarray:
        return dataclasses.replace(policy, keep=tokens).limits(
            len(spec.paged_layers), spec.num_requests, spec.attention.num_kv_heads
        )

    def pages(tokens: int) -> int:
        return _least_pages(spec, room, limits(tokens))

    fixed, per_page = _fixed_and_page_bytes(spec)
    least = policy.window + policy.sinks + 1
    most_of_pool = (parse_bytes(str(policy.keep), "keep") - fixed) // per_page
    if pages(least) > most_of_pool:
        needs = fixed + pages(least) * per_page
        raise ValueError(
            f"keep={policy.keep!r} is too little: the smallest cache of policy "
            f"{policy.name!r} takes {needs} bytes; raise it"
        )
    # of the layers that get fewer than the mean
    smallest_share = limits(least)[..., 1].min() / least
    everything = max(least, math.ceil(max(room) / smallest_share))
    return dataclasses.replace(
        policy,
        keep=bisect.bisect_right(range(everything + 1), most_of_pool, lo=least, key=pages) - 1,
    )


def _fixed_and_page_bytes(spec: CacheSpec) -> tuple[int, int]:
    """Bytes of a cache without pages, and those that each page adds."""
    fixed = cache_bytes(dataclasses.replace(spec, num_pages=0))
    return fixed, cache_bytes(dataclasses.replace(spec, num_pages=1)) - fixed


def _addressable(spec: CacheSpec) -> CacheSpec:
    """`spec`; Pallas' Triton backend takes signed 32-bit offsets up to 4 GiB, so that those beyond
    2 GiB wrap (JAX 0.10 to 0.12).

    Raises:
        ValueError: names the pool and which budgets do.
    """
    page = spec.layout.rows * spec.layout.tokens
    if spec.kernels.implementation == "triton" and 2**31 < spec.num_pages * page <= 2**32:
        small, large = (
            humanize.naturalsize(n // page * spec.layout.page_bytes, binary=True)
            for n in (2**31, 2**32 + page)
        )
        raise ValueError(
            f"a pool of {spec.num_pages} pages has a payload of {spec.num_pages * page} bytes, "
            f"and Triton kernels cannot address "
            f"payloads between 2 and 4 GiB: take a memory_budget for at most {small} of pages or "
            f"more than {large}, "
            "or implementation='xla'"
        )
    return spec


def check_pool(cache: KVCache, totals: Sequence[int]) -> None:
    """Refuse tokens that cannot fit the pool of an existing cache, even in the cheapest form.
    `totals` is that of `with_pool`.

    Raises:
        ValueError: names the pool and the pages that the tokens need at least.
    """
    none = (0, cache.spec.num_requests, cache.spec.attention.num_kv_heads, 2)  # no layer has pages
    least = _least_pages(
        cache.spec, totals, np.zeros(none) if cache.limits is None else np.asarray(cache.limits)
    )
    if least > cache.spec.num_pages:
        raise ValueError(
            f"the pool of {cache.spec.num_pages} pages cannot hold {list(totals)} tokens, which "
            f"need at least {least}; "
            "make the first call with a larger memory_budget or max_len, or ask for fewer tokens"
        )


def _least_pages(spec: CacheSpec, totals: Sequence[int], limits: np.ndarray) -> int:
    """Pages without which the tokens cannot fit: all in the cheapest tier; one page a head where
    thresholds may drop them; what budgets keep; all in merged layers. `limits` as in `KVCache`.
    """
    layout, limits, seen = (
        spec.unmerged.layout,
        limits[: spec.unmerged_layers],
        np.asarray(totals)[:, None],
    )
    exact = spec.staying(seen)
    stored = merged = seen - exact
    if spec.selection.budgeted:
        kept = limits[..., 1] if spec.selection.in_tokens else limits[..., 1] * seen
        stored = np.minimum(
            stored, np.maximum(np.floor(kept).astype(np.int64) - exact, spec.selection.sinks)
        )
        if spec.selection.pooled is not None:  # heads share: one of them may have them all
            stored -= stored % layout.tokens_per_page(layout.tiers - 1)
    elif np.any(limits[..., 1] > 0):
        stored = np.minimum(stored, 1)
    pages = np.min([layout.pages_for(tier, stored) for tier in range(layout.tiers)], axis=0)
    return max(int(np.broadcast_to(pages, limits.shape[:3]).sum()) + _merged_pages(spec, merged), 1)


def most_pages(spec: CacheSpec, room: Sequence[int]) -> int:
    """Pages that always suffice: every token in the highest tier, and a part-filled page of the
    other one.
    """
    layout, stored = spec.unmerged.layout, [max(total - spec.window, 0) for total in room]
    pages = sum(layout.pages_for(0, n) + layout.tiers - 1 if n else 0 for n in stored)
    pages = spec.unmerged_layers * spec.attention.num_kv_heads * pages + _merged_pages(
        spec, np.asarray(stored)
    )
    return max(pages, 1)  # an array must not be empty


def _merged_pages(spec: CacheSpec, stored: np.ndarray) -> int:
    """Pages of all merged layers for requests with so many `stored` tokens: nothing depends on the
    text.
    """
    if spec.merge is None:
        return 0
    with jax.ensure_compile_time_eval():
        return spec.pairs * spec.attention.num_kv_heads * int(pages_of_pair(spec, stored).sum())
