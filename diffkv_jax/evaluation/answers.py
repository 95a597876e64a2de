"""`answers`: greedy answers of a model with a compressed cache, in batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
from tqdm import tqdm

from diffkv_jax.arguments import integer, refuse
from diffkv_jax.batching import check_context
from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.report import memory_report
from diffkv_jax.calibration.calibration import Calibration
from diffkv_jax.generate import GenerateOutput, generate
from diffkv_jax.inputs import as_policy
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.policy import CompressionPolicy

STRIDE = 64  # tokens between two looks for the texts that end an answer
Prompt = str | Sequence[int]


class RunOptions(TypedDict, total=False):
    """How the problems of a task are run.

    Attributes:
        batch_size: problems at once; 4 when not given.
        calibration: what `calibrate` made, where the policy learns.
        cache_dtype: dtype of exact tokens; the model's when None.
        prefill_chunk: tokens of a prompt's chunk, as for `generate`.
        progress: the name of a progress bar; None shows none.
    """

    batch_size: int
    calibration: Calibration | None
    cache_dtype: str | None
    prefill_chunk: int
    progress: str | None


@dataclass(frozen=True)
class Answers:
    """What was written.

    Attributes:
        turns: the texts, `[turn][problem]`.
        of_bf16: allocated bytes of the caches at the end, as a share of a plain bfloat16 cache.
    """

    turns: tuple[tuple[str, ...], ...]
    of_bf16: float


def answers(
    model: CausalLM,
    params: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    policy: CompressionPolicy | str | None,
    *,
    turns: Sequence[Sequence[str]] = (),
    max_new_tokens: int = 128,
    until: Sequence[str] = (),
    **options: Unpack[RunOptions],
) -> Answers:
    """The greedy answer to each of `prompts`, texts or token ids.

    With `turns`, each a list of one question a prompt, a prompt is only read and compressed, and
    the questions go after it one by one, each behind the answer to the one before. An answer ends
    before the first of the texts `until`.

    Raises:
        TypeError, ValueError: bad input, named; more tokens than the model's context.
    """
    # what the policy costs is measured here
    given: dict[str, Any] = {"policy": as_policy(policy), "strict": None, **options}
    size = integer("batch_size", given.pop("batch_size", 4), least=1)
    most = integer("max_new_tokens", max_new_tokens, least=1)
    progress, chunk = given.pop("progress", None), given.pop("prefill_chunk", 1024)
    if not len(prompts):
        refuse("prompts", prompts, "at least one: give problems")
    rows = [[encoded(tokenizer, prompt)] for prompt in prompts]
    for turn in turns:
        for row, question in zip(rows, turn, strict=True):
            row.append(encoded(tokenizer, question, begins=False))
    given["max_len"] = _room(model, rows, most)
    writer = _Writer(model, params, tokenizer, most, until, chunk)
    found: list[list[str]] = [[] for _ in range(max(len(turns), 1))]
    batches = np.array_split(np.arange(len(rows)), -(-len(rows) // size))
    used = plain = 0
    for batch in tqdm(batches, desc=progress, disable=progress is None, unit=" batches"):
        texts, cache = _converse(writer, [rows[i] for i in batch], given)
        for turn, part in zip(found, texts, strict=True):
            turn += part
        report = memory_report(cache)
        used, plain = used + report.allocated, plain + report.bf16
    return Answers(tuple(map(tuple, found)), used / max(plain, 1))


def encoded(tokenizer: Any, text: Prompt, *, begins: bool = True) -> list[int]:
    """Token ids of a text, with the tokens that begin one where it `begins`."""
    if not isinstance(text, str):
        return list(text)
    return list(tokenizer(text, add_special_tokens=begins).input_ids)


def _room(model: CausalLM, rows: list[list[list[int]]], most: int) -> int:
    """Tokens that the longest conversation may come to, rounded up where the model allows, so that
    prompts of nearly the same length share their programs.
    """
    turns = max(len(rows[0]) - 1, 1)
    longest = max(sum(map(len, row)) for row in rows) + turns * most
    check_context(model.attention, np.array([longest]), longest)
    return min(-(-longest // 128) * 128, model.attention.max_position_embeddings)


@dataclass(frozen=True)
class _Writer:
    """Has the model write until every request has ended or has its `most` tokens."""

    model: CausalLM
    params: Any
    tokenizer: Any
    most: int
    until: Sequence[str]
    prefill_chunk: int

    def __call__(self, prompts: list, **options: Any) -> tuple[list[str], KVCache]:
        """The texts of the requests, and the cache."""
        stride = min(self.most, STRIDE) if self.until else self.most
        ids: list[list[int]] = [[] for _ in prompts]
        out = self.run(prompts, stride, **options)
        while True:
            for row, tokens, length in zip(ids, out.tokens, out.lengths, strict=True):
                row += tokens[:length].tolist()
            texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
            live = [
                reason == "length" and len(row) < self.most and cut(text, self.until) == text
                for reason, row, text in zip(out.finish_reason, ids, texts, strict=True)
            ]
            if not any(live):
                return [cut(text, self.until) for text in texts], out.cache
            longest = max(len(row) for row, goes_on in zip(ids, live, strict=True) if goes_on)
            prompts = [[] if goes_on else None for goes_on in live]
            out = self.run(prompts, min(stride, self.most - longest), cache=out.cache)

    def run(self, prompts: list, most: int, **options: Any) -> GenerateOutput:
        chunk = {"prefill_chunk": self.prefill_chunk, "progress": False}
        return generate(self.model, self.params, prompts, max_new_tokens=most, **chunk, **options)


def _converse(
    writer: _Writer, rows: list[list[list[int]]], given: dict[str, Any]
) -> tuple[list[list[str]], KVCache]:
    """Texts `[turn][request]` of a batch whose rows hold a prompt and then questions; the cache."""
    first, *turns = zip(*rows, strict=True)
    if not turns:
        texts, cache = writer(list(first), **given)
        return [texts], cache
    cache, found = writer.run(list(first), 0, **given).cache, []
    for turn in turns:
        texts, cache = writer(list(turn), cache=cache)
        found.append(texts)
    return found, cache


def cut(text: str, until: Sequence[str]) -> str:
    """`text` before the first of `until`."""
    return text[: min([text.find(end) for end in until if end in text], default=len(text))]
