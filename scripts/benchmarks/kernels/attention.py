"""Time of decode attention: compressed tiers against a bfloat16 cache in the same pages and kernel,
and against the card's bandwidth.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.common.report import Row, Section
from benchmarks.common.states import (
    COMPRESSED,
    PLAIN,
    Setting,
    attended_bytes,
    layer_heads,
    layer_tables,
    pages_of,
    random_pages,
)
from benchmarks.common.timing import Effort, Looped, Runner, Timing, copy_bandwidth, interleaved
from diffkv_jax.pallas_kernels.decode_attention import Heads, decode_attention
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout, Pages

# of a context; the rest dropped
MIXES = {
    "all high": (1.0, 0.0),
    "half high, half low": (0.5, 0.5),
    "13 % high, 49 % low": (0.13, 0.49),
}
BASELINE = "bfloat16"
COLUMNS = {
    "batch": "d",
    "context": "d",
    "tiers": "",
    "us": ".1f",
    "spread": ".1%",
    "MB": ".1f",
    "GB/s": ".0f",
    "of copy": ".1%",
    "speed-up": ".2f",
    "bytes ratio": ".2f",
}


def section(seconds: float) -> Section:
    """The table of decode attention."""
    notes = [
        "One call of decode_attention on one layer; a loop on the device goes round several "
        "layers, so that no cache holds them.",
        "MB: payload, metadata, significance (read and written) and live recent tokens that must "
        "move; of copy: of the bandwidth above.",
        "speed-up: time of the bfloat16 row of the same shape over this one; bytes ratio: what it "
        "would be if only bytes counted.",
    ]
    return Section(
        "Decode attention (Triton), K8V4 and K4V2 with significance against bfloat16 without",
        COLUMNS,
        seconds,
        notes=notes,
    )


def bandwidth_section(seconds: float) -> Section:
    """The table of the card's copy bandwidth."""
    return Section(
        "Copy from device memory to device memory",
        {"GiB": ".2f", "us": ".0f", "spread": ".1%", "GB/s": ".0f"},
        seconds,
    )


def measure_bandwidth(table: Section, nbytes: int, effort: Effort) -> float:
    """Bytes a second, read and written counted; 0 when it could not be measured."""

    def measured() -> Row:
        timing = copy_bandwidth(nbytes, effort)
        return {
            "us": timing.median * 1e6,
            "spread": timing.spread,
            "GB/s": 2e-9 * nbytes / timing.median,
        }

    return table.rows[-1]["GB/s"] * 1e9 if table.measure({"GiB": nbytes / 2**30}, measured) else 0.0


def measure(
    table: Section,
    setting: Setting,
    shapes: Sequence[tuple[int, int]],
    bandwidth: float,
    effort: Effort,
) -> None:
    """One row a mix and shape `(batch, context)`."""
    for batch, context in shapes:
        table.measure(
            {"batch": batch, "context": context},
            lambda b=batch, c=context: shape_rows(setting, b, c, bandwidth, effort),
        )


def shape_rows(
    setting: Setting, batch: int, context: int, bandwidth: float, effort: Effort
) -> list[Row]:
    """Baseline and mixes of one shape, timed in turns."""
    heads, max_len = batch * setting.kv_heads, context + 2 * setting.slots
    plain, packed = setting.layout(PLAIN, max_len), setting.layout(COMPRESSED, max_len)
    mixes = {
        name: tuple(int(context * share) for share in shares) for name, shares in MIXES.items()
    }
    moved = {BASELINE: attended_bytes(setting, plain, (context,), heads)}
    moved |= {
        name: attended_bytes(setting, packed, lengths, heads) for name, lengths in mixes.items()
    }
    layers = setting.layers(min(moved.values()))
    check_memory(
        heads
        * layers
        * (
            pages_of(plain, (context,)) * plain.page_bytes
            + 3 * pages_of(packed, (context, 0)) * packed.page_bytes
        )
    )
    runners = {
        BASELINE: attention_runner(
            setting, setting.kernels, plain, [(context,)], heads, layers, max_len, effort
        )[0]
    }
    compressed = attention_runner(
        setting, setting.kernels, packed, list(mixes.values()), heads, layers, max_len, effort
    )
    runners |= dict(zip(mixes, compressed, strict=True))
    times = interleaved(runners, effort)
    return [
        {
            "tiers": name,
            **_row(times[name], times[BASELINE], moved[name], moved[BASELINE], bandwidth),
        }
        for name in runners
    ]


def _row(
    timing: Timing, baseline: Timing, moved: int, moved_baseline: int, bandwidth: float
) -> Row:
    rate = moved / timing.median
    return {
        "us": timing.median * 1e6,
        "spread": timing.spread,
        "MB": moved / 1e6,
        "GB/s": rate / 1e9,
        "of copy": rate / bandwidth if bandwidth else None,
        "speed-up": baseline.median / timing.median,
        "bytes ratio": moved_baseline / moved,
    }


def attention_runner(
    setting: Setting,
    kernels: Kernels,
    layout: PageLayout,
    mixes: Sequence[Sequence[int]],
    heads: int,
    layers: int,
    max_len: int,
    effort,
) -> list[Runner]:
    """A runner a mix; all share one compiled loop, for only the lengths and tables differ."""
    num_pages = layers * heads * max(pages_of(layout, lengths) for lengths in mixes)

    def step(
        state: tuple[Array, list], q: Array, pages: Pages, per_layer: list[Heads]
    ) -> tuple[Array, list]:
        significance, kept = state[0], []
        for each in per_layer:
            pool = dataclasses.replace(pages, significance=significance)
            out, significance, recent = decode_attention(
                q,
                pool,
                layout,
                each,
                max_len=max_len,
                sm_scale=setting.head_dim**-0.5,
                kernels=kernels,
            )
            kept.append((out, recent) if layout.scored else (out,))
        return significance, kept

    looped = Looped(step, effort.repeats, layers)
    q = setting.queries(heads, setting.group)
    runners = []
    for seed, lengths in enumerate(mixes):
        pages = random_pages(layout, num_pages, max_len, seed=seed)
        tables, _ = layer_tables(layout, lengths, heads, layers, num_pages, max_len)
        shapes = (q.shape, (heads, setting.slots)) if layout.scored else (q.shape,)
        state = (
            pages.significance,
            [tuple(jnp.zeros(shape, jnp.float32) for shape in shapes) for _ in range(layers)],
        )
        rest = dataclasses.replace(
            pages, significance=jnp.zeros((1, *pages.significance.shape[1:]), jnp.float32)
        )
        runners.append(looped.on(state, q, rest, layer_heads(setting, layout, tables, lengths)))
    return runners


def check_memory(nbytes: int, reserve: float = 0.15) -> None:
    """Refuse what the device cannot hold, with some room to spare.

    Raises:
        MemoryError: how much is needed and there.
    """
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit and nbytes > (1 - reserve) * limit:
        raise MemoryError(
            f"needs {nbytes / 2**30:.1f} GiB and some room, the device gives "
            f"{limit / 2**30:.1f} GiB"
        )
