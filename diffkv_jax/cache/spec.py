"""`CacheSpec`: everything about a cache that the compiler must know."""

from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax

from diffkv_jax.arguments import instance, integer, one_of
from diffkv_jax.cache.kernels import unsupported
from diffkv_jax.cache.layout import layout_of
from diffkv_jax.model import AttentionSpec
from diffkv_jax.pallas_kernels.apply_event import APPLY_EVENT
from diffkv_jax.pallas_kernels.codecs.full import DTYPES
from diffkv_jax.pallas_kernels.dispatch import XLA, Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout
from diffkv_jax.policy.checks import check_lengths
from diffkv_jax.policy.pairs import LayerPairs
from diffkv_jax.policy.policy import CompressionPolicy


@dataclass(frozen=True)
class CacheSpec:
    """Everything about a cache that the compiler must know. Thresholds and budgets are not here:
    they are arrays of the cache.
    """

    attention: AttentionSpec
    layout: PageLayout
    num_requests: int
    max_len: int
    num_pages: int
    window: int
    flush: int
    dtype: str
    kernels: Kernels = XLA
    pairs: LayerPairs | None = None  # None when no pair of layers is merged

    @staticmethod
    def build(
        attention: AttentionSpec,
        policy: CompressionPolicy,
        *,
        num_requests: int,
        max_len: int,
        num_pages: int,
        dtype: str,
        tokens: int | None = None,
        kernels: Kernels = XLA,
    ) -> "CacheSpec":
        """The spec of a cache for `num_requests` sequences of up to `max_len` tokens; `tokens` are
        the lanes of a page, what the `kernels` want when None.

        Raises:
            TypeError: an argument is of another type.
            ValueError: a number is outside its range, `dtype` is not one that exact tokens can be
                kept in, the tiers do not fit one page shape, the kernels do not know them, the
                model does not tell its rotary embedding and the policy removes it, from keys or
                from queries, it has a latent and a tier keeps K and V differently, its context is
                too short, or its layers cannot be merged.
        """
        instance("attention", attention, AttentionSpec, "a model has one as .attention")
        instance("policy", policy, CompressionPolicy, "diffkv_jax.load_policy makes one of a name")
        instance("kernels", kernels, Kernels, "pallas_kernels.dispatch.Kernels.resolve makes one")
        num_requests = integer("num_requests", num_requests, least=1)
        max_len = integer("max_len", max_len, least=1)
        num_pages = integer("num_pages", num_pages, least=0)
        tokens = integer("tokens", tokens, least=1, optional=True)
        # also where no tier keeps exact tokens: the recent window does
        dtype = one_of("dtype", dtype, DTYPES)
        check_lengths(policy, attention.max_position_embeddings)
        sizes = {"max_len": max_len, "dtype": dtype, "tokens": tokens, "kernels": kernels}
        try:
            pairs, layout = layout_of(attention, policy, **sizes)
        except ValueError as error:
            raise ValueError(f"policy {policy.name!r} with tiers={policy.tiers}: {error}") from None
        if kernels.implementation != "xla" and unsupported(policy, layout, kernels):
            raise ValueError(
                f"policy {policy.name!r} runs in plain XLA only, not on "
                f"{kernels.implementation!r} kernels: leave it to 'xla'"
            )
        _check_score(policy, attention)
        return CacheSpec(
            attention,
            layout,
            num_requests,
            max_len,
            num_pages,
            policy.schedule.window,
            policy.schedule.flush,
            dtype,
            kernels,
            pairs,
        )

    @property
    def event_kernels(self) -> Kernels:
        """What runs events, which take all layers at once on kernels."""
        return APPLY_EVENT.chosen(self.kernels, self.layout)

    @cached_property
    def paged_layers(self) -> tuple[int, ...]:
        """Layers with global attention, whose tokens are compressed in pages."""
        return tuple(i for i, window in enumerate(self.attention.sliding_windows) if window is None)

    @cached_property
    def window_layers(self) -> tuple[int, ...]:
        """Layers with a sliding window, which keep their own full-precision ring."""
        return tuple(
            i for i, window in enumerate(self.attention.sliding_windows) if window is not None
        )

    @cached_property
    def num_pairs(self) -> int:
        """Pairs of merged layers: the last of the paged ones."""
        return 0 if self.pairs is None else self.pairs.count(self.attention)

    @property
    def unmerged_layers(self) -> int:
        """How many of the paged layers, the first ones, are not merged."""
        return len(self.paged_layers) - 2 * self.num_pairs

    @property
    def unmerged(self) -> "CacheSpec":
        """What holds for layers that are not merged: pages have no tier for what two layers share,
        the last one.
        """
        if self.pairs is None:
            return self
        layout = self.layout
        return replace(
            self, layout=replace(layout, formats=layout.formats[:-1], blocks=layout.blocks[:-1])
        )

    @property
    def ring_len(self) -> int:
        """Tokens that the ring of a sliding-window layer holds."""
        return min(
            max((w for w in self.attention.sliding_windows if w is not None), default=0),
            self.max_len,
        )

    @property
    def max_pages(self) -> int:
        """Width of a head's page table: every token in the high tier and one part-filled page of
        each other tier.
        """
        return self.layout.pages_for(0, self.max_len) + self.layout.tiers

    def num_unquantized(self, count):
        """Tokens of `count` (ints or arrays), those in the recent window and new ones, that stay
        exact: the window and no whole block.
        """
        beyond, group = count - self.window, self.layout.tokens_per_group
        return count - beyond * (beyond > 0) // group * group

    @property
    def num_heads(self) -> int:
        """Heads of one layer that own pages: requests x KV heads."""
        return self.num_requests * self.attention.num_kv_heads


def _check_score(policy: CompressionPolicy, attention: AttentionSpec) -> None:
    """
    Raises:
        ValueError: the model lacks what the policy ranks by, or has layers that it cannot be for.
    """
    if policy.score is None:
        return
    try:
        jax.eval_shape(partial(policy.score.init, attention, 1, 1))
    except ValueError as error:
        raise ValueError(f"policy {policy.name!r}: {error}") from None
    if policy.score.hides_dropped and any(w is not None for w in attention.sliding_windows):
        raise ValueError(
            f"policy {policy.name!r}: {policy.score} hides dropped tokens from deeper layers and "
            "needs a model without sliding-window layers, which would see them"
        )
