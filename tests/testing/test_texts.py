import pytest

from diffkv_jax.testing import texts


@pytest.mark.parametrize(
    ("text", "opening", "inside", "least"),
    [
        (
            texts.hamlet,
            "Hamlet\n\nACT I\n",
            "To be, or not to be: that is the question:\nWhether",
            170_000,
        ),
        (texts.king_james, "Genesis 1\n\nIn the beginning God created", "\nJohn 11\n", 4_000_000),
        (texts.stdlib_source, "# Author: Steven J. Bethard", "class ArgumentParser", 400_000),
    ],
)
def test_text(text, opening, inside, least):
    assert text().startswith(opening)
    assert inside in text()
    assert len(text()) >= least


def test_no_markup_is_left_in_hamlet():
    assert not set("*_#\\") & set(texts.hamlet())
    assert "[Aside]" in texts.hamlet()


def test_unknown_text():
    with pytest.raises(ValueError, match="name='macbeth' must be one of"):
        texts.load_text("macbeth")
