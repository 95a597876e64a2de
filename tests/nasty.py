"""Values that nobody should give as an argument, among others that anybody may, and what a refusal
must say.

For fuzz tests: `@fuzz` over `@given(...)` draws more examples with DIFFKV_JAX_FUZZ=ci (a minute for
a file) or =hour.
"""

import datetime
import enum
import os
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

import diffkv_jax as dkv

PROFILES = {"quick": 60, "ci": 1500, "hour": 60_000}  # examples of each test
PROFILE = os.environ.get("DIFFKV_JAX_FUZZ", "quick")
fuzz = settings(
    max_examples=PROFILES[PROFILE],
    derandomize=PROFILE == "quick",
    deadline=None,
    # an hour that ends early leaves what it found in .hypothesis/
    database=DirectoryBasedExampleDatabase(".hypothesis") if PROFILE == "hour" else None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


class Number(enum.IntEnum):
    ONE = 1


class Word(str, enum.Enum):  # noqa: UP042 (str() of it is not its value)
    MAX = "max"


class Hostile:
    """Every question that Python asks of a value ends in an error of its own."""

    def _fail(self, *_):
        raise RuntimeError("do not ask")

    __repr__ = __eq__ = __ne__ = __lt__ = __len__ = __bool__ = __iter__ = __int__ = __float__ = (
        __index__
    ) = _fail
    __hash__ = object.__hash__

    def _repr_pretty_(self, printer, cycle):  # Hypothesis shows it by this
        printer.text("Hostile()")


def _endless() -> list:
    own = []
    own.append(own)
    return own


INTEGERS = [
    0,
    1,
    -1,
    2,
    3,
    4,
    8,
    31,
    32,
    64,
    100,
    256,
    2**24 + 1,
    2**31 - 1,
    2**31,
    2**63,
    10**30,
    -(10**30),
    10**4000,
    Number.ONE,
]
FLOATS = [
    float("nan"),
    float("inf"),
    -float("inf"),
    0.0,
    -0.0,
    0.5,
    1.0,
    2.0,
    -0.5,
    1e-320,
    1e-38,
    1e-9,
    1e38,
    1e300,
]
TEXTS = [
    "",
    "64MiB",
    "-1",
    "1e9",
    "pyramid",
    "pooled",
    "K8V4",
    "K4V2:2,4",
    "K4cV4",
    "K4nV4n",
    "full",
    "all",
    "attention",
    "window",
]
TEXTS += [
    "replay",
    "key_norm",
    "snapkv",
    "none",
    "max",
    "mean",
    Word.MAX,
    "\0",
    "\ud800",
    "~nobody/x",
    "a" * 5000,
    "xla",
    "float32",
]
ARRAYS = [
    np.array(1),
    np.array(0.5),
    np.array(True),
    np.array(None),
    np.array([1]),
    np.array([0.5, 1.0]),
    np.zeros(0),
]
ARRAYS += [
    np.full((4, 1, 2), 0.5),
    np.full((1, 1, 1, 1), 0.5),
    np.array(["full"]),
    np.array([1, "x", None], object),
    np.array([[1], [2]]),
]
ARRAYS += [
    jnp.int32(1),
    jnp.float32(0.5),
    jnp.bfloat16(0.5),
    jnp.array(True),
    jnp.arange(2),
    jnp.zeros((2, 0)),
    jax.random.key(0),
]
ARRAYS += [
    jax.random.split(jax.random.key(0)),
    np.zeros(3, [("a", int)]),
    np.array([2**63], np.uint64),
    np.array([1j]),
]
SCALARS = [
    np.int8(1),
    np.uint64(2**63),
    np.int64(64),
    np.float16(0.5),
    np.float32(0.25),
    np.float64(1),
    np.longdouble(0.5),
    np.bool_(1),
]
SCALARS += [
    np.timedelta64(1),
    np.datetime64("2020-01-01"),
    np.str_("max"),
    np.bytes_(b"x"),
    Fraction(1, 2),
    Decimal("0.5"),
    1j,
]
OTHERS = [
    None,
    True,
    False,
    b"K8V4",
    bytearray(b"{}"),
    object(),
    Hostile(),
    [Hostile()],
    ...,
    NotImplemented,
    slice(3),
    _endless(),
]
OTHERS += [
    int,
    dict,
    dkv.CompressionPolicy,
    dkv.snapkv,
    dkv.ada_kv,
    dkv.CompressionPolicy.none,
    dkv.CompressionPolicy.none(),
]
OTHERS += [
    lambda: 1,
    (i for i in ()),
    range(3),
    {},
    {"chunk": 1},
    {"start": None},
    {1: 2},
    {1, 2},
    frozenset(),
    [],
    (),
    [[]],
    [[1], [1, 2]],
]
OTHERS += [
    ["full"],
    ["K8V4", "K4V2"],
    ["K8V4", None],
    [0, 1],
    (0.5, 1),
    [np.int32(1)],
    [jnp.float32(0.5)],
    ValueError("x"),
    np,
    "x".join,
]
OTHERS += [
    datetime.timedelta(1),
    dkv.LayerPairs(),
    dkv.Hadamard(),
    dkv.Budget(keep=7),
    dkv.Replay(),
    dkv.Greedy(),
    jax.ShapeDtypeStruct((), "int32"),
]

_small = st.integers(0, 9)
formats = st.builds(
    "K{}{}{}V{}{}{}{}{}{}".format,
    *[
        st.sampled_from([0, 1, 2, 3, 4, 8, 10**30]),
        st.sampled_from(["", *"gncvtsx"]),
        st.sampled_from(["", 0, 4, 32, 10**30]),
    ]
    * 2,
    st.sampled_from(["", "", ":1,1", ":2,4", ":0,0"]),
    st.sampled_from(["", "", "+o1", "+o0", "+o100", "+o0.0000001", "+o" + "9" * 400]),
    st.sampled_from(["", "", "+r0", "+r2", f"+r{10**30}"]),
)
_listed = [*INTEGERS, *FLOATS, *TEXTS, *SCALARS, *ARRAYS, *OTHERS]
scalars = st.one_of(
    # sampled_from would show them all, which Hostile does not like
    st.integers(0, len(_listed) - 1).map(lambda i: _listed[i]),
    st.integers(-2, 300),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=5),
    formats,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple)),
    max_leaves=6,
)


def some_of(names: Iterable[str], *, most: int = 2) -> st.SearchStrategy[dict[str, Any]]:
    """One or a few of the arguments `names`, each with a value of `values`."""
    return st.dictionaries(st.sampled_from(sorted(names)), values, min_size=1, max_size=most)


def attempt(make: Callable[[], Any], names: Iterable[str]) -> Any:
    """What `make()` returns, or None where it refuses by a ValueError or TypeError that names one
    of the arguments `names`.

    Any other error, and one that names none of them, goes on.
    """
    try:
        return make()
    except (ValueError, TypeError) as error:
        said = str(error)
        if len(said) < 4000 and any(re.search(rf"\b{name}\b", said) for name in names):
            return None
        raise AssertionError(
            f"{type(error).__name__} names none of {sorted(names)}: {said[:1000]}"
        ) from error
