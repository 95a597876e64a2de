"""SmolLM2-135M-Instruct from its GGUF file, against `transformers` on torch: same tokens, same
text, and no torch on our side.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax.models import build_model, load_pretrained, param_shapes
from diffkv_jax.models.fill import fill_params
from diffkv_jax.models.load import convert_pretrained
from helpers_model import same_trees, smollm2_gguf_path, transformers_from_gguf

pytestmark = [pytest.mark.slow, pytest.mark.optimized]
MESSAGES = [{"role": "user", "content": "Explain in a few sentences why the sky is blue."}]
NEW_TOKENS = 64
LENGTH = 128
TEXTS = [
    "The capital of Italy is Rome.",
    "def f(x: int) -> int:\n    return x + 1  # comment\n\n\tindented\r\n",
    "naïve café, Ελληνικά, 日本語, हिन्दी, عربى, 🙂👩‍👩‍👧",
    "In 1984 there were 2,345.67 of them; 3rd and a1b22",
    "It's we're they'll I'd   three spaces   ",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<repo_name>x<file_sep>y <|endoftext|>",
    "e\u0301 is not é; zero\u200bwidth",
    "",
]


@cache
def loaded() -> Any:
    return load_pretrained(smollm2_gguf_path(), "float32")


@cache
def reference_tokenizer() -> Any:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = smollm2_gguf_path()
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def prompt() -> list[int]:
    return loaded().tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )


def ours_greedy(start: list[int]) -> list[int]:
    """Greedy decoding by the whole forward pass each step, at one fixed length so that it compiles
    once.
    """
    model, params, _ = loaded()

    @jax.jit
    def next_token(params: Any, tokens: jax.Array, length: jax.Array) -> jax.Array:
        positions = jnp.where(jnp.arange(LENGTH) < length, jnp.arange(LENGTH), -1)[None]
        logits, _ = model.apply({"params": params}, tokens, positions)
        return jnp.argmax(logits[0, length - 1])

    tokens = list(start)
    for _ in range(NEW_TOKENS):
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(next_token(params, jnp.asarray(padded), jnp.asarray(len(tokens)))))
    return tokens[len(start) :]


def reference_greedy(start: list[int]) -> list[int]:
    torch = pytest.importorskip("torch")
    model = transformers_from_gguf(smollm2_gguf_path())
    tokens = torch.tensor([start])
    with torch.no_grad():
        past = None
        out: list[int] = []
        step = tokens
        for _ in range(NEW_TOKENS):
            result = model(step, past_key_values=past, use_cache=True)
            past = result.past_key_values
            step = result.logits[:, -1].argmax(-1, keepdim=True)
            out.append(int(step))
    return out


def test_greedy_tokens_are_those_of_transformers() -> None:
    start = prompt()
    ours = ours_greedy(start)
    assert ours == reference_greedy(start)
    text = loaded().tokenizer.decode(ours)
    print(text)
    assert "scatter" in text.lower() or "light" in text.lower()


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_are_those_of_transformers(text: str) -> None:
    tokenizer, reference = loaded().tokenizer, reference_tokenizer()
    assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_is_that_of_transformers() -> None:
    tokenizer, reference = loaded().tokenizer, reference_tokenizer()
    for messages in (
        MESSAGES,
        [
            {"role": "system", "content": "Be brief."},
            *MESSAGES,
            {"role": "assistant", "content": "Because."},
        ],
    ):
        for flag in (False, True):
            ours = tokenizer.apply_chat_template(
                messages, add_generation_prompt=flag, return_dict=False
            )
            assert ours == reference.apply_chat_template(
                messages, add_generation_prompt=flag, return_dict=False
            )
    assert tokenizer.special_tokens_map == reference.special_tokens_map


def test_digits_split_before_spaces() -> None:
    """SmolLM's own rule: digits stand alone first, so two spaces before one are a token.
    transformers' GGUF path leaves that out.
    """
    tokenizer = loaded().tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a  1")) == ["a", "ĠĠ", "1"]


def test_converted_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    convert_pretrained(smollm2_gguf_path(), tmp_path / "out", "float32")
    again: Any = load_pretrained(tmp_path / "out")
    assert same_trees(loaded().params, again.params)
    assert loaded().model == again.model
    for text in [*TEXTS, "a  1"]:
        assert again.tokenizer.encode(text) == loaded().tokenizer.encode(text)
    ours = loaded().tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert again.tokenizer.apply_chat_template(MESSAGES, tokenize=False) == ours


def test_weights_take_at_most_twice_their_decoding() -> None:
    """Beside reading the file's bytes and `gguf.dequantize` in NumPy; the best of three each."""
    from gguf.quants import dequantize

    from diffkv_jax.models.gguf_reader import WholeArrays
    from diffkv_jax.models.gguf_source import GGUFSource

    path = smollm2_gguf_path()
    shapes = param_shapes(build_model(loaded().model.config, "bfloat16"))
    tensors = WholeArrays(path).tensors

    def decode() -> None:
        np.fromfile(path, np.uint8)
        for tensor in tensors:
            dequantize(tensor.data, tensor.tensor_type)

    def fill() -> None:
        fill_params(GGUFSource(path), shapes, origin="")

    def best(run: Callable[[], None]) -> float:
        times = []
        for _ in range(3):
            began = time.process_time()
            run()
            times.append(time.process_time() - began)
        return min(times)

    ours, theirs = best(fill), best(decode)
    assert ours < 2 * theirs, (ours, theirs)


WITHOUT_TORCH = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
def without_torch(name, *rest):
    return None if name.split(".")[0] == "torch" else find(name, *rest)
importlib.machinery.PathFinder.find_spec = without_torch
from diffkv_jax.models.load import convert_pretrained, load_pretrained
model, params, tokenizer = load_pretrained(sys.argv[1])
assert tokenizer.decode(tokenizer.encode("Hello there")) == "Hello there"
convert_pretrained(sys.argv[1], sys.argv[2], "bfloat16")
again = load_pretrained(sys.argv[2], "bfloat16").tokenizer
assert again.encode("Hello there") == tokenizer.encode("Hello there")
assert "torch" not in sys.modules
"""


def test_nothing_needs_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(smollm2_gguf_path()), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
