"""Decode attention of one layer on a CPU: DiffKV's tiers against dense caches and against the
machine's read bandwidth.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.common.states import COMPRESSED, Setting, attended_bytes
from benchmarks.common.timing import Effort, Looped, Runner
from benchmarks.kernels.attention import attention_runner
from benchmarks.peers.results import Entry, Results
from diffkv_jax.pallas_kernels.dispatch import XLA, Kernels

# High and low share of a context of king_james in SmolLM2 (docs/results.md); the rest is dropped,
# or in the recent window.
SHARES = {"(1, 0)": (0.12, 0.87), "(1, 0.02)": (0.12, 0.48)}
BASELINES = ("dense float32", "dense bfloat16")
EFFORT = Effort(sample_seconds=0.2, repeats=1)


class Candidate(NamedTuple):
    """One way to attend to a context."""

    runner: Runner
    moved: int  # bytes that it reads of a layer
    facts: dict[str, Any]


def measure(
    results: Results, run: str, batch: int, context: int, rounds: int, threads: int
) -> None:
    """One row each for dense caches (the best formulation of each dtype) and for tiers with each
    implementation of the kernels, in turns.

    One call goes over several layers, together larger than the processor's caches; "one layer" goes
    over one again and again, which may stay in a cache: what arithmetic alone takes.
    """
    setting = Setting(Kernels.resolve(), kv_heads=3, group=3, head_dim=64, recent=80)
    layers = max(1, min(8, (160 << 20) // (batch * setting.kv_heads * context * 90)))
    bandwidth, way = read_bandwidth(threads)
    print(
        f"read bandwidth: {bandwidth / 1e9:.1f} GB/s, {threads} threads, {way} over 1 GiB",
        flush=True,
    )
    candidates = dense_candidates(setting, batch, context, max(1, layers // 2))
    candidates |= tier_candidates(setting, batch, context, layers)
    runners = {name: candidate.runner for name, candidate in candidates.items()}
    for name, samples in in_turns(runners, rounds).items():
        _, moved, facts = candidates[name]
        median = float(np.median(samples))
        rate = moved / median
        facts |= {
            "ms": 1e3 * median,
            "MB read": moved / 1e6,
            "GB/s": rate / 1e9,
            "of bandwidth": rate / bandwidth,
            "read bandwidth": bandwidth,
            "bandwidth by": way,
        }
        labels = {"batch": batch, "context": context}
        results.add(Entry("attention", labels, name, run, [1 / s for s in samples], facts))


def dense_candidates(
    setting: Setting, batch: int, context: int, layers: int
) -> dict[str, Candidate]:
    """The best formulation of each dtype."""
    found, numbers = {}, 2 * batch * setting.kv_heads * context * setting.head_dim
    for dtype in ("float32", "bfloat16"):
        runner, formulation = best_dense(dtype, batch, context, setting, layers)
        moved = numbers * jnp.dtype(dtype).itemsize
        found[f"dense {dtype}"] = Candidate(runner, moved, {"formulation": formulation})
    return found


def tier_candidates(
    setting: Setting, batch: int, context: int, layers: int
) -> dict[str, Candidate]:
    """Tiers of each of `SHARES`, with the kernels of the setting over several layers and over one,
    and with XLA's.
    """
    heads, max_len = batch * setting.kv_heads, -(-context // 128) * 128 + 2 * setting.slots
    layout = setting.layout(COMPRESSED, max_len)
    mixes = {
        name: tuple(int(context * share) for share in shares) for name, shares in SHARES.items()
    }
    found = {}
    variants = dict.fromkeys(((setting.kernels, layers), (XLA, layers), (setting.kernels, 1)))
    for kernels, count in variants:
        shapes = (layout, list(mixes.values()), heads, count, max_len)
        runners = attention_runner(replace(setting, kernels=kernels), kernels, *shapes, EFFORT)
        one = ", one layer" if count != layers else ""
        for (mix, lengths), runner in zip(mixes.items(), runners, strict=True):
            name = f"K8V4/K4V2 {mix} {kernels.implementation}{one}"
            moved = attended_bytes(setting, layout, lengths, heads)
            found[name] = Candidate(runner, moved, {"high": lengths[0], "low": lengths[1]})
    return found


def in_turns(runners: Mapping[str, Runner], rounds: int) -> dict[str, list[float]]:
    """Seconds of a layer, a sample a round, every other round backwards."""
    calls = {name: max(1, runner.calls(EFFORT)) for name, runner in runners.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds):
        for name in list(runners)[:: 1 if turn % 2 else -1]:
            seconds[name].append(runners[name].run(calls[name]))
    return seconds


def formulations(dtype: str) -> dict[str, tuple[Callable[[Array, Array, Array], Array], str, str]]:
    """Ways to write decode attention over a dense cache: a function of q [B, K, G, d], k and v, and
    the axes of k and of v.
    """

    def einsum(
        keys: str, values: str, widen: bool = False
    ) -> tuple[Callable[[Array, Array, Array], Array], str, str]:
        def attend(q: Array, k: Array, v: Array) -> Array:
            if widen:
                q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
            logits = (
                jnp.einsum(f"bkgd,{keys}->bkgs", q, k, preferred_element_type=jnp.float32)
                * q.shape[-1] ** -0.5
            )
            weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
            return jnp.einsum(
                f"bkgs,{values}->bkgd", weights, v, preferred_element_type=jnp.float32
            )

        return attend, keys, values

    def library(q: Array, k: Array, v: Array) -> Array:
        joined = q.reshape(q.shape[0], 1, -1, q.shape[-1])
        return jax.nn.dot_product_attention(joined, k, v).reshape(q.shape).astype(jnp.float32)

    ways = {
        "tokens first": einsum("bskd", "bskd"),
        "heads first": einsum("bksd", "bksd"),
        "heads first, keys transposed": einsum("bkds", "bksd"),
        "heads first, both transposed": einsum("bkds", "bkds"),
        "jax.nn.dot_product_attention": (library, "bskd", "bskd"),
    }
    return (
        ways
        if dtype == "float32"
        else ways | {"heads first, widened": einsum("bksd", "bksd", True)}
    )


def best_dense(
    dtype: str, batch: int, context: int, setting: Setting, layers: int
) -> tuple[Runner, str]:
    """The fastest formulation of three tries each, and its name."""
    best: tuple[float, Runner | None, str] = (float("inf"), None, "")
    for name, (attend, keys, values) in formulations(dtype).items():
        runner = dense_runner(attend, (keys, values), dtype, batch, context, setting, layers)
        calls = max(1, runner.calls(EFFORT))
        seconds = float(np.median([runner.run(calls) for _ in range(3)]))
        print(f"dense {dtype}, {name}: {1e3 * seconds:.2f} ms", flush=True)
        if seconds < best[0]:
            best = (seconds, runner, name)
    assert best[1] is not None
    return best[1], best[2]


def dense_runner(
    attend: Callable,
    axes: Sequence[str],
    dtype: str,
    batch: int,
    context: int,
    setting: Setting,
    layers: int,
) -> Runner:
    """A runner over `layers` dense caches with these axes."""
    sizes = {"b": batch, "s": context, "k": setting.kv_heads, "d": setting.head_dim}

    def cache(spec: str, seed: int) -> list[Array]:
        keys = jax.random.split(jax.random.key(seed), layers)
        return [jax.random.normal(key, [sizes[axis] for axis in spec], dtype) for key in keys]

    q = setting.queries(batch, setting.kv_heads, setting.group).astype(dtype)

    def step(outs: list[Array], q: Array, ks: list[Array], vs: list[Array]) -> list[Array]:
        return [attend(q, k, v) + 0 * out for out, k, v in zip(outs, ks, vs, strict=True)]

    state = [jnp.zeros(q.shape, jnp.float32) for _ in range(layers)]
    return Looped(step, 1, layers).on(state, q, cache(axes[0], 1), cache(axes[1], 2))


def read_bandwidth(threads: int, nbytes: int = 1 << 30) -> tuple[float, str]:
    """Bytes a second that `threads` threads read from memory, each a part of one array with a NumPy
    reduction; the best of three ways.
    """
    array = np.ones(nbytes // 8, np.int64)
    parts = np.array_split(array, 8 * threads)
    ways = {
        "np.sum of int64": np.add,
        "np.max of int64": np.maximum,
        "np.bitwise_or of int64": np.bitwise_or,
    }
    best = (0.0, "")
    with ThreadPoolExecutor(threads) as pool:
        for name, function in ways.items():
            for _ in range(4):
                began = time.perf_counter()
                list(pool.map(function.reduce, parts))
                best = max(best, (nbytes / (time.perf_counter() - began), name))
    return best
