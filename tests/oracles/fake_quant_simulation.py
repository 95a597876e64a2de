"""A whole Llama-shaped model under DiffKV, simulated on torch with dense tensors (docs/design.md,
section 1).

The cache is never packed or paged: each layer keeps the exact keys and values, what a reader sees
of them in their present tier, a map of tiers and the significance sums. Slow in memory, simple to
check. Use: `load`, `prefill` once, `decode` once a policy, `metrics`.
"""

import copy
import os
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from diffkv_jax.testing.quantiser import fake_demote, fake_quantise

from .torch_llama import after_attention, head, project

RECENT, HIGH, LOW, DROPPED = 0, 1, 2, 3


@dataclass(frozen=True)
class Policy:
    alpha_high: float
    alpha_low: float
    window: int = 64
    flush: int = 32
    high_bits: tuple = (8, 4)  # of keys, of values; the same order below
    low_bits: tuple = (4, 2)
    high_groups: tuple = (1, 1)
    low_groups: tuple = (1, 1)


@dataclass
class LayerCache:
    """One layer; tensors [kv_heads, capacity, head_dim] or [kv_heads, capacity]. `exact` and `read`
    hold (keys, values).
    """

    exact: tuple
    read: tuple
    significance: torch.Tensor
    tiers: np.ndarray


@dataclass
class Prefilled:
    caches: list
    logits: torch.Tensor  # [vocab], after the last prompt token
    seen: int
    observed: int


@dataclass
class Run:
    logits: torch.Tensor  # [steps, vocab]; row i follows the i-th fed token
    tiers: np.ndarray  # uint8 [layers, kv_heads, tokens] at the end
    fractions: np.ndarray  # [layers, kv_heads, 4]: recent, high, low, dropped of all tokens seen
    checksums: list  # one a step: crc32 of the uint8 tier map [layers, kv_heads, P] in C order
    # (P, tiers after it, means m it saw), the first after the prompt
    events: list = field(default_factory=list)


# --- the model ---


def load(path):
    """(model, tokenizer) from a .gguf file, float32. Through the checkpoint reader of transformers,
    which needs no `accelerate`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    folder, name = os.path.split(os.path.abspath(path))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, gguf_file=name), dtype=torch.float32
    )
    tensors = load_gguf_checkpoint(
        os.path.join(folder, name), return_tensors=True, model_to_load=model
    )["tensors"]
    unmatched = model.load_state_dict(tensors, strict=False)
    # the head is tied
    assert set(unmatched.missing_keys) <= {"lm_head.weight"} and not unmatched.unexpected_keys
    model.tie_weights()
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=name)


def attend(cache, queries, first):
    """Causal attention of queries at positions first, first + 1, ...; output and probabilities
    [kv_heads, group, rows, keys].
    """
    heads, rows, dim = queries.shape
    kv_heads, end = cache.read[0].shape[0], first + rows
    keys, values = (tensor[:, :end] for tensor in cache.read)
    grouped = queries.reshape(kv_heads, -1, dim)  # the query heads of a KV head lie side by side
    scores = (grouped * dim**-0.5 @ keys.transpose(-1, -2)).view(
        kv_heads, heads // kv_heads, rows, end
    )
    scores[..., first:].masked_fill_(
        torch.ones(rows, rows, dtype=torch.bool).triu(1), float("-inf")
    )
    dropped = cache.tiers[:, None, None, :end] == DROPPED
    if dropped.any():
        scores.masked_fill_(torch.from_numpy(dropped), float("-inf"))
    probabilities = scores.softmax(-1)
    return (probabilities.flatten(1, 2) @ values).view(heads, rows, dim), probabilities


# --- the cache and its policy ---


def new_cache(config, capacity):
    shape = (config.num_key_value_heads, capacity, config.head_dim)
    pair = lambda: (torch.zeros(shape), torch.zeros(shape))  # noqa: E731
    return LayerCache(pair(), pair(), torch.zeros(shape[:2]), np.zeros(shape[:2], np.uint8))


def enter(cache, first, keys, values, cache_dtype):
    """Tokens reach the cache: rounded once, recent."""
    for which, tensor in enumerate((keys, values)):
        rounded = tensor.to(cache_dtype).float()
        for store in (cache.exact, cache.read):
            store[which][:, first : first + tensor.shape[1]] = rounded


def move(cache, wanted, policy):
    """Put tokens into new tiers: from recent by the exact value, from high to low by the stored
    codes.
    """
    end = wanted.shape[1]
    tiers = cache.tiers[:, :end]
    to_high, to_low, demoted = (
        (tiers == before) & (wanted == after)
        for before, after in ((RECENT, HIGH), (RECENT, LOW), (HIGH, LOW))
    )
    for which in (0, 1):
        high = (policy.high_bits[which], policy.high_groups[which])
        low = (policy.low_bits[which], policy.low_groups[which])
        # views
        exact, read = (store[which][:, :end].numpy() for store in (cache.exact, cache.read))
        read[to_high] = fake_quantise(exact[to_high], *high)
        read[to_low] = fake_quantise(exact[to_low], *low)
        read[demoted] = fake_demote(exact[demoted], *high, *low)
    cache.tiers[:, :end] = wanted


def means(cache, seen, observed):
    """m [kv_heads, tokens], float32."""
    queries = np.minimum(seen - np.arange(seen), observed).astype(np.float32)
    return cache.significance[:, :seen].numpy() / queries


def decide(tiers, mean, seen, policy, after_prompt=False):
    """New tiers [kv_heads, tokens] after an event; mean and thresholds float32, comparisons
    strict.
    """
    tau_high, tau_low = (
        np.float32(alpha) / np.float32(seen) for alpha in (policy.alpha_high, policy.alpha_low)
    )
    by_threshold = np.where(mean < tau_low, DROPPED, np.where(mean < tau_high, LOW, HIGH)).astype(
        np.uint8
    )
    leaving = (tiers == RECENT) & (np.arange(seen) < seen - policy.window)
    if policy.flush == 1 and not after_prompt:
        return one_victim(tiers, mean, by_threshold, leaving)
    fallen = (tiers == HIGH) | ((tiers == LOW) & (by_threshold == DROPPED))
    return np.where(leaving | fallen, by_threshold, tiers)


def one_victim(tiers, mean, by_threshold, leaving):
    """Algorithm 1 of the paper: the tier the leaving token joins has its least significant token
    re-examined.
    """
    tiers = tiers.copy()
    for row in np.flatnonzero(leaving.any(axis=1)):
        (token,) = np.flatnonzero(leaving[row])
        tiers[row, token] = tier = by_threshold[row, token]
        if tier != DROPPED:
            members = np.flatnonzero(tiers[row] == tier)
            victim = members[np.argmin(mean[row, members])]  # the first of equals: the older
            tiers[row, victim] = max(tier, by_threshold[row, victim])  # never promoted
    return tiers


def event(caches, seen, observed, policy, after_prompt=False):
    """Run the policy on every layer; (P, tiers, means) for the record."""
    scored = [means(cache, seen, observed) for cache in caches]
    for cache, mean in zip(caches, scored, strict=True):
        move(cache, decide(cache.tiers[:, :seen], mean, seen, policy, after_prompt), policy)
    return seen, tier_map(caches, seen), np.stack(scored)


def tier_map(caches, seen):
    return np.ascontiguousarray(np.stack([cache.tiers[:, :seen] for cache in caches]))


# --- the two phases ---


@contextmanager
def quiet():
    """No gradients, and one thread: on a shared machine the barriers of torch's threads cost many
    times the work of a decode step.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


@quiet()
def prefill(
    model,
    tokens,
    capacity,
    observe=64,
    cache_dtype=torch.bfloat16,
    chunk=None,
    policy=None,
    block=256,
):
    """Run the prompt: in one piece, the same for every policy, or in chunks, with tokens that left
    the window read from the high tier.
    """
    config, total = model.config, len(tokens)
    observed = total if observe == "all" else min(observe, total)
    caches = [new_cache(config, capacity) for _ in range(config.num_hidden_layers)]
    sums = torch.zeros(
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.num_attention_heads // config.num_key_value_heads,
        total,
    )
    ends = range(total, 0, -(chunk or total))[::-1]  # right-aligned: the last chunk is full
    for start, end in zip([0, *ends], ends, strict=False):
        x = model.model.embed_tokens.weight[torch.as_tensor(tokens[start:end])]
        for layer, cache, layer_sums in zip(model.model.layers, caches, sums, strict=True):
            queries, keys, values = project(config, layer, x, torch.arange(start, end))
            enter(cache, start, keys, values, cache_dtype)
            parts = []
            for low in range(start, end, block):
                rows = queries[:, low - start : min(low + block, end) - start]
                attended, probabilities = attend(cache, rows, low)
                parts.append(attended)
                layer_sums[..., : low + rows.shape[1]] += probabilities[
                    :, :, max(0, total - observed - low) :
                ].sum(2)
            x = after_attention(config, layer, x, torch.cat(parts, 1))
        if end < total:
            for cache in caches:
                tiers = cache.tiers[:, :end]
                move(
                    cache,
                    np.where(
                        (tiers == RECENT) & (np.arange(end) < end - policy.window),
                        np.uint8(HIGH),
                        tiers,
                    ),
                    policy,
                )
    for cache, layer_sums in zip(caches, sums, strict=True):
        # sums first, then the maximum over the query heads
        cache.significance[:, :total] = layer_sums.amax(1)
    return Prefilled(caches, head(model, x[-1]), total, observed)


@quiet()
def decode(model, prefilled, next_tokens, policy=None, cache_dtype=torch.bfloat16):
    """Feed next_tokens one at a time; `policy=None` is the full cache. `prefilled` is left as it
    was.
    """
    caches, seen, observed = copy.deepcopy(prefilled.caches), prefilled.seen, prefilled.observed
    run = Run(torch.zeros(len(next_tokens), model.config.vocab_size), None, None, [])
    if policy:
        run.events.append(event(caches, seen, observed, policy, after_prompt=True))
    for step, token in enumerate(next_tokens, 1):
        x = model.model.embed_tokens.weight[token][None]
        for layer, cache in zip(model.model.layers, caches, strict=True):
            queries, keys, values = project(model.config, layer, x, torch.tensor([seen]))
            enter(cache, seen, keys, values, cache_dtype)
            attended, probabilities = attend(cache, queries, seen)
            cache.significance[:, : seen + 1] += probabilities[:, :, 0].amax(1)
            x = after_attention(model.config, layer, x, attended)
        run.logits[step - 1] = head(model, x[0])
        seen, observed = seen + 1, observed + 1
        if policy and step % policy.flush == 0:
            run.events.append(event(caches, seen, observed, policy))
        run.checksums.append(zlib.crc32(tier_map(caches, seen)))
    run.tiers = tier_map(caches, seen)
    run.fractions = np.stack([(run.tiers == tier).mean(axis=-1) for tier in range(4)], axis=-1)
    return run


def metrics(full_logits, other_logits, next_tokens):
    """Both logits [steps, vocab]; next_tokens[i] is the true token that row i predicts (so one
    later than the token fed).
    """
    full, other = (
        torch.as_tensor(logits).double().log_softmax(-1) for logits in (full_logits, other_logits)
    )
    kl = (full.exp() * (full - other)).sum(-1)
    target = torch.as_tensor(next_tokens)[:, None]
    return {
        "mean_kl": kl.mean().item(),
        "p99_kl": kl.quantile(0.99).item(),
        "top1": (full.argmax(-1) == other.argmax(-1)).double().mean().item(),
        "perplexity_full": full.gather(1, target).neg().mean().exp().item(),
        "perplexity": other.gather(1, target).neg().mean().exp().item(),
    }
