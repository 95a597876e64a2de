"""The main job in one command: a real model writes from a compressed KV cache, beside the same
model with the full cache.

`make demo` runs it. Two requests go as one batch: a question about a few thousand tokens of Hamlet,
and a short chat.
"""

import logging
import time

import typer
from rich.console import Console
from rich.table import Table

import diffkv_jax as dkv
from benchmarks.common.smollm2 import smollm2_gguf
from diffkv_jax.evaluation import quality, teacher_forced
from diffkv_jax.models import load_pretrained
from diffkv_jax.testing.texts import load_text, text_tokens

PASSAGE_TOKENS, MAX_LEN, CHUNK = 3000, 3328, 1024
QUESTION = "What is the name of the play above, and who wrote it?"
CHAT = "Give me three short tips for learning to cook."
console = Console(width=110)


def prompts(tokenizer) -> list[list[int]]:
    """The long question and the short chat, as token ids with the model's chat template."""
    passage = tokenizer.decode(
        tokenizer(load_text("hamlet")[: 12 * PASSAGE_TOKENS], verbose=False).input_ids[
            :PASSAGE_TOKENS
        ]
    )
    users = [f"Read this:\n\n{passage}\n\n{QUESTION}", CHAT]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": u}], tokenize=False, add_generation_prompt=True
        )
        for u in users
    ]
    return [tokenizer(text, verbose=False).input_ids for text in texts]


def write(model, params, tokenizer, batch, policy, budget, tokens: int) -> dkv.GenerateOutput:
    """Generate once to compile (one chunk of prompt), once in earnest; prints text and speed."""
    run = {
        "policy": policy,
        "memory_budget": budget,
        "max_len": MAX_LEN,
        "cache_dtype": "bfloat16",
        "prefill_chunk": CHUNK,
    }
    run |= {"max_new_tokens": tokens}
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


def print_quality(model, params, tokenizer, policy, budget, steps: int) -> None:
    """Perplexity and KL on held text: Hamlet goes on, and a stretch of Python source."""
    context, names = 2048, ["hamlet", "stdlib_source"]
    tokens = text_tokens(tokenizer, names, context + steps + 1)
    run = {"max_len": MAX_LEN, "cache_dtype": "bfloat16", "prefill_chunk": CHUNK}
    full, _ = teacher_forced(
        model,
        params,
        tokens[:, :-1],
        context,
        dkv.CompressionPolicy.none(),
        progress="held text, full",
        **run,
    )
    held, _ = teacher_forced(
        model,
        params,
        tokens[:, :-1],
        context,
        policy,
        memory_budget=budget,
        progress="held text, compressed",
        **run,
    )
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


def main(
    alpha_high: float = 1.0,
    alpha_low: float = 0.0,
    budget: str = "48MiB",
    tokens: int = 48,
    steps: int = 48,
) -> None:
    """Write from a full and from a DiffKV cache and compare memory, speed and quality."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with console.status("loading SmolLM2-135M-Instruct …"):
        model, params, tokenizer = load_pretrained(smollm2_gguf())
    batch = prompts(tokenizer)
    full, policy = dkv.CompressionPolicy.none(), dkv.diffkv(alpha_high, alpha_low)
    reports = {}
    for each, limit in ((full, None), (policy, budget)):
        reports[each.name] = dkv.memory_report(
            write(model, params, tokenizer, batch, each, limit, tokens).cache
        )
    print_memory(reports)
    print_quality(model, params, tokenizer, policy, budget, steps)


if __name__ == "__main__":
    typer.run(main)
