"""The device's side of the engine: the pool, the rows that decode, one a slot, and the calls that
change them. What it knows of them on the host is as of the last call.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.pool_size import bound, check_pool
from diffkv_jax.decode_loop import State
from diffkv_jax.model import CausalLM
from diffkv_jax.not_finite import described
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.stage import with_leaves
from diffkv_jax.policy.transform import Usual
from diffkv_jax.read_prompts import check_evicts_once
from diffkv_jax.serving import programs
from diffkv_jax.serving.asked import Asked, asked_of, later
from diffkv_jax.serving.logprobs import Logprobs
from diffkv_jax.serving.parking import Parked, parked, unparked
from diffkv_jax.serving.programs import WIDTH, Standing
from diffkv_jax.serving.reading import Reading
from diffkv_jax.serving.request import Request
from diffkv_jax.serving.rows import Pool, Rows, blank, picked, placed, several, together

_log = logging.getLogger("diffkv_jax")
OWN = "a request has thresholds or budgets of its own, for all else make another engine"


class Slots:
    """Rows of up to `most` requests that decode. There is a power of two of them, or `most`: as
    many as requests came to decode at once.

    Attributes:
        requests: of each slot, None where it is empty.
        pages: int [slots] held.
        stalled: bool [slots] whose event waits for pages.
        free: pages of the pool.
    """

    def __init__(
        self,
        model: CausalLM,
        params: Any,
        fixed: KVCache,  # of one request
        pool: Pool,
        policy: CompressionPolicy,
        most: int,
    ):
        self.model, self.params, self.fixed, self.pool = model, params, fixed, pool
        self.policy = policy  # bound to one request
        self.most, self.free = most, fixed.spec.num_pages
        self.rows: Rows | None = None
        self.requests: list[Request | None] = []
        self.pages = np.zeros(0, np.int64)
        self.stalled = np.zeros(0, bool)
        self._asked: Asked | None = None

    def asked(self, requests: Sequence[Request | None], before: Asked | None = None) -> Asked:
        """What rows with these requests are asked for; `before`: of the same, some tokens ago."""
        max_len = self.fixed.spec.max_len
        return asked_of(requests, max_len) if before is None else later(before, requests, max_len)

    def with_keep(self, policy: CompressionPolicy) -> CompressionPolicy:
        """The engine's policy with the thresholds or budgets of a request's own, bound to it.

        Raises:
            ValueError: `policy` differs in more than these.
        """
        for name in ("score", "protect", "tiers", "schedule"):
            mine, given = getattr(self.policy, name), getattr(policy, name)
            if mine != given:
                raise ValueError(f"policy has {name}={given}, the engine's has {mine}: {OWN}")
        if (policy.pairs is None) != (self.fixed.spec.pairs is None):
            raise ValueError(
                f"policy has pairs={policy.pairs}, the engine's has not the same: {OWN}"
            )
        mine = jax.tree.structure(self.policy.transform)
        if not isinstance(policy.transform, Usual) and jax.tree.structure(policy.transform) != mine:
            raise ValueError(f"policy has transform={policy.transform}, the engine another: {OWN}")
        keep = jax.tree.map(jnp.asarray, bound(self.fixed.spec, policy).keep)
        mine, given = (
            (jax.tree.structure(one), [jax.typeof(x) for x in jax.tree.leaves(one)])
            for one in (self.policy.keep, keep)
        )
        if mine != given:
            raise ValueError(
                f"policy has keep={policy.keep}, which is not of the kind that the "
                f"engine's policy has: {OWN}"
            )
        return with_leaves(self.policy, keep=keep)

    def check(
        self, length: int, total: int, size: int, policy: CompressionPolicy | None = None
    ) -> None:
        """Refuse a prompt of so many tokens, in chunks of `size`, that comes to `total` tokens,
        with a bound `policy` of its own.

        Raises:
            ValueError: the policy cannot read it so, or the pool cannot hold it even alone.
        """
        lengths, score = np.array([length], np.int32), self.policy.score
        check_evicts_once(self.fixed, np.zeros(1, np.int32), lengths, size)
        if score is not None and self.fixed.spec.paged_layers:
            score.check_prompts(self.fixed.spec.attention, lengths)
        larger = "make the engine with a larger memory_budget"
        check_pool(replace(self.fixed, policy=policy or self.policy), [total], larger)

    # --- prompts

    def blank(self, policy: CompressionPolicy | None = None) -> Rows:
        """The row of a request that has read nothing, with a `policy` of its own, bound to one
        request.
        """
        return blank(self.fixed.spec, policy or self.policy)

    def read(self, readings: Sequence[Reading], *, early: bool = False) -> None:
        """The next part of each, chunks that are alike (`Part.together`); with `early` the policy
        decides before the prompt's end, as there are too few pages for all of it.
        """
        first = readings[0].parts[0]
        if first.kind != "chunk":
            self._read_again(readings[0])
            return
        tokens, length = (
            np.concatenate([getattr(one.parts[0], name) for one in readings])
            for name in ("tokens", "length")
        )
        logits, standing, self.pool, rows = programs.read(
            self.model,
            self.params,
            self.fixed,
            self.pool,
            tuple(one.row for one in readings),
            tokens,
            length,
            np.bool_(first.last or early),
        )
        self._note(standing)
        for i, (one, row) in enumerate(zip(readings, rows, strict=True)):
            one.row, one.pages = row, int(self._standing.pages[i])
            one.overflow = bool(self._standing.overflow[i])
            one.logits = logits[i] if first.last else None
            del one.parts[0]

    def _read_again(self, one: Reading) -> None:
        part = one.parts.pop(0)
        if part.kind == "pass":
            what = part.tokens, part.length, np.int32(part.first)
            self.pool, one.row = programs.read_again(
                self.model, self.params, self.fixed, self.pool, one.row, *map(jnp.asarray, what)
            )
            return
        standing, self.pool, one.row = programs.end_reading_again(self.fixed, self.pool, one.row)
        self._note(standing)
        one.pages, one.overflow = int(self._standing.pages[0]), bool(self._standing.overflow[0])

    def first_token(self, one: Reading) -> tuple[State, Logprobs]:
        """Of a request whose prompt is read, on the host; its row has it pending."""
        assert one.logits is not None
        asked = self.asked([one.request])
        state, logprobs, one.row = programs.first_token(one.logits, one.row, asked)
        one.logits = None
        return jax.device_get((state, logprobs))

    def forget(self, one: Reading) -> None:
        """Free the pages of a request that is being read."""
        standing, self.pool, _ = programs.release(self.fixed, self.pool, one.row, np.ones(1, bool))
        self._note(standing)

    # --- slots

    @property
    def cache(self) -> KVCache | None:
        """Of the requests that decode, as it is now; None where none does."""
        if self.rows is None or not self.running:
            return None
        return together(self.fixed, self.pool, self.rows)

    def log_errors(self, slots: Sequence[int]) -> None:
        """Say where the numbers of requests in slots stopped being finite."""
        found = described(self.cache, slots) if slots and self.cache is not None else ()
        for slot, text in zip(slots, found, strict=True):
            _log.error("%r: %s", self.requests[slot], text)

    def log_error(self, one: Reading) -> None:
        """The same of a request whose prompt has been read."""
        (text,) = described(together(self.fixed, self.pool, one.row), [0])
        _log.error("%r: %s", one.request, text)

    @property
    def running(self) -> list[int]:
        """Slots with a request."""
        return [i for i, request in enumerate(self.requests) if request is not None]

    def seat(self, request: Request, row: Rows, pages: int, *, stalled: bool = False) -> None:
        """Give a slot to a request, whose pages are in the pool."""
        if None not in self.requests:
            self._widen()
        slot = self.requests.index(None)
        assert self.rows is not None
        self.rows = placed(self.rows, row, jnp.int32(slot))
        self.requests[slot], self.pages[slot], self.stalled[slot] = request, pages, stalled
        self._asked = None

    def _widen(self) -> None:
        count = len(self.requests)
        more = min(count, self.most - count) if count else 1
        rows = (*filter(None, [self.rows]), *[self.blank()] * more)
        self.rows = rows[0] if len(rows) == 1 else several(rows)
        self._resize([*self.requests, *[None] * more])

    def narrow(self) -> None:
        """As few rows as the requests need."""
        running = self.running
        width = min(1 << max(len(running) - 1, 0).bit_length(), self.most)
        if self.rows is None or width >= len(self.requests):
            return
        if not running:
            self.rows = None
            self._resize([])
            return
        empty = [i for i in range(len(self.requests)) if i not in running]
        index = [*running, *empty][:width]
        self.rows = picked(self.rows, np.array(index, np.int32))
        pages, stalled = self.pages[index], self.stalled[index]
        self._resize([self.requests[i] for i in index])
        self.pages, self.stalled = pages, stalled

    def _resize(self, requests: list[Request | None]) -> None:
        more = len(requests) - len(self.requests)
        self.pages = np.pad(self.pages, (0, max(more, 0)))[: len(requests)]
        self.stalled = np.pad(self.stalled, (0, max(more, 0)))[: len(requests)]
        self.requests, self._asked = requests, None

    def decode(self, steps: int, *, until_end: bool) -> tuple[State, Logprobs]:
        """Up to `steps` steps of all slots that are not stalled; on the host."""
        self._asked = self.asked(self.requests, self._asked)
        there = np.array([r is not None for r in self.requests])
        turn, self.pool, self.rows = programs.decode(
            self.model,
            self.params,
            self.fixed,
            self.pool,
            self.rows,
            there & ~self.stalled,
            self._asked,
            np.int32(min(steps, WIDTH)),
            np.bool_(until_end),
            WIDTH,
        )
        if not any(r is not None and r.top_logprobs is not None for r in self.requests):
            turn = turn._replace(logprobs=None)
        state, logprobs, standing = jax.device_get(turn)
        self._note(standing)
        self.pages = np.where(there, standing.pages, 0)
        self.stalled = there & (self.stalled | (state.reason == programs.STALLED))
        return state, logprobs

    def retry(self, slot: int) -> bool:
        """Try the event again that a stalled slot had no pages for; whether it had them now."""
        due = np.arange(len(self.requests)) == slot
        standing, self.pool, self.rows = programs.retry(self.fixed, self.pool, self.rows, due)
        self._note(standing)
        self.pages[slot] = self._standing.pages[slot]
        self.stalled[slot] = self._standing.overflow[slot]
        return not self.stalled[slot]

    def free_slots(self, slots: Sequence[int]) -> None:
        """Take the requests out of slots, and free their pages."""
        if not slots:
            return
        gone = np.isin(np.arange(len(self.requests)), slots)
        standing, self.pool, self.rows = programs.release(self.fixed, self.pool, self.rows, gone)
        self._note(standing)
        for slot in slots:
            self.requests[slot], self.pages[slot], self.stalled[slot] = None, 0, False
        self._asked = None

    def park(self, slot: int) -> Parked:
        """Take a request out of its slot, with its pages, to the host."""
        found = parked(self.pool, picked(self.rows, np.array([slot], np.int32)))
        self.free_slots([slot])
        return found

    def unpark(self, request: Request, found: Parked) -> None:
        """Give a slot to a request that was parked."""
        self.pool, row = unparked(self.pool, found)
        self.free -= found.num_pages
        self.seat(request, row, found.num_pages, stalled=bool(found.rows.counters.overflow[0]))

    def _note(self, standing: Standing) -> None:
        self._standing = jax.device_get(standing)
        self.free = int(self._standing.free)
