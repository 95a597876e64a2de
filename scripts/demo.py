"""The main job in one command: a real model writes from a compressed KV cache, beside the same
model with the full cache; then the engine serves a dozen requests in a fixed memory with each.

`make demo` runs it with SmolLM2-135M-Instruct, `make demo MODEL=M` with any model that
`load_pretrained` takes. Two requests go as one batch: a question about a few thousand tokens of
Hamlet, and a short chat.
"""

import logging
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import diffkv_jax as dkv
from benchmarks.common.smollm2 import smollm2_gguf
from diffkv_jax.evaluation import quality, teacher_forced
from diffkv_jax.evaluation.learning import settled
from diffkv_jax.evaluation.policies import policy_of
from diffkv_jax.models import load_pretrained
from diffkv_jax.testing.texts import load_text, text_tokens

MAX_LEN, LEAST, CHUNK = 3328, 1024, 1024
SPARE = 328  # of MAX_LEN, for template and question, and for what is written
BUDGET = "48MiB"  # of the compressed cache of SmolLM2
# of the engine: tokens whose bfloat16 bytes are its memory
REQUESTS, NEW_TOKENS, MEMORY = 12, 128, 3500
QUESTION = "What is the name of the play above, and who wrote it?"
CHAT = "Give me three short tips for learning to cook."
console = Console(width=110)


def prompts(tokenizer, tokens: int) -> list[list[int]]:
    """The long question about a passage of `tokens` and the short chat, as token ids, with the
    model's chat template where it has one.
    """
    text = load_text("hamlet")[: 12 * tokens]
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    passage = tokenizer.decode(ids[:tokens])
    texts = [f"Read this:\n\n{passage}\n\n{QUESTION}", CHAT]
    chat = bool(getattr(tokenizer, "chat_template", None))
    if chat:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        ]
    # a template has the tokens that begin a text
    return [tokenizer(text, add_special_tokens=not chat, verbose=False).input_ids for text in texts]


def write(loaded, batch, policy, tokens: int, **run) -> dkv.GenerateOutput:
    """Generate once to compile (one chunk of prompt), once in earnest; prints text and speed."""
    model, params, tokenizer = loaded
    run |= {"policy": policy, "max_new_tokens": tokens}
    with console.status(f"{policy.name}: compiling …"):
        dkv.generate(model, params, [batch[0][-CHUNK + 200 :], batch[1]], **run)
    with console.status(f"{policy.name}: writing …"):
        began = time.perf_counter()
        out = dkv.generate(model, params, batch, **run)
        seconds = time.perf_counter() - began
    console.rule(f"[bold]{policy.name}: {policy.tiers}")
    for row, title in enumerate(("about Hamlet", "chat")):
        text = tokenizer.decode(out.tokens[row, : out.lengths[row]], skip_special_tokens=True)
        console.print(
            f"[bold]{title}[/] ({len(batch[row])} prompt tokens, "
            f"{out.finish_reason[row]}): {text.strip()}"
        )
    decoding = seconds - out.prefill_seconds
    prefill_speed = sum(map(len, batch)) / out.prefill_seconds
    console.print(
        f"prefill {prefill_speed:.0f} tokens/s, decode "
        f"{out.lengths.sum() / decoding:.1f} tokens/s (2 requests)\n"
    )
    return out


def print_memory(reports: dict[str, dkv.MemoryReport]) -> None:
    """Bytes of both caches side by side, and the compressed one layer by layer."""
    table = Table(
        "cache",
        "allocated",
        "of bf16",
        "logical",
        "of bf16",
        "pool",
        "high",
        "low",
        "recent",
        "dropped",
        title="KV bytes",
    )
    for name, r in reports.items():
        kept = r.kept_fraction
        tiers = [
            f"{kept[0]:.0%}",
            f"{kept[1]:.0%}" if len(kept) == 3 else "-",
            f"{kept[-1]:.0%}",
            f"{1 - kept.sum():.0%}",
        ]
        sizes = [
            f"{r.allocated / 2**20:.1f} MiB",
            f"{r.allocated / r.bf16:.1%}",
            f"{r.logical / 2**20:.1f} MiB",
            f"{r.logical / r.bf16:.1%}",
        ]
        table.add_row(name, *sizes, f"{r.pool / 2**20:.1f} MiB", *tiers)
    console.print(table)
    last = list(reports.values())[-1]
    console.print("allocated bytes of each layer, of its bf16 cache:")
    per_layer = last.allocated_bytes.sum(axis=(1, 2, 3)) / (last.bf16 / len(last.allocated_bytes))
    for layer, share in enumerate(per_layer):
        console.print(f"  {layer:2d} {'█' * round(share * 100):<50} {share:.1%}", highlight=False)


def print_quality(loaded, policy, steps: int, context: int, **run) -> None:
    """Perplexity and KL on held text: Hamlet goes on, and a stretch of Python source."""
    model, params, tokenizer = loaded
    names, plain = ["hamlet", "stdlib_source"], dkv.CompressionPolicy.none()
    tokens = text_tokens(tokenizer, names, context + steps + 1)
    given = model, params, tokens[:, :-1], context
    bare: dict[str, Any] = run | {"memory_budget": None, "calibration": None}
    full, _ = teacher_forced(*given, plain, progress="held text, full", **bare)
    held, _ = teacher_forced(*given, policy, progress="held text, compressed", **run)
    measured = quality(full, held, tokens[:, context + 1 :])
    table = Table(
        "held text",
        "perplexity, full",
        "perplexity, compressed",
        "mean KL",
        "same top token",
        title=f"{steps} tokens after {context}",
    )
    for row, name in enumerate(names):
        kl, top1 = measured.kl[row].mean(), measured.top1[row].mean()
        table.add_row(
            name,
            f"{measured.perplexity_full[row]:.2f}",
            f"{measured.perplexity[row]:.2f}",
            f"{kl:.4f}",
            f"{top1:.1%}",
        )
    console.print(table)


def serve_many(loaded, policies, **run) -> None:
    """A dozen requests of different lengths in the same memory, with each policy."""
    model, params, tokenizer = loaded
    spec = model.attention
    memory = MEMORY * 4 * spec.num_layers * spec.num_kv_heads * spec.head_dim  # K and V, bfloat16
    ids = tokenizer(load_text("hamlet")[:20_000], add_special_tokens=False, verbose=False).input_ids
    lengths = [64 + 64 * i for i in range(REQUESTS)]
    table = Table(
        "cache",
        "at once",
        "tokens/s",
        "seconds",
        title=f"{REQUESTS} requests in {memory / 2**20:.0f} MiB",
    )
    for policy, calibration in policies:
        engine = dkv.Engine(
            model,
            params,
            policy=policy,
            calibration=calibration,
            memory_budget=memory,
            max_requests=REQUESTS,
            max_len=1024,
            **run,
        )
        for tokens in (24, NEW_TOKENS):  # the first time compiles
            began, most = time.perf_counter(), 0
            asked = [
                engine.submit(ids[:n], max_new_tokens=tokens, stop_token_ids=()) for n in lengths
            ]
            with console.status(f"{policy.name}: {REQUESTS} requests …"):
                for _ in engine.run():
                    most = max(most, sum(one.state == "running" for one in asked))
        seconds = time.perf_counter() - began
        speed = f"{REQUESTS * NEW_TOKENS / seconds:.1f}"
        table.add_row(policy.name, str(most), speed, f"{seconds:.1f}")
    console.print(table)


def load(path):
    """The model with its tokenizer, and the tokens of context that the demo has room for.

    Raises:
        ValueError: nothing loadable, or no tokenizer, or a shorter context than the demo needs.
    """
    with console.status(f"loading {path} …"):
        loaded = load_pretrained(path)
    room = min(MAX_LEN, loaded.model.attention.max_position_embeddings)
    if loaded.tokenizer is None or room < LEAST:
        raise ValueError(
            f"{path} must have a tokenizer and {LEAST} tokens of context for the demo, has "
            f"tokenizer {loaded.tokenizer} and {room} tokens: take another model"
        )
    return loaded, room


def main(
    model: Annotated[
        str | None,
        typer.Option(help="A GGUF file, a folder or a name on the Hub; else SmolLM2-135M."),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="auto, a name, a call or a file, as the evaluation takes it.")
    ] = "diffkv(1.0, 0.0)",
    budget: Annotated[
        str | None,
        typer.Option(help="Of the compressed cache; else 48MiB of SmolLM2, or room for all."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most that each request writes.")] = 48,
    steps: Annotated[int, typer.Option(help="Tokens of held text that are fed.")] = 48,
) -> None:
    """Write from a full and from a compressed cache and compare memory, speed and quality."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        asked = policy_of(policy)
        loaded, room = load(smollm2_gguf() if model is None else model)
        chosen, calibration = settled(policy, asked, loaded, None, room)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    batch, plain = prompts(loaded.tokenizer, room - SPARE), dkv.CompressionPolicy.none()
    run = {"max_len": room, "cache_dtype": "bfloat16", "prefill_chunk": CHUNK}
    held = {"memory_budget": budget or (BUDGET if model is None else None)}
    held |= run | {"calibration": calibration}
    reports = {}
    for each, options in ((plain, run), (chosen, held)):
        cache = write(loaded, batch, each, tokens, **options).cache
        reports[each.name] = dkv.memory_report(cache)
        del cache
    print_memory(reports)
    print_quality(loaded, chosen, steps, min(2048, room - SPARE), **held)
    serve_many(loaded, [(plain, None), (chosen, calibration)], cache_dtype="bfloat16")


if __name__ == "__main__":
    typer.run(main)
