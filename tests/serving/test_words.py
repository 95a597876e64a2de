"""Text as it streams: whole characters, no stop string, nothing taken back."""

import pytest
from engines import check_pool_whole, engine, finish
from hypothesis import given, settings, strategies as st

from diffkv_jax.serving.text import Words, as_stop

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """One token a byte: characters beyond ASCII take two to four."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({x: i for i, x in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def streamed(tokenizer, text: str, stop=()) -> tuple[list[str], Words]:
    words = Words(tokenizer, stop)
    parts = [words.take(token) for token in tokenizer.encode(text).ids]
    return [*parts, words.end()], words


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(min_size=1, max_size=30))
def test_any_text_comes_whole(bytes_tokenizer, text):
    parts, words = streamed(bytes_tokenizer, text)
    assert "".join(parts) == words.text == bytes_tokenizer.decode(bytes_tokenizer.encode(text).ids)
    assert text == words.text or "\ufffd" in text + words.text


def test_half_a_character_waits(bytes_tokenizer):
    parts, _ = streamed(bytes_tokenizer, "é🙂")
    assert parts == ["", "é", "", "", "", "🙂", ""]


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one. Two", ["."], "one"),
        ("one STOP two", ["STOP"], "one "),
        ("one STO", ["STOP"], "one STO"),  # shown at the end: nothing came of it
        ("aaab", ["aab"], "a"),  # begins anew within itself
        ("abcabd", ["abd", "bca"], "a"),  # the first of them
        ("x🙂y", ["🙂"], "x"),
        ("nothing", [], "nothing"),
    ],
)
def test_stop_strings(bytes_tokenizer, text, stop, shown):
    parts, words = streamed(bytes_tokenizer, text, stop)
    assert words.text == "".join(parts) == shown
    assert words.stopped == (shown != text)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_was_shown_is_never_taken_back(bytes_tokenizer, text, stop):
    parts, words = streamed(bytes_tokenizer, text, stop)
    found = [text.find(one) for one in stop if one in text]
    # a stop string that ends first wins
    ends = [text.find(one) + len(one) for one in stop if one in text]
    expected = text
    if found:
        seen = text[: min(ends)]
        expected = seen[: min(at for one in stop if (at := seen.find(one)) >= 0)]
    assert "".join(parts) == words.text == expected


def test_a_stop_string_ends_a_request_and_gives_its_pages_back(bytes_tokenizer):
    from tokenizers import Tokenizer, decoders, models

    letters = [chr(0x4E00 + i) for i in range(97)]
    made = Tokenizer(models.WordLevel({x: i for i, x in enumerate(letters)}, unk_token=letters[0]))
    made.decoder = decoders.Fuse()
    plain = engine(tokenizer=made)
    first = plain.submit([1, 2, 3], max_new_tokens=40, sampling="sample", seed=3)
    finish(plain)
    assert first.text == "".join(letters[i] for i in first.tokens)
    stop = first.text[10:12]
    cut = first.text.index(stop)
    request = plain.submit([1, 2, 3], max_new_tokens=40, sampling="sample", seed=3, stop=stop)
    events = finish(plain)
    assert (request.text, request.finish_reason) == (first.text[:cut], "stop")
    assert request.tokens == first.tokens[: cut + 2]
    assert plain.submit(letters[5]).prompt.tolist() == [5]
    assert "".join(event.text for event in events) == request.text
    finish(plain)
    check_pool_whole(plain)


def test_bad_stops_are_refused(bytes_tokenizer):
    for stop in (3, [""], ["a", 3]):
        with pytest.raises((TypeError, ValueError), match="stop"):
            as_stop(stop, bytes_tokenizer)
    with pytest.raises(ValueError, match="tokenizer="):
        as_stop("a", None)
    assert as_stop("ab", bytes_tokenizer) == ("ab",) and as_stop((), None) == ()
