"""`diffkv chat`."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any

import typer

from diffkv_jax.commands import options
from diffkv_jax.commands.failing import one_line, say, told

HELP = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"


@told
def chat(
    model: options.Model,
    policy: options.Policy = options.POLICY,
    memory_budget: options.MemoryBudget = None,
    max_new_tokens: options.MaxNewTokens = 512,
    max_len: options.MaxLen = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    dtype: options.Dtype = "auto",
) -> None:
    """Talk with a model; each turn reads the whole conversation."""
    from diffkv_jax.commands.loading import (
        asked_with,
        check_template,
        engine_for,
        load,
        policy_from,
        sampling_of,
    )

    sampling = sampling_of(temperature, top_k, top_p, min_p)
    asked = asked_with(sampling, seed, stop, max_new_tokens)
    chosen = policy_from(policy)
    loaded = load(model, dtype)
    check_template(loaded.tokenizer, model)
    engine = engine_for(loaded, chosen, memory_budget, max_requests=1, max_len=max_len)
    first = [] if system is None else [{"role": "system", "content": system}]
    talk = list(first)
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            talk = list(first)
            say("a new conversation")
        elif line.startswith("/"):
            say(HELP)
        elif line:
            talk = _turn(engine, talk, line, asked)


command = chat


def _turn(engine: Any, talk: list[dict], line: str, asked: dict) -> list[dict]:
    """The conversation with a question and its answer; as it was where it is refused."""
    from diffkv_jax.commands.answer import answered

    longer = [*talk, {"role": "user", "content": line}]
    try:
        answer = answered(engine, longer, lambda new: typer.echo(new, nl=False), **asked)
    except ValueError as error:
        say(f"diffkv: {one_line(error)} (/reset begins a new conversation)")
        return talk
    typer.echo()
    if sys.stdin.isatty() or answer.request.finish_reason in ("error", "cache_full"):
        say(answer.line())
    return [*longer, {"role": "assistant", "content": answer.request.text}]


def _lines() -> Iterator[str]:
    """What is typed, line by line, or stdin where that is no terminal."""
    if not sys.stdin.isatty():
        yield from map(str.strip, sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # input() edits lines with it
    say(HELP)
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            typer.echo()
            return
