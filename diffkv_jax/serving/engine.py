"""`Engine`: many requests at once over one pool of pages, coming and going as they like."""

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any, Unpack

import numpy as np

from diffkv_jax.arguments import integer
from diffkv_jax.batching import check_context, chunk_size
from diffkv_jax.cache.report import MemoryReport, memory_report
from diffkv_jax.inputs import as_params, as_policy, check_model
from diffkv_jax.interrupt import held_back
from diffkv_jax.make_cache import CacheOptions
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.sampling import Greedy, Sample
from diffkv_jax.serving.penalties import Penalties
from diffkv_jax.serving.pool import READINGS, empty_slots
from diffkv_jax.serving.request import Event, Request
from diffkv_jax.serving.scheduler import Scheduler
from diffkv_jax.serving.stats import held_by_head, stats
from diffkv_jax.serving.submitted import as_request
from diffkv_jax.serving.warm_up import warm_up

LARGER = "make the engine with a larger max_len"


class Engine:
    """Serves requests with a compressed cache in fixed memory: prompts are read in chunks beside
    the decoding of others, and pages that compression frees admit the next request. A request's
    tokens are those of `generate()` alone with the same key, `prefill_chunk` and no memory budget.

    One thread steps; any may submit and cancel.

    Args:
        model, params: as of `generate`.
        tokenizer: of transformers or tokenizers, for prompts and answers in text.
        max_requests: most that decode at once. Each has a recent window of its own, which the
            memory budget pays for.
        prefill_chunk: tokens of prompts that are read between two steps of decoding, a power of
            two. A prompt that fits one chunk is attended exactly.
        options: `CacheOptions`. `max_len`, prompt and answer of a request, is the model's context
            when None, 8,192 at most. The memory budget is for pool and windows together; None takes
            what all requests need in the highest tier. "auto" is fitted to its own target, not to
            the budget.

    Raises:
        TypeError, ValueError: bad input, named.
    """

    def __init__(
        self,
        model: CausalLM,
        params: Mapping[str, Any],
        *,
        tokenizer: Any = None,
        max_requests: int = 32,
        prefill_chunk: int = 256,
        **options: Unpack[CacheOptions],
    ):
        check_model("Engine", model)
        self.model, self.tokenizer = model, tokenizer
        params = as_params("Engine", params)
        self.max_requests = integer("max_requests", max_requests, least=1, most=1024)
        context = model.attention.max_position_embeddings
        given = integer("max_len", options.get("max_len"), least=1, most=None, optional=True)
        self.max_len = min(8192, context) if given is None else given
        self.prefill_chunk = integer("prefill_chunk", prefill_chunk)
        slots = empty_slots(
            model, params, self.max_requests, self.max_len, self.prefill_chunk, options
        )
        self._scheduler = Scheduler(slots, self.prefill_chunk, READINGS)
        self._inbox: list[Request] = []
        self._failed: BaseException | None = None
        self._told: list[Event] = []  # by a step that Ctrl-C ended, for the next one
        self._numbers, self._stepping = itertools.count(), threading.Lock()

    def submit(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 128,
        sampling: Greedy | Sample | Mapping | str | None = None,
        seed: Any = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] | None = None,
        logprobs: int | None = None,
        penalties: Penalties | Mapping | None = None,
        policy: CompressionPolicy | str | None = None,
        priority: int = 0,
    ) -> Request:
        """Queue a prompt; nothing is computed before the next `step`.

        Args:
            prompt: token ids; or a text, or messages for the tokenizer's chat template.
            max_new_tokens: most tokens to generate.
            sampling: as of `generate`.
            seed: of its draws, or a random key; `generate(..., key=seed)` alone draws the same.
                None: another one each time, kept in `Request.seed`.
            stop: strings that end it with "stop"; the text ends before the first of them.
            stop_token_ids: ids that end it with "eos"; the model's when None.
            logprobs: with the log-probability of each token, and of so many likeliest ones.
            penalties: `Penalties(...)` or a mapping of its fields.
            policy: the engine's with thresholds or budgets of the request's own, such as
                `diffkv(1.0, 0.1)` for an engine of `diffkv(1.0, 0.0)`; they compile nothing.
            priority: larger ones come first, equals in order.

        Raises:
            TypeError, ValueError: bad input, named, or more tokens than `max_len`, the model's
                context or the pool can hold.
        """
        request = as_request(
            next(self._numbers),
            self.model,
            self.tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop=stop,
            stop_token_ids=stop_token_ids,
            logprobs=logprobs,
            penalties=penalties,
            priority=priority,
        )
        if policy is not None:
            request.policy = self._scheduler.slots.with_keep(as_policy(policy))
        self._check(request)
        request.times["submitted"] = perf_counter()
        self._inbox.append(request)
        return request

    def _check(self, request: Request) -> None:
        slots, length = self._scheduler.slots, len(request.prompt)
        total = np.array([length + request.max_new_tokens - 1])
        check_context(self.model.attention, total, self.max_len, remedy=LARGER)
        size = chunk_size(length, self.prefill_chunk, slots.policy.queries)
        slots.check(length, int(total[0]), size, request.policy)

    def step(self) -> list[Event]:
        """Read some of a prompt, decode some tokens: what came of it. Ctrl-C waits for its end.

        Raises:
            RuntimeError: another thread is in it, or an earlier step has failed.
        """
        if self._failed is not None:
            raise RuntimeError(
                f"an earlier step failed with {self._failed!r}, and took the pool with it: make "
                "another engine and submit what had not finished"
            ) from self._failed
        if not self._stepping.acquire(blocking=False):
            raise RuntimeError("another thread is in step(): let one thread step an engine")
        try:
            with held_back():
                self._told += self._turn()
        finally:
            self._stepping.release()
        told, self._told = self._told, []
        return told

    def _turn(self) -> list[Event]:
        while self._inbox:
            self._scheduler.waiting.append(self._inbox.pop(0))
        try:
            return self._scheduler.step()
        except BaseException as error:
            self._failed = error
            raise

    def memory_report(self) -> MemoryReport | None:
        """`memory_report` of the pool and the requests that decode now; None where none does. For
        the thread that steps, between two steps.
        """
        cache = self._scheduler.slots.cache
        return None if cache is None else memory_report(cache)

    def warm_up(self) -> None:
        """Compile every program that requests may need, now and not when they come, but for scores
        that go over a prompt again (`kvzip`), whose programs are as long as it. Before the first
        request.

        Raises:
            RuntimeError: there are requests already.
        """
        if self.busy:
            raise RuntimeError("warm_up() comes before the first request: this engine has some")
        warm_up(self._scheduler.slots, self.prefill_chunk, READINGS)

    @property
    def busy(self) -> bool:
        """Whether a request has not finished, or events were not handed out."""
        return bool(self._inbox or self._told) or self._scheduler.busy

    def run(self) -> Iterator[Event]:
        """Step until every request has finished, those too that are submitted meanwhile."""
        while self.busy:
            self._told = self.step()
            while self._told:  # one by one: what is left by `break` comes next time
                yield self._told.pop(0)

    def stats(self, *, heads: bool = False) -> dict[str, Any]:
        """Open requests and the pool's pages, as of the last step; with `heads` the pages of each
        layer and KV head too, which waits for the device. For the thread that steps.
        """
        found = stats(self._scheduler)
        return {**found, "heads": held_by_head(self._scheduler)} if heads else found
