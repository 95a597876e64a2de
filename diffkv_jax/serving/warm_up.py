"""Every program that requests may need, compiled before the first of them comes."""

import jax
import jax.numpy as jnp
import numpy as np

from diffkv_jax.batching import MIN_CHUNK
from diffkv_jax.serving import programs
from diffkv_jax.serving.parking import PAGES, fetched, returned, taken
from diffkv_jax.serving.reading import Part, Reading
from diffkv_jax.serving.rows import picked, placed, several
from diffkv_jax.serving.slots import Slots


def warm_up(slots: Slots, prefill_chunk: int, readings: int) -> None:
    """Call each program with nothing to do, on slots that are empty; not those of passes that go
    over a prompt again, which are as long as the prompt.
    """
    _read(slots, prefill_chunk, readings)
    widths = _powers(1, slots.most)
    for width in widths:
        _decode(slots, width)
    for width in widths:
        rows = several((slots.blank(),) * width)
        for smaller in [w for w in widths if w < width]:
            picked(rows, np.arange(smaller, dtype=np.int32))
    _park(slots)


def _powers(least: int, most: int) -> list[int]:
    """Powers of two from `least` on, and `most`."""
    found = [least]
    while found[-1] < most:
        found.append(min(2 * found[-1], most))
    return found


def _read(slots: Slots, prefill_chunk: int, readings: int) -> None:
    none = np.zeros(1, np.int32)
    for size in _powers(MIN_CHUNK, prefill_chunk):
        for count in _powers(1, 1 << (readings.bit_length() - 1)):
            if count > 1 and count * size > prefill_chunk:
                continue
            part = Part("chunk", np.zeros((1, size), np.int32), none)
            slots.read([Reading(None, slots.blank(), [part]) for _ in range(count)])  # pyright: ignore[reportArgumentType]
    logits = jnp.zeros((1, slots.model.attention.vocab_size), jnp.float32)
    programs.first_token(logits, slots.blank(), slots.asked([None]))
    _release(slots, 1)


def _decode(slots: Slots, width: int) -> None:
    nobody = np.zeros(width, bool)
    rows = several((slots.blank(),) * width)
    if width < slots.most:
        more = min(width, slots.most - width)
        several((rows, *[slots.blank()] * more))
    rows = placed(rows, slots.blank(), jnp.int32(0))
    picked(rows, np.zeros(1, np.int32))
    _, slots.pool, rows = programs.decode(
        *(slots.model, slots.params, slots.fixed, slots.pool, rows),
        *(nobody, slots.asked([None] * width), np.int32(1), np.bool_(False)),
        programs.WIDTH,
    )
    _, slots.pool, rows = programs.retry(slots.fixed, slots.pool, rows, nobody)
    _release(slots, width)


def _release(slots: Slots, width: int) -> None:
    rows = several((slots.blank(),) * width)
    given = slots.fixed, slots.pool, rows, np.zeros(width, bool)
    _, slots.pool, _ = programs.release(*given)


def _park(slots: Slots) -> None:
    pool, row = slots.pool, slots.blank()
    jax.tree.map(jnp.asarray, jax.device_get(row))  # a copy is a program too
    if row.page_table is None:
        return
    none = np.full(PAGES, pool.pages.num_pages, np.int32)
    pages = returned(pool.pages, none, fetched(pool.pages, none))
    _, ring = taken(pool.ring, jnp.int32(0), row.page_table.size)
    slots.pool = pool._replace(pages=pages, ring=ring)
