"""Text of generated tokens as they come: whole characters only, and nothing that a stop string
takes back.
"""

from collections.abc import Sequence
from typing import Any

from diffkv_jax.arguments import refuse


class Words:
    """The text of one request.

    Attributes:
        text: what may be shown; never taken back.
        stopped: whether a stop string has come; `text` ends before it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._begin()
        self._stop = tuple(stop)
        self._held = ""  # could become a stop string
        self.text, self.stopped = "", False

    def take(self, token: int) -> str:
        """What the next token adds to `text`."""
        if self.stopped:
            return ""
        self._held += self._decoded(token)
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._show(min(found))
        return self._show(len(self._held) - self._could_begin())

    def end(self) -> str:
        """What was held back, once no token follows."""
        return "" if self.stopped else self._show(len(self._held))

    def _begin(self) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=True)

    def _decoded(self, token: int) -> str:
        try:
            return self._stream.step(self._tokenizer, int(token)) or ""
        except Exception as error:
            if "Invalid prefix" not in str(error):
                raise
            # bytes that no character begins with changed what came before (tokenizers#1766)
            self._begin()
            return self._stream.step(self._tokenizer, int(token)) or ""

    def _could_begin(self) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = max(map(len, self._stop), default=1) - 1
        ends = (self._held[-n:] for n in range(min(longest, len(self._held)), 0, -1))
        return next((len(end) for end in ends if any(s.startswith(end) for s in self._stop)), 0)

    def _show(self, count: int) -> str:
        new, self._held = self._held[:count], self._held[count:]
        self.text += new
        return new


def as_stop(stop: Any, tokenizer: Any) -> tuple[str, ...]:
    """Stop strings as users give them: one, or a list.

    Raises:
        TypeError, ValueError: not such strings, or there is no tokenizer to look for them.
    """
    given = (stop,) if isinstance(stop, str) else () if stop is None else stop
    rule = "a string, or a list of strings that are not empty"
    if not isinstance(given, Sequence) or not all(isinstance(s, str) for s in given):
        refuse("stop", stop, rule, True)
    if not all(given):
        refuse("stop", stop, rule)
    if given and tokenizer is None:
        raise ValueError("stop= looks at text: make the engine with tokenizer=")
    return tuple(given)
