"""What a program of the TPU kernel of the compression event has: its operands, and one head."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ..plan_event.mosaic_tpu import Thresholds, TokenData, scan_pages, slots
from .mosaic_tpu_columns import Columns
from .mosaic_tpu_pages import Plan, Pool, Scratch, Tier


class Inputs(NamedTuple):
    """Blocks of one head, W entering tokens of one tile, and the pool."""

    numbers: Any  # int32 [1, n] in SMEM, as `Plan.numbers` says
    upcoming: Any  # the same of the next head
    tau: Any  # float32 [1, 2] in SMEM
    k: Any  # [W, d]
    v: Any
    token_data: Any  # int32 [3, W]: tier code, bits of the significance, position
    table: Any  # int32 [B, 1, max_pages] in HBM
    pool: Pool


class Outputs(NamedTuple):
    """Changed in place, but `surplus`: int32 `[B, 1, max_pages]` in HBM, pages given back."""

    surplus: Any
    table: Any
    pool: Pool


class Head:
    """The head at hand: its scalars, its tiers."""

    def __init__(self, plan: Plan, x: Inputs, out: Outputs, s: Scratch):
        self.index = pl.program_id(0)
        self.row = lax.rem(self.index, 2)
        self.plan, self.layout, self.x, self.s, self.pool = plan, plan.layout, x, s, out.pool
        self.tiers = [Tier(plan, out.pool, s, tier, self.row) for tier in range(plan.layout.tiers)]
        query_spans = self.plan.numbers["query_spans"]
        spans = [(x.numbers[0, i], x.numbers[0, i + 1]) for i in query_spans[::2]]
        self.rule = Thresholds(x.tau[0, 0], x.tau[0, 1], spans)

    def number(self, name: str, index: int = 0, *, upcoming: bool = False):
        """A scalar of the head, or of the next one."""
        return (self.x.upcoming if upcoming else self.x.numbers)[0, self.plan.numbers[name][index]]

    def leaving(self, tier: int, columns: Array, slot: Array) -> tuple[Array, Array]:
        """Tokens of a block that leave a tier, and those that fall to the next: int32 `[1, T]`."""
        if self.plan.one_victim:
            leaves = jnp.where(slot == self.number("victim", tier), 1, 0)
            return leaves, leaves * self.number("demoted") if tier == 0 else jnp.zeros_like(leaves)
        at = Columns.of(self.layout, tier)
        significance = lax.bitcast_convert_type(
            columns[at.significance : at.significance + 1], jnp.float32
        )
        mean = self.rule.mean(significance, columns[at.position : at.position + 1])
        dropped, falls = self.rule.leaving(mean, tier, self.layout.tiers)
        return jnp.where(dropped | falls, 1, 0), jnp.where(falls, 1, 0)

    def find_holes(self, tier: int, stop) -> Array:
        """List in `holed` a tier's pages with victims in slots before `stop`; returns how many."""
        if self.plan.one_victim:
            victim = self.number("victim", tier)
            self.s.holed[0] = jnp.maximum(victim, 0) // self.layout.tokens_per_page(tier)
            return jnp.where((victim >= 0) & (victim < stop), 1, 0)

        def visit(first, total, position, found):
            slot, own = slots(self.layout, tier, first, total.shape)
            dropped, falls = self.rule.leaving(
                self.rule.mean(total, position), tier, self.layout.tiers
            )
            victim = jnp.where((dropped | falls) & own & (slot < stop), 1, 0)
            for i in range(self.plan.scan.pages):
                some = jnp.sum(victim[i]) > 0

                @pl.when(some)
                def _(i=i, found=found):
                    self.s.holed[found] = first + i

                found = found + jnp.where(some, 1, 0)
            return found

        token_data = TokenData(self.pool.significance, self.pool.position, *self.s.token_data)
        pages = self.layout.pages_for(tier, stop)
        return scan_pages(
            token_data, self.plan.scan, pages, self.tiers[tier].page_id, visit, jnp.int32(0)
        )
