"""Which requests come in, are read, decode, or are parked: plain Python that touches no array but
the few numbers that each call on the device gives back.
"""

from time import perf_counter

from diffkv_jax import decode_loop
from diffkv_jax.batching import chunk_size
from diffkv_jax.decode_loop import FINISH_REASONS
from diffkv_jax.serving.answers import Answers
from diffkv_jax.serving.estimate import Estimate, Load, peak
from diffkv_jax.serving.parking import Parked
from diffkv_jax.serving.programs import STALLED, WIDTH
from diffkv_jax.serving.reading import Reading, pieces_of
from diffkv_jax.serving.request import PARKED, READING, RUNNING, WAITING, Event, Request
from diffkv_jax.serving.slots import Slots

FILLED = 0.98  # of the pool that is planned for
SECONDS = 0.1  # about how long a step of the engine decodes where no prompt is being read


class Scheduler:
    """The queues of an engine, and what one step does.

    First come, first served, larger priorities first. A request that was too hopefully let in is
    parked, the youngest first: one that decodes goes to host memory and comes back as it was, one
    that is being read begins again, which costs less than its pages are worth.
    """

    def __init__(self, slots: Slots, prefill_chunk: int, readings: int):
        self.slots, self.prefill_chunk, self.readings = slots, prefill_chunk, readings
        self.waiting: list[Request] = []
        self.reading: list[Reading] = []
        self.parked: list[tuple[Request, Parked]] = []
        self.estimate = Estimate(slots.fixed.spec)
        self._answers = Answers()
        self._steps = 1

    @property
    def busy(self) -> bool:
        """Whether a request has not finished."""
        return bool(self.waiting or self.reading or self.parked or self.slots.running)

    def step(self) -> list[Event]:
        """One turn: what came of it."""
        self._drop_cancelled()
        self._find_pages()
        self._admit()
        self._decode(beside=self._read())
        return self._answers.events()

    # --- who comes in

    def _admit(self) -> None:
        self.waiting.sort(key=_order)
        while self._active < self.slots.most and self._unpark_one():
            pass
        while (
            self.waiting
            and not any(_order(one[0]) < _order(self.waiting[0]) for one in self.parked)
            and self._active < self.slots.most
            and len(self.reading) < self.readings
            and self._has_room(self.waiting[0])
        ):
            self._begin(self.waiting.pop(0))

    @property
    def _active(self) -> int:
        return len(self.slots.running) + len(self.reading)

    def _begin(self, request: Request) -> None:
        policy = self.slots.policy
        size = chunk_size(len(request.prompt), self.prefill_chunk, policy.queries)
        score = policy.score if self.slots.fixed.spec.paged_layers else None
        parts = list(pieces_of(request.prompt, size, score))
        self.reading.append(Reading(request, self.slots.blank(request.policy), parts))
        request.state = READING

    def _has_room(self, request: Request) -> bool:
        """Whether the pool is expected to hold a new request to its end beside the others, and all
        prompts until the policy has decided.
        """
        if not self._active:
            return True
        now = self.slots.pages.sum() + self._prompt_pages(request)
        now += sum(self._prompt_pages(one.request) for one in self.reading)
        return now <= self._planned and self._fits(self._load_of(request))

    def _prompt_pages(self, request: Request) -> int:
        return self.estimate.chunk_pages(0, len(request.prompt))

    @property
    def _planned(self) -> float:
        return FILLED * self.slots.fixed.spec.num_pages

    def _load_of(self, request: Request, pages: float | None = None) -> Load:
        estimate = self.estimate
        pages = estimate.pages(len(request.prompt)) if pages is None else pages
        left = estimate.to_come(len(request.tokens), request.max_new_tokens)
        return Load(pages, estimate.rate, left)

    def _fits(self, load: Load) -> bool:
        loads = [self._load_of(one.request) for one in self.reading]
        for slot in self.slots.running:
            loads.append(self._load_of(self._at(slot), self.slots.pages[slot]))
        return peak([*loads, load]) <= self._planned

    def _at(self, slot: int) -> Request:
        request = self.slots.requests[slot]
        assert request is not None
        return request

    def _unpark_one(self) -> bool:
        if not self.parked:
            return False
        self.parked.sort(key=lambda one: _order(one[0]))
        request, found = self.parked[0]
        if self.waiting and _order(self.waiting[0]) < _order(request):
            return False
        need = found.num_pages + self.estimate.event_pages()
        if self._active and not (
            need <= self.slots.free and self._fits(self._load_of(request, need))
        ):
            return False
        del self.parked[0]
        self.slots.unpark(request, found)
        request.state = RUNNING
        return True

    # --- who has to leave

    def _drop_cancelled(self) -> None:
        left = [*map(self._at, self.slots.running), *(one.request for one in self.reading)]
        left += [*(request for request, _ in self.parked), *self.waiting]
        gone = {request for request in left if request.cancelled}  # once: others cancel meanwhile
        for request in gone:
            self._answers.finish(request, "cancelled")
        self.slots.free_slots([i for i in self.slots.running if self._at(i) in gone])
        for one in [one for one in self.reading if one.request in gone]:
            self._stop_reading(one)
        self.parked = [one for one in self.parked if one[0] not in gone]
        self.waiting = [request for request in self.waiting if request not in gone]

    def _find_pages(self) -> None:
        """Pages for the events of stalled requests, the first ones first."""
        stalled = [(i, self._at(i)) for i in self.slots.running if self.slots.stalled[i]]
        for slot, request in sorted(stalled, key=lambda one: _order(one[1])):
            while self.slots.requests[slot] is request and not self.slots.retry(slot):
                if self._active == 1:
                    self._answers.finish(self._at(slot), "cache_full")
                    self.slots.free_slots([slot])
                else:
                    self._park_youngest()

    def _park_youngest(self) -> None:
        reading = max(self.reading, key=lambda one: _order(one.request), default=None)
        slot = max(self.slots.running, key=lambda i: _order(self._at(i)), default=None)
        if slot is None or (
            reading is not None and _order(reading.request) > _order(self._at(slot))
        ):
            assert reading is not None
            self._read_later(reading)
            return
        request = self._at(slot)
        request.state, request.parks = PARKED, request.parks + 1
        self.parked.append((request, self.slots.park(slot)))

    def _read_later(self, one: Reading) -> None:
        self._stop_reading(one)
        one.request.state, one.request.parks = WAITING, one.request.parks + 1
        self.waiting.insert(0, one.request)

    def _stop_reading(self, one: Reading) -> None:
        self.reading.remove(one)
        self.slots.forget(one)

    # --- prompts

    def _read(self) -> bool:
        """The next part of the prompts that came first; whether there were pages for it."""
        if not self.reading:
            return False
        group = self._alike()
        while len(group) > 1 and self._needs(group) > self.slots.free:
            group = group[: len(group) // 2]
        early = self._needs(group) > self.slots.free
        if early and self._active > 1:
            if len(self.slots.running) > self.slots.stalled.sum():
                return False  # others go on, and end, or stall
            self._park_youngest()
            return False
        self.slots.read(group, early=early)
        for one in group:
            if one.overflow:
                self._answers.finish(one.request, "cache_full")
                self._stop_reading(one)
            elif not one.parts:
                self._answer_first(one)
        return True

    def _alike(self) -> list[Reading]:
        """A power of two of prompts whose next parts go in one call."""
        first = self.reading[0].parts[0]
        alike = [one for one in self.reading if one.parts[0].together == first.together]
        most = max(1, self.prefill_chunk // max(first.tokens.shape[1], 1))
        count = min(len(alike), most) if first.kind == "chunk" else 1
        return alike[: 1 << (count.bit_length() - 1)]

    def _needs(self, group: list[Reading]) -> int:
        part = group[0].parts[0]
        if part.kind == "pass":
            return 0
        if part.kind == "event":
            return self.estimate.event_pages()
        chunk = self.estimate.chunk_pages
        return sum(chunk(one.tokens, int(one.parts[0].length[0])) for one in group)

    def _answer_first(self, one: Reading) -> None:
        state, logprobs = self.slots.first_token(one)
        self.reading.remove(one)
        if self._take(one.request, state, logprobs, 0):
            if one.request.finish_reason == "error":
                self.slots.log_error(one)
            self.slots.forget(one)
        else:
            one.request.state = RUNNING
            self.slots.seat(one.request, one.row, one.pages)

    # --- answers

    def _decode(self, *, beside: bool) -> None:
        """Some steps of all that are not stalled; one `beside` a prompt that is being read."""
        slots, running = self.slots, self.slots.running
        if not [i for i in running if not slots.stalled[i]]:
            slots.narrow()
            return
        steps, began = (1 if beside else self._steps), perf_counter()
        state, logprobs = slots.decode(
            steps, until_end=bool(self.waiting or self.parked or self.reading)
        )
        pace = (perf_counter() - began) / max(int(state.lengths.max()), 1)
        self._steps = max(1, min(2 * self._steps, WIDTH, int(SECONDS / pace)))
        ended = [i for i in running if self._take(self._at(i), state, logprobs, i)]
        for slot in set(running) - set(ended):
            self.estimate.saw(self._at(slot).seq_len, int(slots.pages[slot]))
        slots.log_errors([i for i in ended if self._at(i).finish_reason == "error"])
        slots.free_slots(ended)
        if not self.waiting:
            slots.narrow()

    def _take(self, request: Request, state, logprobs, row: int) -> bool:
        """Give a request what row `row` of a call has drawn; whether it has ended."""
        tokens = state.tokens[row, : state.lengths[row]]
        code = int(state.reason[row])
        goes_on = code in (decode_loop.RUNNING, decode_loop.RESTING, STALLED)
        reason = None if goes_on else FINISH_REASONS[code]
        told = None if logprobs is None else [x[row] for x in logprobs]
        self._answers.add(request, tokens, told, reason)
        if request.finish_reason in ("eos", "stop", "length"):
            self.estimate.ended(len(request.tokens), request.max_new_tokens)
        return request.finish_reason is not None


def _order(request: Request) -> tuple[int, int]:
    return -request.priority, request.number
