"""Tokens a second end to end at a fixed KV memory: how many requests fit and how fast they decode,
full cache and DiffKV.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import diffkv_jax as dkv
from benchmarks.common.report import Row, Section
from benchmarks.common.states import Setting, uniform
from benchmarks.kernels.attention import check_memory
from diffkv_jax.cache.pool_size import bound, cache_bytes, tree_bytes
from diffkv_jax.models import ModelConfig, build_model, load_pretrained, param_shapes
from diffkv_jax.testing.texts import load_text
from diffkv_jax.units import parse_bytes

COLUMNS = {
    "cache": "",
    "requests": "d",
    "finished": "d",
    "KV GiB": ".2f",
    "MiB a request": ".0f",
    "high": ".1%",
    "low": ".1%",
    "dropped": ".1%",
    "prefill tokens/s": ".0f",
    "decode tokens/s": ".0f",
    "ms a step": ".1f",
    "speed-up": ".2f",
}
# hidden, intermediate, layers, query heads, KV heads, head_dim: Llama 3 8B, Llama 3.2 3B and 1B
SCALES = {
    "8b": (4096, 14336, 32, 32, 8, 128),
    "3b": (3072, 8192, 28, 24, 8, 128),
    "1b": (2048, 8192, 16, 32, 8, 64),
}
TINY = (48, 64, 2, 3, 1, 64)


@dataclasses.dataclass(frozen=True)
class Load:
    """What is served: prompts of `prompt` tokens, `new` tokens each, in a KV memory of `budget`;
    `scale` names the random model.
    """

    budget: str = "8GiB"
    prompt: int = 4096
    new: int = 128
    chunk: int = 1024
    scale: str = "auto"
    gguf: Path | None = None


@dataclasses.dataclass(frozen=True)
class Served:
    """A model in the type that it is served in, its parameters, and where its prompts come from."""

    name: str
    model: Any
    params: Any
    prompts: Callable[[int, int], np.ndarray]  # requests, tokens -> int32 [requests, tokens]


def section(seconds: float) -> Section:
    """The table of end-to-end runs."""
    return Section("Requests in a fixed KV memory, end to end", COLUMNS, seconds)


def measure(table: Section, setting: Setting, load: Load) -> None:
    """The full cache with as many requests as fit; DiffKV with the same ones, then with as many as
    fit.
    """
    policy = dkv.diffkv(1.0, 0.02)
    full = dkv.CompressionPolicy.none()
    loaded: list[Served] = []

    def first() -> Row:
        loaded.append(served := served_model(setting, load))
        requests = full_requests(served, setting, load)
        table.notes += [
            f"{served.name}; {load.prompt} prompt tokens and {load.new} new ones a request, KV "
            f"memory {load.budget}, "
            f"{setting.kernels.implementation} kernels, {policy.name} {policy.tiers} with alpha "
            f"(1, 0.02), greedy.",
            "finished: requests that the pool had pages for to the end. decode tokens/s: of all "
            "requests together; events included.",
        ]
        if load.gguf is None:
            table.notes.append(
                "Random weights attend flatly: the shares of the tiers are not those of a real "
                "model, and with them neither are the "
                "requests that fit (docs/results.md has the shares of a real one)."
            )
        return serve(served, setting, load, full, requests, None)

    if not table.measure({"cache": "full bfloat16"}, first):
        return
    baseline = table.rows[-1]
    baseline["speed-up"] = 1.0
    for name, fit in (("DiffKV, as many requests", None), ("DiffKV, as many as fit", 0.97)):
        last = table.rows[-1]
        requests = (
            baseline["requests"]
            if fit is None
            else max(1, int(fit * parse_bytes(load.budget) / (2**20 * last["MiB a request"])))
        )
        if not table.measure(
            {"cache": name},
            partial(serve, loaded[0], setting, load, policy, requests, load.budget, baseline),
        ):
            return


def serve(
    served: Served,
    setting: Setting,
    load: Load,
    policy: dkv.CompressionPolicy,
    requests: int,
    budget: str | None,
    baseline: Row | None = None,
) -> Row:
    """One batch: once with a chunk of each prompt, so that all is compiled, then in earnest."""
    max_len = rounded(load.prompt + load.new)
    prompts = served.prompts(requests, load.prompt)
    run = {
        "policy": policy,
        "memory_budget": budget,
        "max_len": max_len,
        "cache_dtype": "bfloat16",
        "prefill_chunk": load.chunk,
    }
    run |= {
        "implementation": setting.kernels.implementation,
        "interpret": setting.kernels.interpret,
    }
    generate = partial(dkv.generate, served.model, served.params, **run)
    # the same power of two of new tokens
    del_cache(generate(prompts[:, : load.chunk], max_new_tokens=load.new // 2 + 1))
    began = time.perf_counter()
    out = generate(prompts, max_new_tokens=load.new)
    seconds = time.perf_counter() - began - out.prefill_seconds
    report = dkv.memory_report(out.cache)
    written = int(np.maximum(out.lengths - 1, 0).sum())  # the first of each comes with the prompt
    row = {
        "requests": requests,
        "finished": sum(reason != "cache_full" for reason in out.finish_reason),
        "KV GiB": report.pool / 2**30,
        "MiB a request": report.allocated / requests / 2**20,
        **shares(report),
        "prefill tokens/s": prompts.size / out.prefill_seconds,
        "decode tokens/s": written / seconds,
        "ms a step": 1e3 * seconds / max(1, int(out.lengths.max()) - 1),
    }
    del_cache(out)
    return row | (
        {"speed-up": row["decode tokens/s"] / baseline["decode tokens/s"]} if baseline else {}
    )


def del_cache(out: dkv.GenerateOutput) -> None:
    """Give a cache's memory back at once."""
    for array in jax.tree.leaves(out.cache):
        array.delete()


def shares(report: dkv.MemoryReport) -> Row:
    """Shares of the seen tokens in the tiers and of the dropped ones."""
    kept = report.kept_fraction
    return {
        "high": float(kept[0]),
        "low": float(kept[1]) if len(kept) == 3 else None,
        "dropped": float(1 - kept.sum()),
    }


def rounded(tokens: int) -> int:
    """To a multiple of 128."""
    return -(-tokens // 128) * 128


def full_requests(served: Served, setting: Setting, load: Load) -> int:
    """How many requests the full cache holds for certain; from its shapes.

    Raises:
        MemoryError: not one.
    """
    amount, requests = parse_bytes(load.budget), 0
    while full_bytes(served, setting, load, requests + 1) <= amount:
        requests += 1
    if not requests:
        raise MemoryError(
            f"a KV memory of {load.budget} holds no request of "
            f"{load.prompt + load.new} tokens; give a larger --kv-budget"
        )
    return requests


def full_bytes(served: Served, setting: Setting, load: Load, requests: int) -> int:
    """Bytes of the full cache of so many requests, every page that they can ever need."""
    max_len, attention = rounded(load.prompt + load.new), served.model.attention
    policy = dkv.CompressionPolicy.none()
    sizes: dict[str, Any] = {
        "num_requests": requests,
        "max_len": max_len,
        "dtype": "bfloat16",
        "kernels": setting.kernels,
    }
    spec = dkv.CacheSpec.build(attention, policy, num_pages=0, **sizes)
    pages = spec.layout.pages_for(0, max_len - policy.schedule.window)
    pages *= spec.num_heads * len(spec.paged_layers)
    return cache_bytes(dataclasses.replace(spec, num_pages=pages), bound(spec, policy))


def served_model(setting: Setting, load: Load) -> Served:
    """The real model of a GGUF file with a text as prompts, or a random one with random ids."""
    if load.gguf is not None:
        model, params, tokenizer = load_pretrained(load.gguf, "bfloat16")
        return Served(load.gguf.name, model, params, partial(text_prompts, tokenizer))
    name, sizes = ("tiny", TINY) if setting.tiny else choose_scale(load)
    model = random_model(sizes, load)
    params = random_params(model)
    ids = partial(random_prompts, model.attention.vocab_size)
    weights = humanised(tree_bytes(params))
    return Served(
        f"Llama-shaped model {name!r} with random bfloat16 weights ({weights})", model, params, ids
    )


def humanised(nbytes: int) -> str:
    """GiB."""
    return f"{nbytes / 2**30:.1f} GiB"


def choose_scale(load: Load) -> tuple[str, Sequence[int]]:
    """The named scale, or the largest whose weights, two KV memories and working memory fit the
    device.
    """
    if load.scale != "auto":
        return load.scale, SCALES[load.scale]
    for name, sizes in SCALES.items():
        weights = sum(
            x.size * x.dtype.itemsize
            for x in jax.tree.leaves(param_shapes(random_model(sizes, load)))
        )
        try:
            check_memory(weights + 2 * parse_bytes(load.budget) + (8 << 30))
        except MemoryError:
            continue
        return name, sizes
    return "1b", SCALES["1b"]


def random_model(sizes: Sequence[int], load: Load):
    """A Llama-like model without parameters, in bfloat16."""
    hidden, intermediate, layers, q_heads, kv_heads, head_dim = sizes
    config = ModelConfig(
        model_type="llama",
        vocab_size=97 if sizes is TINY else 128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=q_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max(8192, rounded(load.prompt + load.new)),
        rope_theta=500000.0,
    )
    return build_model(config, "bfloat16")


def random_params(model) -> Any:
    """Parameters made on the device: norms of ones, the rest uniform with a variance of one over
    the inputs.
    """

    @partial(jax.jit, static_argnames=("shape", "dtype"))
    def make(shape: tuple[int, ...], dtype: str, seed: jax.Array) -> jax.Array:
        return ((2 * uniform(shape, seed) - 1) * (3.0 / shape[-2]) ** 0.5).astype(dtype)

    def fill(path, leaf: jax.ShapeDtypeStruct):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.ones(leaf.shape, leaf.dtype)
        return make(leaf.shape, leaf.dtype.name, jnp.uint32(sum(map(ord, name))))

    return jax.tree_util.tree_map_with_path(fill, param_shapes(model))


def random_prompts(vocab_size: int, requests: int, tokens: int) -> np.ndarray:
    """Random ids int32 [requests, tokens]."""
    return np.random.default_rng(0).integers(0, vocab_size, (requests, tokens)).astype(np.int32)


def text_prompts(tokenizer, requests: int, tokens: int, text: str = "king_james") -> np.ndarray:
    """Pieces of a text int32 [requests, tokens], from its beginning again where it ends."""
    ids = np.asarray(
        tokenizer(load_text(text)[: 8 * requests * tokens], verbose=False).input_ids, np.int32
    )
    return np.resize(ids, (requests, tokens))
