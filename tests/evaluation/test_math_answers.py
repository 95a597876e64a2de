"""Answers taken out of what a model wrote, and compared."""

import json
from pathlib import Path

import pytest

from diffkv_jax.evaluation.math_answers import (
    boxed,
    final_number,
    same_expression,
    same_number,
)
from diffkv_jax.evaluation.math_problems import read_gsm8k, read_math500


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $18 a day.\n#### 18", "18"),
        (r"so 3 + 4 = 7. \boxed{1,234} is it, not 5", "1,234"),
        ("first 3, then 5.5 dollars", "5.5"),
        ("It is -4.", "-4"),
        (r"\boxed{x} of 12", "12"),
        ("none", None),
    ],
)
def test_final_numbers(text, number):
    assert final_number(text) == number


def test_numbers_are_compared_as_numbers():
    assert same_number("$1,234.00", "1234") and same_number("70000", "70,000")
    assert not same_number("18", "19") and not same_number(None, "18") and not same_number("x", "x")


def test_the_last_closed_box_counts():
    assert boxed(r"\boxed{1} then \boxed{\frac{1}{2}} and \boxed{3") == r"\frac{1}{2}"
    assert boxed(r"is \boxed 7.") == "7"
    assert boxed("no box") is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})"),
        (r"\frac12", "1/2"),
        (r"\frac{1}2", r"\frac{1}{2}"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"x = 5", "5"),
        (r"90^\circ", "90"),
        (r"10\%", "10"),
        (r"12\text{ cm}", "12"),
        (r"\text{Evelyn}", "Evelyn"),
        ("1,000", "1000"),
        (".5", "0.5"),
        ("2.0", "2"),
    ],
)
def test_the_same_in_other_words(one, other):
    assert same_expression(one, other) and same_expression(other, one)


@pytest.mark.parametrize(
    ("one", "other"), [("(1,2)", "(1,3)"), ("p - q", "q - p"), (r"\frac{1}{2}", "2"), ("1,2", "12")]
)
def test_other_answers(one, other):
    assert not same_expression(one, other)


def test_files_of_problems(tmp_path: Path):
    rows = [{"question": "q", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}, {"question": "r"}]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [one.answer for one in read_gsm8k(path, 1)] == ["2"]
    with pytest.raises(ValueError, match=r"line 2 is not"):
        read_gsm8k(path)
    with pytest.raises(ValueError, match="there is none: check the path"):
        read_math500(tmp_path / "absent.jsonl")
    path.write_text(json.dumps({"problem": "q", "answer": "x"}))
    assert read_math500(path)[0].question == "q"
    with pytest.raises(ValueError, match="at least 3 problems; it has 1"):
        read_math500(path, 3)
