"""What a compression event does, token by token in plain NumPy: a transcription of api.py's rule
over the tokens read back.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffkv_jax.pallas_kernels.apply_event import Tokens
from diffkv_jax.pallas_kernels.pages import PageLayout
from diffkv_jax.pallas_kernels.plan_event import Rule
from diffkv_jax.testing.normal_levels import dequantise_normal, rounded_levels
from diffkv_jax.testing.quantiser import demote_nested, dequantise, unpack
from diffkv_jax.testing.readback import decode_tensor, slot_addresses, tensor_rows


class World(NamedTuple):
    """Everything an event is given, in NumPy."""

    layout: PageLayout
    stored: Any  # a `Stored` whose pages are {name: array}
    rule: Rule
    tokens: Tokens
    entering: np.ndarray
    admitted: np.ndarray


class Tensor(NamedTuple):
    """K or V of a token: its exact stored form, or what was quantised."""

    codes: np.ndarray | None = None
    scale: np.ndarray | None = None
    zero: np.ndarray | None = None  # also of levels of the normal distribution
    exact: np.ndarray | None = None  # float32 [head_dim]


class Token(NamedTuple):
    position: int
    significance: np.float32
    k: Tensor
    v: Tensor


def sides(
    layout: PageLayout, pages, table_row: np.ndarray, tier: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    at = slot_addresses(layout, table_row, tier, int(length))
    return pages["significance"][at] if layout.scored else np.zeros(len(at[0]), np.float32), pages[
        "position"
    ][at].astype(np.int32)


def mean_of(total: np.ndarray, position: np.ndarray, query_spans: np.ndarray) -> np.ndarray:
    """S / n in float32, n the queries of all spans (end, length) at or after the position."""
    queries = sum(np.clip(end - position, 0, length) for end, length in query_spans)
    return total.astype(np.float32) / np.maximum(queries, 1).astype(np.float32)


def read(layout: PageLayout, pages, table_row: np.ndarray, tier: int, length: int) -> list[Token]:
    """Tokens of a tier in slot order, in their stored form."""
    page, block, lane = slot_addresses(layout, table_row, tier, int(length))
    columns = []
    for name, first, rows in tensor_rows(layout, tier):
        columns.append(
            pages[name][
                page[:, None], first + block[:, None] * rows + np.arange(rows), lane[:, None]
            ]
        )
    total, position = sides(layout, pages, table_row, tier, length)
    fmt = layout.formats[tier]
    k, v = (
        tensors(codec, columns[i], columns[i + 2]) for i, codec in enumerate((fmt.key, fmt.value))
    )
    return [Token(int(p), s, *kv) for p, s, *kv in zip(position, total, k, v, strict=True)]


def tensors(codec, payload: np.ndarray, meta: np.ndarray) -> list[Tensor]:
    """`[n, rows]` and `[n, meta_rows]` as tokens."""
    if not hasattr(codec, "bits"):
        return [Tensor(exact=x) for x in decode_tensor(codec, payload.T, meta.T)]
    codes = unpack(payload.T, codec.bits).T
    if not hasattr(codec, "groups"):
        return [Tensor(c, m) for c, m in zip(codes, meta, strict=True)]
    return [
        Tensor(c, m[: codec.groups], m[codec.groups :]) for c, m in zip(codes, meta, strict=True)
    ]


def requantised(source, target, tensor: Tensor) -> Tensor:
    """Demoted on the codes where the groups match, else from its values."""
    if not hasattr(source, "bits"):
        return tensor
    if not hasattr(source, "groups"):
        return Tensor(exact=dequantise_normal(tensor.codes, tensor.scale, source.bits))
    if source.groups == getattr(target, "groups", None) and target.bits <= source.bits:
        numbers = (tensor.codes, tensor.scale, tensor.zero)
        return Tensor(
            *(
                numbers
                if source.bits == target.bits
                else demote_nested(*numbers, source.bits, target.bits)
            )
        )
    return Tensor(exact=dequantise(tensor.codes, tensor.scale, tensor.zero))


def expected(world: World, head: int, one_victim: bool) -> list[list[Token]]:
    """The tokens of each tier of a head after the event, in slot order."""
    layout, stored, rule = world.layout, world.stored, world.rule
    table_row, lengths = stored.page_table[head], stored.tier_len[head]
    tiers = [
        read(layout, stored.pages, table_row, tier, lengths[tier]) for tier in range(layout.tiers)
    ]
    if not world.admitted[head]:
        return tiers
    if layout.scored and rule.has_new_tokens[head]:
        fallen = []
        for tier in reversed(range(layout.tiers)):
            tiers[tier], gone = remove(rule, head, tier, tiers[tier], layout.tiers, one_victim)
            fallen = [token for token, falls in gone if falls]
        if layout.tiers == 2:
            high, low = layout.formats
            tiers[1] += [
                t._replace(
                    k=requantised(high.key, low.key, t.k), v=requantised(high.value, low.value, t.v)
                )
                for t in fallen
            ]
    for i, code in enumerate(world.entering[head]):
        if code:
            k, v, significance, position = (np.asarray(x)[head, i] for x in world.tokens)
            score = significance if layout.scored else np.float32(0)
            tiers[code - 1].append(Token(int(position), score, Tensor(exact=k), Tensor(exact=v)))
    return tiers


def remove(
    rule: Rule, head: int, tier: int, tokens: list[Token], tiers: int, one_victim: bool
) -> tuple[list, list]:
    """(tokens that stay, in slot order; (token, whether it falls) of those that leave, in the order
    in which the top is cleared).
    """
    (high, low), query_spans = rule.tau[head], rule.query_spans[head]
    mean = mean_of(
        np.array([t.significance for t in tokens]),
        np.array([t.position for t in tokens], int),
        query_spans,
    )
    falls = [bool(low <= m < high) and tier == 0 and tiers == 2 for m in mean]
    leaves = [bool(m < low) or falls[slot] for slot, m in enumerate(mean)]
    if one_victim:
        least = min(
            range(len(tokens)), key=lambda slot: (mean[slot], tokens[slot].position), default=None
        )
        leaves = [
            leaves[slot] and slot == least and rule.receives[head, tier]
            for slot in range(len(tokens))
        ]
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


def check_tensor(codec, want: Tensor, got: Tensor) -> None:
    """What was moved, or demoted on its codes, is the same to the bit. What was quantised from
    values has the nearest codes (to a thousandth of a step) for the exact scale and zero, which are
    stored to a unit in the last place of float16.
    """
    if want.codes is not None:
        for a, b in zip(want, got, strict=True):
            np.testing.assert_array_equal(a, b)
        return
    if not hasattr(codec, "bits"):
        np.testing.assert_array_equal(
            want.exact.astype(jnp.dtype(codec.dtype)).astype(np.float32), got.exact
        )
        return
    if not hasattr(codec, "groups"):
        return check_levels(codec.bits, want.exact.astype(np.float64), got)
    x = want.exact.astype(np.float64).reshape(codec.groups, -1)
    zero, span = x.min(axis=1), x.max(axis=1) - x.min(axis=1)
    steps = (x - zero[:, None]) / (span / (2**codec.bits - 1))[:, None]
    assert np.abs(got.codes.reshape(x.shape) - steps).max() <= 0.501
    for number, stored in ((span / (2**codec.bits - 1), got.scale), (zero, got.zero)):
        assert (
            np.abs(stored.astype(np.float64) - number)
            <= np.spacing(np.abs(stored)).astype(np.float64)
        ).all()


def check_levels(bits: int, x: np.ndarray, got: Tensor) -> None:
    """The same of levels of the normal distribution: no other level is nearer by a thousandth of
    the token's size; the norm is kept.
    """
    size = np.linalg.norm(x) / np.sqrt(len(x))
    chosen = dequantise_normal(got.codes, np.ones(1), bits)
    levels = np.concatenate([rounded_levels(bits), -rounded_levels(bits)])
    assert (
        np.abs(chosen - x / size) <= np.abs(levels[:, None] - x / size).min(axis=0) + 1e-3
    ).all()
    scale = np.linalg.norm(x) / np.linalg.norm(chosen)
    assert np.abs(got.scale.astype(np.float64) - scale) <= np.spacing(got.scale).astype(np.float64)
