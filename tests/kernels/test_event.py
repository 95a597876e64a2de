"""The compression event of many heads at once, against a NumPy transcription of the rule over the tokens read back, and against XLA."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS

from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.pallas_kernels.compact import FreeRing, Stored, Tokens, apply_event
from diffkv_jax.pallas_kernels.kernels import Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout, Pages
from diffkv_jax.pallas_kernels.prune import Rule, count_moves
from oracles.quantiser import demote_nested, dequantise, unpack
from readback import check_pool, decode_tensor, random_pool, slot_addresses, tensor_rows

MAX_LEN, NEW, SLOTS = 960, 40, 48  # tokens of a head; tokens that may enter; tokens at hand
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # most of the time is LLVM's
INFINITE = np.float32(np.inf)


class Scenario(NamedTuple):
    """What a head holds and what happens to it; thresholds as quantiles of its mean significances, or infinite."""

    pages: tuple[float, float]  # stored in each tier, in pages
    high: float
    low: float
    enters: tuple[float, float] = (0.4, 0.4)  # odds that a new token enters each tier
    stirred: bool = True
    admitted: bool = True


SCENARIOS = {
    "mixed": Scenario((2.4, 1.7), 0.6, 0.3),
    "nothing leaves": Scenario((1.9, 1.9), -1, -1),
    "all dropped": Scenario((2.3, 1.9), 2, 2),
    "all demoted": Scenario((3.6, 0.3), 2, -1),
    "full pages demoted, none free": Scenario((3, 1), 2, -1, (0, 0)),
    "not admitted": Scenario((1.4, 0.9), 0.7, 0.4, admitted=False),
    "empty": Scenario((0, 0), 0.5, 0.2),
    "not stirred": Scenario((1.2, 0.8), 0.7, 0.4, (0, 0), stirred=False),
    "long": Scenario((12, 2.5), 0.25, 0.1, (0.7, 0.1)),
}


class Case(NamedTuple):
    """A layout and how the event runs."""

    formats: str
    head_dim: int = 64
    tokens: int = 32
    scored: bool = True
    one_victim: bool = False

    def layout(self) -> PageLayout:
        formats = tuple(map(KVFormat.parse, self.formats.split("+")))
        return PageLayout.solve(formats, self.head_dim, tokens=self.tokens, max_len=MAX_LEN, scored=self.scored)


CASES = [
    Case("K8V4+K4V2"),
    Case("K8V4+K4V2", one_victim=True),
    Case("K8V4:1,2+K4V2:2,4", head_dim=128, tokens=128),
    Case("full+K4V2", tokens=64),
    Case("K4V4", head_dim=128, tokens=64),
    Case("K8V4+K4V2", scored=False),
]
case_id = lambda case: "-".join(map(str, case))  # noqa: E731
PLAIN = CASES[0]


# --- states ---


class World(NamedTuple):
    """Everything an event is given, in NumPy."""

    layout: PageLayout
    stored: Any  # a `Stored` whose pages are {name: array}
    rule: Rule
    tokens: Tokens
    entering: np.ndarray
    admitted: np.ndarray


def lengths_of(layout: PageLayout) -> np.ndarray:
    """Tokens of each tier of each head; a page of tier 1 counts as one of tier 0."""
    per_page = layout.tokens_per_page(0)
    wanted = [[round(min(pages * per_page, MAX_LEN / 2.5)) for pages in s.pages[: layout.tiers]] for s in SCENARIOS.values()]
    if layout.tiers == 2:
        wanted[list(SCENARIOS).index("full pages demoted, none free")] = [2 * per_page, layout.tokens_per_page(1)]
    return np.array(wanted, np.int32)


def build(case: Case, seed: int = 0) -> World:
    """Heads of all scenarios; dead lanes and pages hold rubbish, and the ring has exactly the pages that are needed, around its end."""
    rng, layout = np.random.default_rng(seed), case.layout()
    lengths = lengths_of(layout)
    pool = random_pool(layout, lengths, np.zeros(len(lengths), np.int32), max_len=MAX_LEN, slots=1, seed=seed)
    for head, row in enumerate(lengths):
        for tier, length in enumerate(row):
            at = slot_addresses(layout, pool.page_table[head], tier, int(length))
            pool.pages["position"][at] = rng.permutation(MAX_LEN)[:length]
            if layout.scored:  # tokens of no significance are ties
                pool.pages["significance"][at] = rng.uniform(0, 2, length) * (rng.random(length) > 0.1)
    rule, entering = draw_rule(rng, layout, pool, lengths)
    tokens = Tokens(
        *(rng.normal(size=(len(lengths), SLOTS, layout.head_dim)).astype(np.float32) for _ in range(2)),
        rng.uniform(0, 2, (len(lengths), SLOTS)).astype(np.float32),
        rng.integers(MAX_LEN, 2 * MAX_LEN, (len(lengths), SLOTS)).astype(np.int32),
    )
    admitted = np.array([s.admitted for s in SCENARIOS.values()])
    stored = Stored(pool.pages, None, pool.page_table, lengths)
    world = World(layout, stored, rule, tokens, entering, admitted)
    return world._replace(stored=with_ring(world, case.one_victim, rng))


def draw_rule(rng, layout: PageLayout, pool, lengths: np.ndarray) -> tuple[Rule, np.ndarray]:
    """Thresholds at the quantiles that the scenarios name, and codes of the new tokens."""
    heads = len(lengths)
    observed = np.stack([rng.integers(300, 900, (heads, 2)), rng.integers(5, 400, (heads, 2))], axis=-1).astype(np.int32)
    tau, entering = np.zeros((heads, 2), np.float32), np.zeros((heads, NEW), np.int32)
    for head, scenario in enumerate(SCENARIOS.values()):
        mean = mean_of(*sides(layout, pool.pages, pool.page_table[head], 0, lengths[head, 0]), observed[head])
        for i, share in enumerate((scenario.high, scenario.low)):
            inside = np.quantile(mean, share, method="lower") if 0 <= share <= 1 and len(mean) else 0.01  # a token's own: it stays
            tau[head, i] = INFINITE if share > 1 else -INFINITE if share < 0 else inside
        odds = [1 - sum(scenario.enters[: layout.tiers]), *scenario.enters[: layout.tiers]]
        entering[head] = rng.choice(len(odds), NEW, p=odds)
    joined = np.stack([(entering == tier + 1).any(axis=-1) for tier in range(layout.tiers)], axis=-1)
    return Rule(tau, observed, np.array([s.stirred for s in SCENARIOS.values()]), joined), entering


def with_ring(world: World, one_victim: bool, rng) -> Stored:
    """The state with clean table columns and a ring of just enough free pages, in random order, that wraps around."""
    layout, stored = world.layout, world.stored
    per_page = [layout.tokens_per_page(tier) for tier in range(layout.tiers)]
    needed, table, used = 0, np.array(stored.page_table), []
    for head, lengths in enumerate(stored.tier_len):
        before = [-(-int(n) // size) for n, size in zip(lengths, per_page, strict=True)]
        after = [-(-len(tokens) // size) for tokens, size in zip(expected(world, head, one_victim), per_page, strict=True)]
        needed += max(sum(after) - sum(before), 0)
        used += [*table[head, : before[0]], *table[head, table.shape[1] - sum(before[1:]) :]]
        table[head, before[0] : table.shape[1] - sum(before[1:])] = -1
    rubbish = {"payload": 255, "meta": np.nan, "significance": np.nan, "position": 65535}
    num_pages = len(used) + needed
    places = rng.permutation(num_pages)[: len(used)]
    pages = {}
    for name, array in stored.pages.items():
        pages[name] = np.full((num_pages, *array.shape[1:]), rubbish[name], array.dtype)
        pages[name][places] = array[used]
    table = np.vectorize({**dict(zip(used, places, strict=True)), -1: num_pages}.__getitem__)(table).astype(np.int32)
    free = rng.permutation(sorted(set(range(num_pages)) - set(places.tolist())))
    ids, start = np.full(num_pages, 10**6, np.int32), num_pages - needed // 2
    ids[(start + np.arange(needed)) % num_pages] = free
    assert needed > 1  # the ring wraps around
    return stored._replace(pages=pages, page_table=table, ring=FreeRing(ids, np.int32(start % num_pages), np.int32(needed)))


# --- the rule, token by token ---


class Tensor(NamedTuple):
    """K or V of a token: its exact stored form, or what was quantised."""

    codes: np.ndarray | None = None
    scale: np.ndarray | None = None
    zero: np.ndarray | None = None
    exact: np.ndarray | None = None  # float32 [head_dim]


class Token(NamedTuple):
    position: int
    significance: np.float32
    k: Tensor
    v: Tensor


def sides(layout: PageLayout, pages, table_row: np.ndarray, tier: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    at = slot_addresses(layout, table_row, tier, int(length))
    return pages["significance"][at] if layout.scored else np.zeros(len(at[0]), np.float32), pages["position"][at].astype(np.int32)


def mean_of(total: np.ndarray, position: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """S / n in float32, n the queries of all spans (end, length) at or after the position."""
    queries = sum(np.clip(end - position, 0, length) for end, length in observed)
    return total.astype(np.float32) / np.maximum(queries, 1).astype(np.float32)


def read(layout: PageLayout, pages, table_row: np.ndarray, tier: int, length: int) -> list[Token]:
    """Tokens of a tier in slot order, in their stored form."""
    page, block, lane = slot_addresses(layout, table_row, tier, int(length))
    columns = []
    for name, first, rows in tensor_rows(layout, tier):
        columns.append(pages[name][page[:, None], first + block[:, None] * rows + np.arange(rows), lane[:, None]])
    total, position = sides(layout, pages, table_row, tier, length)
    fmt = layout.formats[tier]
    k, v = (tensors(codec, columns[i], columns[i + 2]) for i, codec in enumerate((fmt.key, fmt.value)))
    return [Token(int(p), s, *kv) for p, s, *kv in zip(position, total, k, v, strict=True)]


def tensors(codec, payload: np.ndarray, meta: np.ndarray) -> list[Tensor]:
    """`[n, rows]` and `[n, meta_rows]` as tokens."""
    if not hasattr(codec, "bits"):
        return [Tensor(exact=x) for x in decode_tensor(codec, payload.T, meta.T)]
    codes = unpack(payload.T, codec.bits).T
    return [Tensor(c, m[: codec.groups], m[codec.groups :]) for c, m in zip(codes, meta, strict=True)]


def requantised(source, target, tensor: Tensor) -> Tensor:
    """Demoted on the codes where the groups match, else from its values."""
    if not hasattr(source, "bits"):
        return tensor
    if source.groups == target.groups and target.bits <= source.bits:
        numbers = (tensor.codes, tensor.scale, tensor.zero)
        return Tensor(*(numbers if source.bits == target.bits else demote_nested(*numbers, source.bits, target.bits)))
    return Tensor(exact=dequantise(tensor.codes, tensor.scale, tensor.zero))


def expected(world: World, head: int, one_victim: bool) -> list[list[Token]]:
    """The tokens of each tier of a head after the event, in slot order."""
    layout, stored, rule = world.layout, world.stored, world.rule
    table_row, lengths = stored.page_table[head], stored.tier_len[head]
    tiers = [read(layout, stored.pages, table_row, tier, lengths[tier]) for tier in range(layout.tiers)]
    if not world.admitted[head]:
        return tiers
    if layout.scored and rule.stirred[head]:
        fallen = []
        for tier in reversed(range(layout.tiers)):
            tiers[tier], gone = remove(rule, head, tier, tiers[tier], layout.tiers, one_victim)
            fallen = [token for token, falls in gone if falls]
        if layout.tiers == 2:
            high, low = layout.formats
            tiers[1] += [t._replace(k=requantised(high.key, low.key, t.k), v=requantised(high.value, low.value, t.v)) for t in fallen]
    for i, code in enumerate(world.entering[head]):
        if code:
            k, v, significance, position = (np.asarray(x)[head, i] for x in world.tokens)
            score = significance if layout.scored else np.float32(0)
            tiers[code - 1].append(Token(int(position), score, Tensor(exact=k), Tensor(exact=v)))
    return tiers


def remove(rule: Rule, head: int, tier: int, tokens: list[Token], tiers: int, one_victim: bool) -> tuple[list, list]:
    """(tokens that stay, in slot order; (token, whether it falls) of those that leave, in the order in which the top is cleared)."""
    (high, low), observed = rule.tau[head], rule.observed[head]
    mean = mean_of(np.array([t.significance for t in tokens]), np.array([t.position for t in tokens], int), observed)
    falls = [bool(low <= m < high) and tier == 0 and tiers == 2 for m in mean]
    leaves = [bool(m < low) or falls[slot] for slot, m in enumerate(mean)]
    if one_victim:
        least = min(range(len(tokens)), key=lambda slot: (mean[slot], tokens[slot].position), default=None)
        leaves = [leaves[slot] and slot == least and rule.joined[head, tier] for slot in range(len(tokens))]
    slots, gone = list(tokens), []
    holes = iter([slot for slot in range(len(tokens)) if leaves[slot]])
    for _ in range(sum(leaves)):
        top = len(slots) - 1
        last = slots.pop()
        if leaves[top]:
            gone.append((last, falls[top]))
        else:
            hole = next(holes)
            gone.append((tokens[hole], falls[hole]))
            slots[hole] = last
    return slots, gone


# --- checks ---


def check_tensor(codec, want: Tensor, got: Tensor) -> None:
    """What was moved, or demoted on its codes, is the same to the bit. What was quantised from values has the nearest codes (to a
    thousandth of a step) for the exact scale and zero, which are stored to a unit in the last place of float16.
    """
    if want.codes is not None:
        for a, b in zip(want, got, strict=True):
            np.testing.assert_array_equal(a, b)
        return
    if not hasattr(codec, "bits"):
        np.testing.assert_array_equal(want.exact.astype(jnp.dtype(codec.dtype)).astype(np.float32), got.exact)
        return
    x = want.exact.astype(np.float64).reshape(codec.groups, -1)
    zero, span = x.min(axis=1), x.max(axis=1) - x.min(axis=1)
    steps = (x - zero[:, None]) / (span / (2**codec.bits - 1))[:, None]
    assert np.abs(got.codes.reshape(x.shape) - steps).max() <= 0.501
    for number, stored in ((span / (2**codec.bits - 1), got.scale), (zero, got.zero)):
        assert (np.abs(stored.astype(np.float64) - number) <= np.spacing(np.abs(stored)).astype(np.float64)).all()


def check(world: World, one_victim: bool, after: Stored) -> None:
    """Every head holds what the rule says, in its order; heads that are not admitted are untouched; the pool is consistent."""
    layout, before = world.layout, world.stored
    check_pool(layout, after.page_table, after.tier_len, after.ring)
    for head in range(len(before.tier_len)):
        for tier, want in enumerate(expected(world, head, one_victim)):
            assert after.tier_len[head, tier] == len(want), (head, tier)
            got = read(layout, after.pages, after.page_table[head], tier, len(want))
            assert [t.position for t in got] == [t.position for t in want], (head, tier)
            assert [t.significance for t in got] == [t.significance for t in want]
            for a, b in zip(want, got, strict=True):
                check_tensor(layout.formats[tier].key, a.k, b.k)
                check_tensor(layout.formats[tier].value, a.v, b.v)
        if not world.admitted[head]:
            np.testing.assert_array_equal(after.page_table[head], before.page_table[head])
            mine = [page for page in before.page_table[head] if page < len(before.ring.ids)]
            for name, array in before.pages.items():
                assert array[mine].tobytes() == after.pages[name][mine].tobytes()


@cache
def compiled(case: Case, kernels: Kernels):
    layout = case.layout()

    def event(stored: Stored, rule: Rule, tokens: Tokens, entering, admitted):
        how = dict(one_victim=case.one_victim, max_len=MAX_LEN, kernels=kernels)
        moves = count_moves(stored.pages, layout, stored.page_table, stored.tier_len, rule, **how)
        return moves, apply_event(stored, layout, rule, moves, tokens, entering, admitted, pages_a_round=1, **how)

    return jax.jit(event, compiler_options=QUICKLY if jax.default_backend() == "cpu" else None)


def run(case: Case, world: World, kernels: Kernels):
    """(moves, state after) in NumPy."""
    pages = Pages(**{name: jnp.asarray(array) for name, array in world.stored.pages.items()})
    arguments = jax.tree.map(jnp.asarray, (world.rule, world.tokens, world.entering, world.admitted))
    moves, after = compiled(case, kernels)(jax.tree.map(jnp.asarray, world.stored._replace(pages=pages)), *arguments)
    arrays = {name: np.asarray(getattr(after.pages, name)) for name in world.stored.pages}
    return jax.tree.map(np.asarray, moves), jax.tree.map(np.asarray, after._replace(pages=arrays))


@cache
def world_and_reference(case: Case) -> tuple[World, Any, Stored]:
    world = build(case)
    return (world, *run(case, world, Kernels("xla")))


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
def test_an_event(case: Case, kernels: Kernels):
    world, moves, reference = world_and_reference(case)
    counted, after = run(case, world, kernels)
    jax.tree.map(np.testing.assert_array_equal, counted, moves)
    check(world, case.one_victim, after)
    np.testing.assert_array_equal(after.tier_len, reference.tier_len)
    layout, codes = world.layout, []
    for head, lengths in enumerate(after.tier_len):
        for tier, length in enumerate(lengths):
            both = (read(layout, s.pages, s.page_table[head], tier, length) for s in (after, reference))
            for mine, theirs in zip(*both, strict=True):
                assert mine[:2] == theirs[:2]
                for a, b in zip(mine[2:], theirs[2:], strict=True):
                    codes += [np.abs(a.codes.astype(int) - b.codes)] if a.codes is not None else [a.exact != b.exact]
    codes = np.concatenate(codes)
    assert codes.max() <= 1 and codes.mean() < 1e-4  # a code at a tie may fall to the other side
    assert int(after.ring.count) == int(reference.ring.count)


def test_the_scenarios_do_what_they_say():
    world, moves, after = world_and_reference(PLAIN)
    names = list(SCENARIOS)
    dropped, demoted = dict(zip(names, moves.dropped, strict=True)), dict(zip(names, moves.demoted, strict=True))
    lengths = dict(zip(names, world.stored.tier_len, strict=True))
    assert (dropped["all dropped"] == lengths["all dropped"]).all() and demoted["all demoted"] == lengths["all demoted"][0] > 96
    assert demoted["mixed"] > 5 < dropped["mixed"].min() and (moves.victim == -1).all()
    assert not dropped["nothing leaves"].any() and not dropped["not stirred"].any() and not demoted["nothing leaves"]
    assert int(world.stored.ring.start) + int(world.stored.ring.count) > len(world.stored.ring.ids)
    assert after.tier_len.sum() > 300
    _, moves, _ = world_and_reference(CASES[1])
    assert moves.victim.max() > 32 and (moves.victim == -1).any() and moves.demoted.sum() > 0 < moves.dropped.sum()


MISTAKES = {
    "another threshold": lambda w: w._replace(rule=w.rule._replace(tau=w.rule.tau * np.float32(1.01))),
    "not strict": lambda w: w._replace(rule=w.rule._replace(tau=np.nextafter(w.rule.tau, INFINITE))),
    "a query more": lambda w: w._replace(rule=w.rule._replace(observed=w.rule.observed + 1)),
    "all stirred": lambda w: w._replace(rule=w.rule._replace(stirred=w.rule.stirred | True)),
    "all admitted": lambda w: w._replace(admitted=w.admitted | True),
    "an entering token less": lambda w: w._replace(entering=np.where(np.arange(NEW) == 20, 0, w.entering)),
}


@pytest.mark.parametrize("mistake", [*MISTAKES, "victims in another order", "a bit of a payload", "a scale", "a page lost"])
def test_the_check_sees_mistakes(mistake: str):
    world, _, after = world_and_reference(PLAIN)
    check(world, False, after)
    if mistake in MISTAKES:
        world = MISTAKES[mistake](world)
    else:
        after = spoil(world.layout, after, mistake)
    with pytest.raises(AssertionError):
        check(world, False, after)


def spoil(layout: PageLayout, after: Stored, mistake: str) -> Stored:
    """The state with one thing wrong."""
    head = list(SCENARIOS).index("all demoted")
    pages = {name: array.copy() for name, array in after.pages.items()}
    page, block, lane = slot_addresses(layout, after.page_table[head], 1, 40)
    if mistake == "a page lost":
        return after._replace(ring=FreeRing(after.ring.ids, after.ring.start, after.ring.count - 1))
    if mistake == "a scale":
        pages["meta"][page[0], 0, lane[0]] *= np.float16(1.01)
    elif mistake == "a bit of a payload":
        pages["payload"][page[0], 3, lane[0]] ^= 16
    else:
        two = np.array([30, 31])
        for name in ("significance", "position"):
            pages[name][page[two], block[two], lane[two]] = pages[name][page[two[::-1]], block[two[::-1]], lane[two[::-1]]]
    return after._replace(pages=pages)
