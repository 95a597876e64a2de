"""Converters of arguments: what is accepted, as what, and what the errors say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax import arguments


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3), jnp.int32(3)])
def test_integers_of_every_kind(value):
    found = arguments.integer("window", value, least=1)
    assert found == 3 and type(found) is int


INTEGERS = {
    "bool": (True, TypeError, "window=True must be an integer of at least 1"),
    "NumPy bool": (np.bool_(True), TypeError, "must be an integer"),
    "text": ("3", TypeError, "window='3' must be an integer of at least 1"),
    "None": (None, TypeError, "window=None must be"),
    "a list": ([3], TypeError, r"window=\[3\] must be"),
    "an array": (np.array([3]), TypeError, "must be an integer"),
    "object array": (np.array(None), TypeError, "must be an integer"),
    "time": (np.timedelta64(3), TypeError, "must be an integer"),
    "random key": (jax.random.key(0), TypeError, "must be an integer"),
    "float": (2.0, ValueError, r"window=2\.0 must be an integer"),
    "NaN": (float("nan"), ValueError, "window=nan must be an integer"),
    "infinite": (float("inf"), ValueError, "window=inf must be an integer"),
    "NumPy float": (np.float32(2), ValueError, "must be an integer"),
    "low": (0, ValueError, "window=0 must be an integer of at least 1$"),
    "beyond int32": (2**31, ValueError, "must be an integer from 1 to 2147483647"),
    "digits without end": (
        10**5000,
        ValueError,
        "window=<int> must be an integer from 1 to 2147483647",
    ),
}


@pytest.mark.parametrize("case", INTEGERS)
def test_refused_integers(case):
    value, error, message = INTEGERS[case]
    with pytest.raises(error, match=message):
        arguments.integer("window", value, least=1)


def test_multiples():
    assert arguments.integer("group", np.int64(64), least=32, most=256, multiple=32) == 64
    for value, bound in ((33, "from 32 to 256"), (288, "from 32 to 256"), (0, "of at least 32")):
        with pytest.raises(ValueError, match=f"group={value} must be a multiple of 32 {bound}"):
            arguments.integer("group", value, least=32, most=256, multiple=32)


def test_integers_without_bound():
    assert arguments.integer("bytes", 10**30, most=None) == 10**30
    assert arguments.integer("bytes", -5) == -5
    assert arguments.integer("bytes", None, optional=True) is None


@pytest.mark.parametrize(
    "value",
    [0.5, np.float64(0.5), np.float16(0.5), np.longdouble(0.5), np.array(0.5), jnp.bfloat16(0.5)],
)
def test_numbers_of_every_kind(value):
    found = arguments.number("t", value, least=0, most=1)
    assert found == 0.5 and type(found) is float


def test_integers_are_numbers_and_zero_has_no_sign():
    assert repr(arguments.number("t", np.int32(1))) == "1.0"
    assert repr(arguments.number("t", -0.0)) == "0.0"
    assert arguments.number("t", None, optional=True) is None


NUMBERS = {
    "bool": (False, TypeError, "t=False must be a number above 0 and up to 1"),
    "text": ("0.5", TypeError, "t='0.5' must be"),
    "complex": (0.5j, TypeError, "must be a number"),
    "NaN": (float("nan"), ValueError, "t=nan must be a number"),
    "infinite": (-float("inf"), ValueError, "t=-inf must be a number"),
    "no float": (10**400, ValueError, "must be a number"),
    "no float32": (1e-320, ValueError, "0 or at least 1.18e-38"),
    "at the bound": (0.0, ValueError, "t=0.0 must be a number above 0 and up to 1"),
    "beyond": (1.5, ValueError, "t=1.5 must be"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_refused_numbers(case):
    value, error, message = NUMBERS[case]
    with pytest.raises(error, match=message):
        arguments.number("t", value, above=0, most=1)


def test_values_known_only_when_running():
    for convert in (arguments.integer, arguments.number, arguments.flag):
        with pytest.raises(TypeError, match="window=.* must be known when compiling"):
            jax.jit(lambda x, convert=convert: convert("window", x))(3)
    with pytest.raises(TypeError, match="window=.* must be known when compiling"):
        jax.jit(lambda x: arguments.nested("window", x, arguments.number, axes=1))(jnp.ones(2))


def test_flags():
    assert (
        arguments.flag("nested", np.bool_(True)) is True
        and arguments.flag("nested", jnp.array(False)) is False
    )
    for value in (1, 0, None, "False", np.array([True])):
        with pytest.raises(TypeError, match="nested=.* must be True or False"):
            arguments.flag("nested", value)


def test_choices():
    assert type(arguments.one_of("group", np.str_("max"), ("max", "mean"))) is str
    assert arguments.one_of("group", None, ("max",), optional=True) is None
    with pytest.raises(ValueError, match="group='min' must be 'max' or 'mean'$"):
        arguments.one_of("group", "min", ("max", "mean"))
    with pytest.raises(TypeError, match=r"group=\['max'\] must be one of 'max', 'mean' or None"):
        arguments.one_of("group", ["max"], ("max", "mean"), optional=True)


def test_lists_of_integers():
    def ids(value):
        return arguments.token_ids("protect", value)

    for value in ([1, 2], (1, np.int8(2)), range(1, 3), np.array([1, 2]), jnp.array([1, 2])):
        assert ids(value) == (1, 2) and {type(i) for i in ids(value)} == {int}
    for value in ("12", b"12", {1: 2}, {1, 2}, None, 5, np.array(1)):
        with pytest.raises(
            TypeError, match="protect=.* must be a list of token ids: integers of at least 0$"
        ):
            ids(value)
    for value, held in (
        ([1, -1], -1),
        ([0.5], 0.5),
        (np.array([2**31]), 2**31),
        ([[1]], "."),
        ([True], True),
        ([None], None),
    ):
        with pytest.raises(
            ValueError,
            match=f"protect=.* must be token ids: integers of at least 0; it holds .*{held}",
        ):
            ids(value)


def test_lists_of_texts():
    def names(value):
        return arguments.tuple_of("tiers", value, arguments.text, "a list of names")

    assert [type(entry) for entry in names([np.str_("full")])] == [str]
    assert arguments.tuple_of("rope", None, arguments.number, "a list", optional=True) is None
    for value in ("full", None, [None], [b"full"], {"full"}, np.array(["full"], object)[0]):
        with pytest.raises(TypeError, match="tiers=.* must be a list of names"):
            names(value)


def test_paths(tmp_path):
    assert arguments.file_path("path", str(tmp_path)) == tmp_path
    assert arguments.file_path("path", tmp_path / "not there") == tmp_path / "not there"
    for value in ("a\0b", "a" * 5000, "~nobody-has-this-name/x"):
        with pytest.raises(ValueError, match="path=.* must be the path"):
            arguments.file_path("path", value)
    for value in (None, 3, b"x", ["x"]):
        with pytest.raises(TypeError, match="path=.* must be the path"):
            arguments.file_path("path", value)


def test_a_wrong_type_is_a_bad_value_too():
    for error in (TypeError, ValueError):
        with pytest.raises(error):
            arguments.integer("window", None)


def test_nested_values():
    def shares(value):
        return arguments.nested("keep", value, arguments.number, axes=2)

    assert shares(np.float32(0.5)) == 0.5
    assert shares([[0.5, 1], np.array([0.25, 1])]) == ((0.5, 1.0), (0.25, 1.0))
    endless = []
    endless.append(endless)
    for value in ([], [[]], [[0.5], [0.5, 1]], [0.5, [0.5]], [[[0.5]]], endless, np.zeros((2, 0))):
        with pytest.raises(
            ValueError,
            match="keep=.* must be one value or nested lists of equal shapes, with up to 2 axes",
        ):
            shares(value)
    with pytest.raises(TypeError, match="keep=None must be a finite number"):
        shares([0.5, None])


def test_shown():
    assert arguments.shown("x") == "'x'"
    assert len(arguments.shown(list(range(10**5)))) < 200
