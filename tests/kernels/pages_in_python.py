"""Tokens and pages as plain Python lists, beside the operations on a cache that they follow."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from diffkv_jax.pallas_kernels.apply_event import (
    FreeRing,
    Stored,
    Tokens,
    append_tokens,
    release_all,
    remove_tokens,
)
from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.pallas_kernels.pages import PageLayout, Pages
from diffkv_jax.testing.quantiser import demote_nested, dequantise, quantise
from diffkv_jax.testing.readback import check_pool, read_tier

HEADS, HEAD_DIM, MAX_LEN, NEW, NUM_PAGES = 3, 16, 40, 9, 21


class Operations:
    """A layout and one compiled function that does every operation; masks without a true element do
    nothing.
    """

    def __init__(self, *formats: str, scored: bool = True):
        self.layout = PageLayout.solve(
            tuple(map(KVFormat.parse, formats)), HEAD_DIM, tokens=4, max_len=MAX_LEN, scored=scored
        )
        self.tiers = range(self.layout.tiers)
        self.capacity = [
            self.layout.pages_for(t, MAX_LEN) * self.layout.tokens_per_page(t) for t in self.tiers
        ]
        self.max_pages = self.layout.pages_for(0, MAX_LEN) + self.layout.tiers
        self.run = jax.jit(self._run)

    def _run(self, stored: Stored, tokens: Tokens, keep, victims, demoted, gone) -> Stored:
        stored = release_all(stored, self.layout, gone)
        for tier in reversed(self.tiers):
            stored = remove_tokens(
                stored,
                self.layout,
                tier,
                victims[tier],
                demoted if tier == 0 and len(self.tiers) == 2 else None,
            )
        for tier in self.tiers:
            stored = append_tokens(stored, self.layout, tier, tokens, keep[tier])
        return stored

    def empty(self) -> Stored:
        table = jnp.full((HEADS, self.max_pages), NUM_PAGES, jnp.int32)
        return Stored(
            Pages.zeros(self.layout, NUM_PAGES),
            FreeRing.full(NUM_PAGES),
            table,
            jnp.zeros((HEADS, len(self.tiers)), jnp.int32),
        )

    def nothing(self) -> dict:
        """Arguments of `run` that change nothing."""
        shape = (HEADS, NEW, HEAD_DIM)
        tokens = Tokens(
            np.zeros(shape, np.float32),
            np.zeros(shape, np.float32),
            np.zeros(shape[:2], np.float32),
            np.zeros(shape[:2], np.int32),
        )
        keep = [np.zeros((HEADS, NEW), bool) for _ in self.tiers]
        victims = [np.zeros((HEADS, n), bool) for n in self.capacity]
        return dict(
            tokens=tokens,
            keep=keep,
            victims=victims,
            demoted=victims[0].copy(),
            gone=np.zeros(HEADS, bool),
        )


@cache
def operations(*formats: str, scored: bool = True) -> Operations:
    return Operations(*formats, scored=scored)


def on_grid(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Values whose scale is a power of two and whose codes hold both extremes: quantising them to
    `bits` loses nothing.
    """
    codes = rng.integers(0, 2**bits, (*shape, HEAD_DIM))
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1
    return (
        rng.choice([0.25, 1.0, 2.0], (*shape, 1)) * codes + rng.integers(-8, 8, (*shape, 1))
    ).astype(np.float32)


class Encoded:
    """K or V of one token as the oracle stores it, at one of a tier's precisions."""

    def __init__(self, x: np.ndarray, codec):
        self.bits, self.parts = codec.bits, quantise(x, codec.bits, codec.groups)

    def demoted(self, codec) -> "Encoded":
        lower = object.__new__(Encoded)
        lower.bits = codec.bits
        lower.parts = (
            self.parts
            if codec.bits == self.bits
            else demote_nested(*self.parts, self.bits, codec.bits)
        )
        return lower

    @property
    def read(self) -> bytes:
        return dequantise(*self.parts).tobytes()


class Model:
    """head -> tier -> list of (position, significance, K, V)."""

    def __init__(self, ops: Operations):
        self.ops, self.formats = ops, ops.layout.formats
        self.held = [[[] for _ in ops.tiers] for _ in range(HEADS)]
        self.born = 0

    def pages(self, head: int) -> int:
        return sum(
            -(-len(tokens) // self.ops.layout.tokens_per_page(tier))
            for tier, tokens in enumerate(self.held[head])
        )

    def free(self) -> int:
        return NUM_PAGES - sum(map(self.pages, range(HEADS)))

    def append(self, tier: int, args: dict, rng: np.random.Generator, density: float) -> None:
        """Draw new tokens and keep those for which there is room in the head and in the pool."""
        shape, fmt = (HEADS, NEW), self.formats[tier]
        position = self.born + np.arange(HEADS * NEW, dtype=np.int32).reshape(shape)
        self.born += HEADS * NEW
        k, v = on_grid(rng, shape, 8), on_grid(rng, shape, 4)
        args["tokens"] = tokens = Tokens(k, v, rng.random(shape, np.float32), position)
        for head, i in np.argwhere(rng.random(shape) < density):
            before, mine = self.pages(head), self.held[head]
            mine[tier].append(
                (
                    int(position[head, i]),
                    float(tokens.significance[head, i]),
                    Encoded(k[head, i], fmt.key),
                    Encoded(v[head, i], fmt.value),
                )
            )
            if self.free() < 0 or sum(map(len, mine)) > MAX_LEN:
                mine[tier].pop()
                assert self.pages(head) == before
            else:
                args["keep"][tier][head, i] = True

    def remove(
        self,
        tier: int,
        args: dict,
        slots: list[np.ndarray],
        rng: np.random.Generator,
        density: float,
        falling: float,
    ) -> None:
        """Choose victims by slot; `slots[head]` holds the positions in slot order."""
        after = [[list(tokens) for tokens in mine] for mine in self.held]
        victims, demoted = np.zeros_like(args["victims"][tier]), np.zeros_like(args["demoted"])
        for head in range(HEADS):
            for slot in np.flatnonzero(rng.random(len(slots[head])) < density):
                victims[head, slot] = True
                (token,) = (t for t in after[head][tier] if t[0] == slots[head][slot])
                after[head][tier].remove(token)
                if rng.random() < falling:
                    demoted[head, slot] = True
                    k, v = (
                        e.demoted(codec)
                        for e, codec in zip(
                            token[2:], (self.formats[1].key, self.formats[1].value), strict=True
                        )
                    )
                    after[head][1].append((*token[:2], k, v))
        before, old = [self.pages(head) for head in range(HEADS)], self.held
        self.held = after
        if sum(max(self.pages(head) - before[head], 0) for head in range(HEADS)) > NUM_PAGES - sum(
            before
        ):
            self.held = old  # the caller makes sure of the pages: such an event is not carried out
        else:
            args["victims"][tier], args["demoted"] = (
                victims,
                demoted if falling else args["demoted"],
            )

    def check(self, stored: Stored) -> list[list[np.ndarray]]:
        """The cache holds what the model holds; returns the positions in slot order, per head and
        tier.
        """
        stored = jax.device_get(stored)
        layout = self.ops.layout
        check_pool(layout, stored.page_table, stored.tier_len, stored.ring)
        slots = []
        for head, mine in enumerate(self.held):
            assert stored.tier_len[head].tolist() == [len(tokens) for tokens in mine]
            slots.append([])
            for tier, tokens in enumerate(mine):
                read = read_tier(stored.pages, layout, stored.page_table[head], tier, len(tokens))
                got = sorted(
                    zip(
                        read.position.tolist(),
                        read.significance.tolist(),
                        map(bytes, read.k),
                        map(bytes, read.v),
                        strict=True,
                    )
                )
                assert got == sorted(
                    (p, s if layout.scored else 0.0, k.read, v.read) for p, s, k, v in tokens
                )
                slots[head].append(read.position)
        return slots


def play(ops: Operations, sequence) -> tuple[Model, Stored]:
    """Carry out a sequence of (kind, density, seed) on the cache and on the model, and compare
    after each.
    """
    model, stored = Model(ops), ops.empty()
    slots = model.check(stored)
    for kind, density, seed in sequence:
        rng, args = np.random.default_rng(seed), ops.nothing()
        last = len(ops.tiers) - 1
        if kind == "release":
            args["gone"] = rng.random(HEADS) < density
            model.held = [
                [[] for _ in ops.tiers] if gone else mine
                for mine, gone in zip(model.held, args["gone"], strict=True)
            ]
        elif kind in ("high", "low"):
            model.append(0 if kind == "high" else last, args, rng, density)
        else:
            tier = last if kind == "drop low" else 0
            falling = {"drop high": 0.0, "drop low": 0.0, "demote": 1.0, "demote or drop": 0.6}[
                kind
            ] * (last == 1)
            model.remove(tier, args, [mine[tier] for mine in slots], rng, density, falling)
        stored = ops.run(stored, **args)
        slots = model.check(stored)
    return model, stored
