"""Bytes to pages: how large a pool a memory budget buys, and what cannot fit."""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import humanize
import jax
import numpy as np

from diffkv_jax.cache.cache import KVCache, empty_cache
from diffkv_jax.cache.pair_pages import pages_of_pair
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.policy.keep import Budget
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.units import parse_bytes


def tree_bytes(tree) -> int:
    """Bytes of all arrays (or array shapes) of a pytree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bound(spec: CacheSpec, policy: CompressionPolicy) -> CompressionPolicy:
    """The policy as the cache that `spec` describes carries it (`CompressionPolicy.bind`)."""
    return policy.bind(len(spec.paged_layers), spec.num_requests, spec.attention.num_kv_heads)


def cache_bytes(spec: CacheSpec, policy: CompressionPolicy) -> int:
    """Bytes of all arrays of the cache that `spec` describes, from their shapes; `policy` is
    bound.
    """
    shapes: KVCache = jax.eval_shape(partial(empty_cache, spec), policy)
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
    carried = bound(spec, policy)
    # a prompt is stored as it is before anything is dropped
    once_whole = policy.score is not None and policy.score.has_passes
    least = most_pages(spec, totals) if once_whole else _least_pages(spec, totals, carried)
    most = most_pages(spec, room)
    if budget is None:
        return _addressable(dataclasses.replace(spec, num_pages=most))
    amount = parse_bytes(budget)
    fixed, per_page = _fixed_and_page_bytes(spec, carried)
    pages = (amount - fixed) // per_page
    if pages < least:
        needs, suffices = (
            humanize.naturalsize(fixed + n * per_page, binary=True, format="%.3f")
            for n in (least, most)
        )
        raise ValueError(
            f"memory_budget={budget!r} cannot hold {[n for n in totals if n]} tokens with policy "
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

    def of(tokens: int) -> CompressionPolicy:
        return dataclasses.replace(policy, keep=dataclasses.replace(policy.keep, keep=tokens))

    def pages(tokens: int) -> int:
        return _least_pages(spec, room, bound(spec, of(tokens)))

    least = policy.schedule.window + policy.protect.sinks + 1
    carried, amount = bound(spec, of(least)), _budget(policy).keep
    fixed, per_page = _fixed_and_page_bytes(spec, carried)
    most_of_pool = (parse_bytes(str(amount), "keep") - fixed) // per_page
    if pages(least) > most_of_pool:
        needs = fixed + pages(least) * per_page
        raise ValueError(
            f"keep={amount!r} is too little: the smallest cache of policy {policy.name!r} takes "
            f"{needs} bytes; raise it"
        )
    # of the layers that get fewer than the mean
    many = 2**20
    smallest_share = np.asarray(_budget(bound(spec, of(many))).keep).min() / many
    everything = max(least, math.ceil(max(room) / smallest_share))
    return of(bisect.bisect_right(range(everything + 1), most_of_pool, lo=least, key=pages) - 1)


def _budget(policy: CompressionPolicy) -> Budget:
    assert isinstance(policy.keep, Budget)  # alone is an amount of memory
    return policy.keep


def _fixed_and_page_bytes(spec: CacheSpec, policy: CompressionPolicy) -> tuple[int, int]:
    """Bytes of a cache without pages, and those that each page adds."""
    fixed = cache_bytes(dataclasses.replace(spec, num_pages=0), policy)
    return fixed, cache_bytes(dataclasses.replace(spec, num_pages=1), policy) - fixed


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


def check_pool(
    cache: KVCache,
    totals: Sequence[int],
    remedy: str = "make the first call with a larger memory_budget or max_len",
) -> None:
    """Refuse tokens that cannot fit the pool of an existing cache, even in the cheapest form.
    `totals` is that of `with_pool`; `remedy`: how a larger pool is made.

    Raises:
        ValueError: names the pool and the pages that the tokens need at least.
    """
    if not cache.spec.paged_layers:
        return
    least = _least_pages(cache.spec, totals, jax.device_get(cache.policy))
    if least > cache.spec.num_pages:
        raise ValueError(
            f"the pool of {cache.spec.num_pages} pages cannot hold {list(totals)} tokens, which "
            f"need at least {least}; "
            f"{remedy}, or ask for fewer tokens"
        )


def _least_pages(spec: CacheSpec, totals: Sequence[int], policy: CompressionPolicy) -> int:
    """Pages without which the tokens cannot fit: all in the cheapest tier; of those what stays
    whatever the scores (`Keep.at_least`); all in merged layers. `policy` is bound, of arrays on the
    host.
    """
    layout, seen = spec.unmerged.layout, np.asarray(totals)[:, None]
    exact = spec.num_unquantized(seen)
    keep = jax.tree.map(lambda leaf: leaf[: spec.unmerged_layers], policy.keep)
    page = layout.tokens_per_page(layout.tiers - 1)
    stored = keep.at_least(seen - exact, exact, seen, policy.protect.sinks, page)
    pages = np.min([layout.pages_for(tier, stored) for tier in range(layout.tiers)], axis=0)
    shape = (spec.unmerged_layers, spec.num_requests, spec.attention.num_kv_heads)
    merged = _merged_pages(spec, seen - exact)
    return max(int(np.broadcast_to(pages, shape).sum()) + merged, 1)


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
    if spec.pairs is None:
        return 0
    with jax.ensure_compile_time_eval():
        return spec.num_pairs * spec.attention.num_kv_heads * int(pages_of_pair(spec, stored).sum())
