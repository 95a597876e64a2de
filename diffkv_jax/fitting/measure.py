"""What candidates cost: the real cache, teacher-forced, and the bytes that it would take at another
length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffkv_jax.batching import power_of_two
from diffkv_jax.cache.cache import KVCache, complete
from diffkv_jax.cache.pool_size import bound, tree_bytes
from diffkv_jax.cache.report import memory_report
from diffkv_jax.calibration.calibrate import calibrate
from diffkv_jax.calibration.calibration import Calibration
from diffkv_jax.evaluation import quality, teacher_forced
from diffkv_jax.evaluation.forcing import feed
from diffkv_jax.fitting.candidates import Path
from diffkv_jax.fitting.recorded import Prompts, Replayed, record
from diffkv_jax.fitting.texts import GOES_ON, LEARNED, Texts
from diffkv_jax.interrupt import Held
from diffkv_jax.make_cache import make_cache
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.stage import with_leaves
from diffkv_jax.policy.transform import Transform
from diffkv_jax.read_prompts import prefill, read_prompts
from diffkv_jax.steps.jitted import end_passes


@dataclass(frozen=True)
class Measured:
    """What a policy costs on some rows of text.

    Attributes:
        kl: [S, steps] nats, of the full cache's next-token distribution.
        top1: [S, steps] 1 where both rank the same token first.
        recall, recall_full: share of the repeated tokens that the compressed and the full cache
            rank first.
        share: allocated bytes of the plain bfloat16 cache's, at the asked length.
        by_head: [layers, S, kv_heads, tiers + 1] share of the tokens in each tier and, last, in the
            recent window, at the end.
    """

    kl: np.ndarray
    top1: np.ndarray
    recall: float
    recall_full: float
    share: float
    by_head: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """The mean of `by_head` over layers, rows and heads, [tiers + 1]."""
        return self.by_head.mean(axis=(0, 1, 2))

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    @property
    def going_on(self) -> float:
        """Mean KL of the text that goes on."""
        return float(self.kl[:, :GOES_ON].mean())

    @property
    def repeated(self) -> float:
        """Mean KL of the passage that is repeated."""
        return float(self.kl[:, GOES_ON:].mean())

    @property
    def kl_error(self) -> float:
        """Half of the 95 % confidence interval of the mean KL, from the spread of its rows and of
        both kinds of tokens in them.
        """
        parts = np.stack([self.kl[:, :GOES_ON].mean(axis=1), self.kl[:, GOES_ON:].mean(axis=1)])
        return float(1.96 * parts.std(ddof=1) / np.sqrt(parts.size))


def learned(
    model: CausalLM,
    params: Mapping[str, Any],
    texts: Texts,
    policy: CompressionPolicy,
    context: int | None = None,
) -> Calibration | None:
    """What a policy's transform learns from the contexts of some texts, for requests of `context`
    tokens; None: nothing.
    """
    if not policy.transform.learned:
        return None
    rows = texts.rows[:, : texts.context]
    context = context and max(context, texts.context)
    return calibrate(model, params, rows, policy, context=context, progress=False)


class Bench:
    """A model, texts and the full cache's log-probabilities on them.

    `context` is the length of the `requests` that bytes are told for; texts may be shorter. With
    `replays` the model reads the texts' contexts once for all policies, which takes the room of
    their queries, keys and values.
    """

    def __init__(
        self,
        model: CausalLM,
        params: Mapping[str, Any],
        texts: Texts,
        context: int,
        requests: int = 1,
        *,
        replays: bool = False,
    ):
        self.model, self.params, self.texts = model, params, texts
        self.context, self.requests = context, requests
        self.replays, self.prompts = replays, None
        self.full = self._run(CompressionPolicy.none(), None)[0]

    def with_rows(self, count: int) -> "Bench":
        """The same with `count` rows of the texts, evenly spaced."""
        rows = len(self.texts.rows)
        if count >= rows:
            return self
        chosen = np.linspace(0, rows - 1, count).astype(int)
        return self.with_texts(self.texts._replace(rows=self.texts.rows[chosen]))

    def with_texts(self, texts: Texts) -> "Bench":
        """The same with other texts."""
        given = self.model, self.params, texts, self.context, self.requests
        return Bench(*given, replays=self.replays)

    def along(
        self,
        path: Path,
        points: Sequence[float],
        transform: Transform,
        calibration: Calibration | None,
    ) -> list[Measured]:
        """All rows at each of the `points` of a path: in one batch, or after one reading where
        policies that go over the prompt again rank its tokens alike.
        """
        count = len(self.texts.rows)
        apart = [path.policy(transform, [point], count) for point in points]
        if self.replays and self._passes(apart[0]) == 1:
            return self._scored_once(apart, calibration)
        return self.each(path.policy(transform, points, count), calibration, len(points))

    def _scored_once(
        self, policies: Sequence[CompressionPolicy], calibration: Calibration | None
    ) -> list[Measured]:
        """All rows with policies that differ in how many tokens they keep, of one ranking."""
        n, fed = self.texts.context, self.texts.fed
        lengths = np.full(len(fed), fed.shape[1])
        held = Held(None, make_cache(self.model, policies[0], lengths, calibration=calibration))
        reads = Replayed(self.model.attention), self._recorded(twice=True)
        read_prompts(*reads, held, fed, np.full_like(lengths, n), power_of_two(n), drops=False)
        found = []
        for policy in policies:
            cache = jax.tree.map(jnp.copy, held.cache)
            keep = jax.tree.map(jnp.asarray, bound(cache.spec, policy).keep)
            cache = replace(cache, policy=with_leaves(cache.policy, keep=keep))
            cache = end_passes(cache, jnp.ones(len(fed), bool))
            found.append(self._measured(*feed(self.model, self.params, cache, fed[:, n:])))
        return found

    def each(
        self, policy: CompressionPolicy, calibration: Calibration | None, copies: int
    ) -> list[Measured]:
        """All rows in each of `copies` parts of a batch, for which the policy says what differs."""
        count = len(self.texts.rows)
        log_probs, cache = self._run(policy, calibration, copies)
        parts = np.split(log_probs, copies)
        return [self._measured(part, cache, i * count) for i, part in enumerate(parts)]

    def of(self, policy: CompressionPolicy, calibration: Calibration | None) -> Measured:
        """All rows with one policy."""
        return self._measured(*self._run(policy, calibration))

    def _run(
        self, policy: CompressionPolicy, calibration: Calibration | None, copies: int = 1
    ) -> tuple[np.ndarray, KVCache]:
        model, params, n = self.model, self.params, self.texts.context
        rows = np.tile(self.texts.fed, (copies, 1))
        if not self.replays:
            return teacher_forced(model, params, rows, n, policy, calibration=calibration)
        lengths = np.full(len(rows), rows.shape[1])
        cache = make_cache(model, policy, lengths, calibration=calibration)
        given = cache, rows, np.full_like(lengths, n), power_of_two(n)
        passes = self._passes(policy)
        if passes > 1:  # each reads a part of the prompt behind all of it: another text
            _, cache = prefill(model, params, *given)
        else:
            _, cache = prefill(Replayed(model.attention), self._recorded(passes == 1), *given)
        return feed(model, params, cache, rows[:, n:])

    def _passes(self, policy: CompressionPolicy) -> int:
        """How often a policy goes over the contexts again."""
        if policy.score is None:
            return 0
        rows = self.texts.rows[:, : self.texts.context]
        lengths = np.full(len(rows), rows.shape[1], np.int32)
        return sum(1 for _ in policy.score.passes(rows, lengths))

    def _recorded(self, twice: bool) -> Prompts:
        if self.prompts is None or (twice and self.prompts.again is None):
            rows = self.texts.rows[:, : self.texts.context]
            self.prompts = record(self.model, self.params, rows, twice)
        return self.prompts

    def _measured(self, log_probs: np.ndarray, cache: KVCache, first: int = 0) -> Measured:
        """Of the requests from `first` on, one for each row."""
        given = self.texts.next_tokens
        found = [quality(*one) for one in zip(self.full, log_probs, given, strict=True)]
        seen = slice(GOES_ON + LEARNED, None)

        def recall(run: np.ndarray) -> float:
            return float((run[:, seen].argmax(axis=-1) == given[:, seen]).mean())

        rows = slice(first, first + len(given))
        report = memory_report(cache)
        tokens, dropped = report.tokens[:, rows], report.dropped[:, rows]
        return Measured(
            kl=np.stack([one.kl for one in found]),
            top1=np.stack([one.top1 for one in found]),
            recall=recall(log_probs),
            recall_full=recall(self.full),
            share=share_at(cache, rows, self.context, self.requests),
            by_head=tokens / np.maximum(tokens.sum(axis=-1) + dropped, 1)[..., None],
        )


def share_at(cache: KVCache, rows: slice, context: int, requests: int = 1) -> float:
    """Allocated bytes, of a plain bfloat16 cache's, of one for `requests` of `context` tokens each
    whose tokens outside the recent window went to the tiers as those of the requests `rows` did.
    """
    cache = complete(cache)  # of latents there are no values
    report, spec, layout = memory_report(cache), cache.spec, cache.spec.layout
    stored = report.tokens[:, rows].sum(axis=(0, 1, 2))[:-1]
    shares = stored / max(stored.sum() + report.dropped[:, rows].sum(), 1)
    left = max(context - spec.window - spec.flush // 2, 0)
    # heads differ, so that the last page of each tier is half empty on average
    pages = sum(
        share * left / layout.tokens_per_page(tier) + min(0.5, share * left)
        for tier, share in enumerate(shares)
    )
    exact = cache.recent.k.shape[-1] + cache.recent.v.shape[-1]
    itemsize, buffer = cache.recent.k.dtype.itemsize, spec.window + spec.flush
    head = pages * (layout.page_bytes + 4)  # a page's number waits in the ring
    head += buffer * (exact * itemsize + (4 if layout.scored else 0))
    head += 4 * (layout.pages_for(0, context) + 2 * layout.tiers)  # page table, lengths
    in_ring = min(spec.ring_len, context) * len(spec.window_layers)
    plain = (len(spec.paged_layers) * context + in_ring) * exact * 2
    maps = tree_bytes(cache.policy.transform) / (requests * spec.attention.num_kv_heads)
    held = len(spec.paged_layers) * head + in_ring * exact * itemsize + maps
    return float(held / plain)
