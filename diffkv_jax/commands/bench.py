"""`diffkv bench`: what a policy buys on the machine at hand, in one memory budget."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Annotated, Any

import typer

from diffkv_jax.commands import options
from diffkv_jax.commands.failing import say, told

SHARE = 4  # of the requests one in so many fits the default budget in bf16
# of a request in tokens: the recent window, what of it is not in the pool, part-filled pages
WINDOW, EXACT, SPARE = 96, 64, 32
PLANNED = 0.9  # of a pool, at most


@told
def bench(
    model: options.Model,
    policy: options.Policy = options.POLICY,
    memory_budget: Annotated[
        str | None,
        typer.Option(help="Of both caches; else what a quarter of the requests take in bf16."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Submitted at once.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each, built-in text.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 64,
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """The engine with the full cache and with a policy in the same memory, on this machine."""
    from diffkv_jax.commands.loading import engine_for, load, policy_from
    from diffkv_jax.policy.policy import CompressionPolicy

    chosen = policy_from(policy)
    loaded = load(model, dtype)
    total = prompt_tokens + new_tokens
    budget = memory_budget or str(_default_budget(loaded.model.attention, requests, total))
    prompts, found = _prompts(loaded.model, requests, prompt_tokens), []
    for name, one in (("full", CompressionPolicy.none()), (policy, chosen)):
        engine = engine_for(
            loaded, one, budget, max_requests=requests, max_len=total, cache_dtype="bfloat16"
        )
        for run in ("compiling", "measuring"):
            if sys.stderr.isatty():
                say(f"{name}: {run} …")
            measured = _measured(engine, name, prompts, new_tokens)
        found.append(measured)
        del engine
    if as_json:
        given = {"requests": requests, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        caches = [asdict(one) for one in found]
        typer.echo(json.dumps({"memory_budget": budget, **given, "caches": caches}))
        return
    _show(found, f"{requests} requests of {prompt_tokens} + {new_tokens} tokens in {_size(budget)}")


command = bench


@dataclass(frozen=True)
class Measured:
    """Of one cache; seconds and tokens of the second of two equal runs.

    Attributes:
        at_once: most requests that decoded at the same time.
        first_token_seconds: median over the requests, from when all were submitted.
        held_bytes, bf16_bytes: most that the cache took in use, and the same tokens in bfloat16;
            None where all answers ended in the steps that they began in.
        pool_bytes: all that was reserved; None as those.
    """

    cache: str
    at_once: int
    tokens_per_second: float
    first_token_seconds: float
    seconds: float
    held_bytes: int | None
    bf16_bytes: int | None
    pool_bytes: int | None
    finish_reasons: tuple[str, ...]


def _measured(engine: Any, name: str, prompts: Sequence[Any], new_tokens: int) -> Measured:
    from statistics import median

    began, at_once, most = perf_counter(), 0, None
    asked = [
        engine.submit(prompt, max_new_tokens=new_tokens, stop_token_ids=()) for prompt in prompts
    ]
    paused = 0.0
    while engine.busy:
        engine.step()
        looked = perf_counter()
        running = len(engine._scheduler.slots.running)
        if running >= at_once and (report := engine.memory_report()) is not None:
            at_once = running
            most = report if most is None or report.allocated >= most.allocated else most
        paused += perf_counter() - looked
    seconds = perf_counter() - began - paused
    firsts = [one.times["first"] - began for one in asked if "first" in one.times]
    return Measured(
        cache=name,
        at_once=max(at_once, 1),
        tokens_per_second=sum(len(one.tokens) for one in asked) / seconds,
        first_token_seconds=median(firsts) if firsts else float("nan"),
        seconds=seconds,
        held_bytes=None if most is None else most.allocated,
        bf16_bytes=None if most is None else most.bf16,
        pool_bytes=None if most is None else most.pool,
        finish_reasons=tuple(str(one.finish_reason) for one in asked),
    )


def _prompts(model: Any, requests: int, length: int) -> list[Any]:
    """Stretches of the built-in text, each from another place.

    Raises:
        ValueError: the model has no such text.
    """
    import numpy as np

    from diffkv_jax.calibration.sample_text import built_in_tokens

    built_in_tokens(model, 1, 2)  # says where there is none
    text = model.text
    count = max(length - text.prefix.size, 1)
    starts = np.arange(requests) * (text.ids.size // requests)
    rows = [text.ids.take(np.arange(start, start + count), mode="wrap") for start in starts]
    return [np.concatenate([text.prefix, row])[:length] for row in rows]


def _default_budget(attention: Any, requests: int, total: int) -> int:
    """Bytes for a part of the requests, and for the windows of all of them."""
    from diffkv_jax.serving.pool import READINGS

    channels = attention.head_dim * (1 if attention.latent else 2)
    token = 2 * attention.num_layers * attention.num_kv_heads * channels
    full = max(1, requests // SHARE) * (max(total - EXACT, 0) + SPARE) / PLANNED
    return int(token * (full + (requests + READINGS) * WINDOW))


def _size(budget: int | str) -> str:
    import humanize

    from diffkv_jax.units import parse_bytes

    return humanize.naturalsize(parse_bytes(budget), binary=True)


def _show(found: list[Measured], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("cache", title=title)
    for name in ("at once", "tokens/s", "first token", "bytes", "of bf16"):
        table.add_column(name, justify="right")
    for one in found:
        held = one.held_bytes and (_size(one.held_bytes), one.held_bytes / (one.bf16_bytes or 1))
        table.add_row(
            one.cache,
            str(one.at_once),
            f"{one.tokens_per_second:.1f}",
            f"{one.first_token_seconds:.2f} s",
            held[0] if held else "-",
            f"{held[1]:.0%}" if held else "-",
        )
    Console().print(table)
