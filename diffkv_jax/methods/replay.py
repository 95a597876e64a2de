"""What a model is given to read when it goes over a prompt again, chunk by chunk, as data (KVzip,
arXiv:2505.23416).
"""

from functools import partial
from typing import Any

import numpy as np

from diffkv_jax.arguments import IDS, WrongType, integer, shown, token_ids
from diffkv_jax.model import AttentionSpec
from diffkv_jax.policy.stage import Stage, static

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"


def _ids(name: str, value: Any) -> tuple[int, ...]:
    return token_ids(f"replay.{name}", value, IDS)


def _count(name: str, value: Any, least: int) -> int:
    return integer(f"replay.{name}", value, least=least)


class Replay(Stage):
    """Pass number i reads: `first` (i = 0), or `later` and the `overlap` tokens before the chunk;
    `suffix`; chunk i of the prompt.

    Attributes:
        first, later, suffix: token ids, such as `replay_words` makes of a tokenizer; none: only the
            chunk itself.
        chunk: prompt tokens that one pass repeats.
        overlap: prompt tokens before a later chunk, which say where it starts.

    Raises:
        ValueError: one of them is not such ids or such a number.
    """

    first: tuple[int, ...] = static(default=(), convert=_ids)
    later: tuple[int, ...] = static(default=(), convert=_ids)
    suffix: tuple[int, ...] = static(default=(), convert=_ids)
    chunk: int = static(default=2048, convert=partial(_count, least=1))
    overlap: int = static(default=8, convert=partial(_count, least=0))

    def check_prompts(self, attention: AttentionSpec, lengths: np.ndarray) -> None:
        """Refuse ids that the model does not have, and prompts of `lengths` int [R] whose passes
        would outgrow its context.

        Raises:
            ValueError: names the id, or the prompt, the limit and the remedy.
        """
        words = (*self.first, *self.later, *self.suffix)
        if beyond := [i for i in words if i >= attention.vocab_size]:
            raise ValueError(
                f"replay={self} holds token id {beyond[0]}, outside the vocabulary "
                f"[0, {attention.vocab_size})"
            )
        longest = int(lengths.max())
        total = longest + max(
            (len(self.row(np.zeros(longest), at)) for at in range(0, longest, self.chunk)),
            default=0,
        )
        if total > attention.max_position_embeddings:
            raise ValueError(
                f"a prompt of {longest} tokens and a pass that repeats {min(self.chunk, longest)} "
                f"of them come to {total} tokens, and the "
                f"model's context is {attention.max_position_embeddings}; shorten the prompt or "
                f"lower replay.chunk"
            )

    def row(self, prompt: np.ndarray, at: int) -> tuple[int, ...]:
        """What the pass over the chunk at position `at` reads; nothing where the prompt has
        ended.
        """
        if at >= len(prompt):
            return ()
        words = (*self.later, *prompt[max(at - self.overlap, 0) : at]) if at else self.first
        return (*words, *self.suffix, *prompt[at : at + self.chunk])


def replay_words(tokenizer: Any, *, chunk: int = 2048) -> Replay:
    """KVzip's requests to repeat the context in the ids of a Hugging Face tokenizer, and what its
    chat template puts before an answer.

    Raises:
        TypeError: it is no such tokenizer.
        ValueError: `chunk` is no number of tokens, or an id is none.
    """
    if isinstance(tokenizer, str) or not callable(getattr(tokenizer, "encode", None)):
        raise WrongType(
            f"tokenizer={shown(tokenizer)} must be a Hugging Face tokenizer, such as "
            f"load_pretrained returns"
        )

    def ids(text: str) -> tuple[int, ...]:
        return token_ids("tokenizer.encode(...)", tokenizer.encode(text, add_special_tokens=False))

    chunk, suffix = integer("chunk", chunk, least=1), "\n"
    if getattr(tokenizer, "chat_template", None) is not None:
        mark = "##context##"
        message = [{"role": "user", "content": mark}]
        suffix = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=False, enable_thinking=False
        ).split(mark)[-1]
    return Replay(ids(FIRST), ids(LATER), ids(suffix), chunk)
