"""A tokenizer of characters for tests of evaluation: no files, no packages."""

from types import SimpleNamespace

LETTERS = "".join(map(chr, range(32, 127))) + "\n"


class Characters:
    """Token i is the i-th of `LETTERS`; `begin` is put before a text that begins."""

    def __init__(self, *, begin: int | None = None, chat: bool = False):
        self.begin, self.chat_template = begin, "chat" if chat else None

    def __call__(self, text: str, add_special_tokens: bool = True, **_) -> SimpleNamespace:
        ids = [max(LETTERS.find(letter), 0) for letter in text]
        first = [self.begin] if add_special_tokens and self.begin is not None else []
        return SimpleNamespace(input_ids=first + ids)

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        return "".join(LETTERS[i] for i in ids if i < len(LETTERS))

    def apply_chat_template(self, talk, tokenize: bool, add_generation_prompt: bool) -> str:
        assert add_generation_prompt and not tokenize
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in talk) + "<assistant>"
