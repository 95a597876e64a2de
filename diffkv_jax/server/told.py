"""Answers in the form of OpenAI's API: choices, log-probabilities, chunks of a stream, usage."""

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffkv_jax.server.asked import Asked, Chat
from diffkv_jax.server.errors import SERVER, ApiError
from diffkv_jax.serving import Event, TokenLogprob

REASONS = {"eos": "stop", "stop": "stop", "length": "length", "cache_full": "length"}


class TokenTexts:
    """Text of single tokens."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)

    def __call__(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def shown(self, token: int) -> int:
        """Characters of it in an answer: none of special tokens."""
        return len(self._tokenizer.decode([token], skip_special_tokens=True))


@dataclass
class Choice:
    """One choice of an answer, as far as it has come."""

    index: int
    text: str = ""
    num_tokens: int = 0
    offset: int = 0  # characters of the tokens whose log-probabilities were told
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None

    def take(self, event: Event) -> None:
        """
        Raises:
            ApiError: the request ended without an answer.
        """
        self.text += event.text
        self.num_tokens += len(event.tokens)
        if event.finish_reason is not None:
            self.reason = _reason(event.finish_reason, self.num_tokens)


def _reason(reason: str, num_tokens: int) -> str:
    """OpenAI's word for `Request.finish_reason`. "cache_full" is "length" where something came of
    the request, else an error, as are all ends that are no answer.
    """
    if reason == "cache_full" and not num_tokens:
        message = "the cache cannot hold this request"
        raise ApiError(503, message, kind=SERVER, code="cache_full")
    if reason == "error":
        raise ApiError(500, "the model's logits are not finite", kind=SERVER, code="not_finite")
    if reason not in REASONS:
        raise ApiError(503, f"the request was {reason}", kind=SERVER, code=reason)
    return REASONS[reason]


class Answer:
    """Collects the events of a request body, or tells them chunk by chunk."""

    def __init__(self, body: Asked, count: int, prompt_tokens: int, texts: TokenTexts):
        self.is_chat, self.model = isinstance(body, Chat), body.model
        self.include_usage, self.prompt_tokens = body.include_usage, prompt_tokens
        self.choices = [Choice(index) for index in range(count)]
        self._texts, self._created = texts, int(time.time())
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        self._id = f"{prefix}-{secrets.token_hex(12)}"
        self._with_logprobs = body.top_logprobs_told is not None

    def take(self, index: int, event: Event) -> None:
        """Add what a step told of a choice."""
        choice = self.choices[index]
        if self._with_logprobs:
            choice.logprobs.append(self._logprobs(choice, event.logprobs))
        choice.take(event)

    def whole(self) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        return {**self._head(""), "choices": [*map(self._whole, self.choices)], **self._usage()}

    def beginning(self) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        if not self.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(choice.index, delta=delta) for choice in self.choices]

    def chunks(self, index: int, event: Event) -> list[dict[str, Any]]:
        """Take an event, and tell it."""
        choice = self.choices[index]
        choice.take(event)
        told = self._logprobs(choice, event.logprobs) if self._with_logprobs else None
        found, reason = [], choice.reason
        if not self.is_chat:
            if event.text or event.logprobs or reason:
                found = [self._chunk(index, told, reason, text=event.text)]
            return found
        if event.text or event.logprobs:
            found.append(self._chunk(index, told, delta={"content": event.text}))
        if reason:
            found.append(self._chunk(index, None, reason, delta={}))
        return found

    def ending(self) -> list[dict[str, Any]]:
        """Chunks after the last token."""
        whole = {**self._head(".chunk"), "choices": [], **self._usage()}
        return [whole] if self.include_usage else []

    # --- parts

    def _head(self, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self.is_chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}

    def _usage(self) -> dict[str, Any]:
        generated = sum(choice.num_tokens for choice in self.choices)
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        return {"usage": usage}

    def _whole(self, choice: Choice) -> dict[str, Any]:
        told = _joined(choice.logprobs) if self._with_logprobs else None
        text: dict[str, Any] = {"text": choice.text}
        if self.is_chat:
            text = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        end = {"logprobs": told, "finish_reason": choice.reason}
        return {"index": choice.index, **text, **end}

    def _chunk(
        self, index: int, told: Any = None, reason: str | None = None, **text: Any
    ) -> dict[str, Any]:
        choice = {"index": index, **text, "logprobs": told, "finish_reason": reason}
        usage = {"usage": None} if self.include_usage else {}
        return {**self._head(".chunk"), "choices": [choice], **usage}

    def _logprobs(self, choice: Choice, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        if self.is_chat:
            return {"content": [self._chat_logprob(one) for one in told], "refusal": None}
        found: dict[str, list] = {
            "tokens": [self._texts(one.token) for one in told],
            "token_logprobs": [_finite(one.logprob) for one in told],
            "top_logprobs": [self._top(one) for one in told],
            "text_offset": [],
        }
        for one in told:
            found["text_offset"].append(choice.offset)
            choice.offset += self._texts.shown(one.token)
        return found

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        """The drawn token too, as OpenAI has it; of ids with equal text the likeliest."""
        found = {}
        for token, logprob in (*one.top, (one.token, one.logprob)):
            found.setdefault(self._texts(token), _finite(logprob))
        return found

    def _chat_logprob(self, one: TokenLogprob) -> dict[str, Any]:
        top = [self._token(*pair) for pair in one.top]
        return {**self._token(one.token, one.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        """`bytes` is None where the token is a part of a character."""
        text = self._texts(token)
        whole = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": whole}


def _finite(logprob: float) -> float:
    """OpenAI's value for the ones that JSON has no number for."""
    return max(logprob, -9999.0)


def _joined(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in parts:
        for name, values in part.items():
            found[name] = values if values is None else [*found.get(name, ()), *values]
    return found
