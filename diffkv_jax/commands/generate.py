"""`diffkv generate`."""

import json
import sys
from typing import Annotated, Any

import typer

from diffkv_jax.commands import options
from diffkv_jax.commands.failing import INTERRUPTED, say, told

ROUND = 256  # prompts of nearly equal length share a pool's shape


@told
def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads stdin.")],
    policy: options.Policy = options.POLICY,
    memory_budget: options.MemoryBudget = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    chat: Annotated[
        bool | None,
        typer.Option(help="As a message of a chat; by default where the model has a template."),
    ] = None,
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Write text from a compressed cache, as it comes; speed and memory on stderr."""
    from diffkv_jax.commands.answer import answered
    from diffkv_jax.commands.loading import asked_with, engine_for, load, policy_from, sampling_of

    sampling = sampling_of(temperature, top_k, top_p, min_p)
    asked = asked_with(sampling, seed, stop, max_new_tokens)
    chosen = policy_from(policy)
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded = load(model, dtype)
    tokens = _tokens(loaded.tokenizer, text, chat, model)
    context = loaded.model.attention.max_position_embeddings
    room = -(-(len(tokens) + max(max_new_tokens, 1)) // ROUND) * ROUND
    engine = engine_for(loaded, chosen, memory_budget, max_requests=1, max_len=min(room, context))
    answer = answered(engine, tokens, lambda new: None if as_json else _write(new), **asked)
    if as_json:
        typer.echo(json.dumps(answer.as_json()))
    else:
        typer.echo()
        say(answer.line())
    reason = answer.request.finish_reason
    if reason == "cancelled":
        raise typer.Exit(INTERRUPTED)
    if reason in ("error", "cache_full"):
        raise typer.Exit(1)


command = generate


def _write(text: str) -> None:
    if text:
        typer.echo(text, nl=False)


def _tokens(tokenizer: Any, text: str, chat: bool | None, model: str) -> Any:
    from diffkv_jax.commands.loading import check_template, has_template
    from diffkv_jax.serving.submitted import as_tokens

    if chat:
        check_template(tokenizer, model)
    if chat is None:
        chat = has_template(tokenizer)
    return as_tokens([{"role": "user", "content": text}] if chat else text, tokenizer)
