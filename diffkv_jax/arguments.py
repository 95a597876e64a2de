"""Arguments as callers give them to plain Python values, or an error that names them.

Every converter takes the argument's name and value. NumPy and JAX scalars are numbers; booleans,
strings and None are not. A wrong type is a `WrongType`, which both `except TypeError` and `except
ValueError` catch.
"""

import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

IDS = "token ids: integers of at least 0"
LARGEST = 2**31 - 1  # what int32 holds: counts, positions and token ids on the device
_SMALLEST_FLOAT, _LARGEST_FLOAT = float(jnp.finfo("float32").tiny), float(jnp.finfo("float32").max)


def integer(
    name: str,
    value: Any,
    *,
    least: int | None = None,
    most: int | None = LARGEST,
    multiple: int = 1,
    optional: bool = False,
) -> Any:
    """`value` as int, from `least` to `most` (None: no bound), a `multiple`, or an optional None.

    Raises:
        TypeError: it is no number.
        ValueError: it is a float, or outside the range.
    """
    found: Any = _scalar(name, value)
    if value is None and optional:
        return None
    wrong = not _is_number(found)
    below = not wrong and least is not None and found < least
    beyond = not wrong and most is not None and found > most
    if wrong or below or beyond or isinstance(found, float) or found % multiple:
        bound = most if beyond or not (below or most == LARGEST) else None
        kind = "an integer" if multiple == 1 else f"a multiple of {multiple}"
        refuse(name, value, f"{kind}{_range(least, bound)}{' or None' * optional}", wrong)
    return int(found)


def number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    optional: bool = False,
    rule: str | None = None,
) -> Any:
    """`value` as float: finite, at least `least`, above `above`, at most `most`, or None.

    `rule` says so in a message of its own. What float32 cannot hold is refused, and -0.0 becomes
    0.0.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite, or outside the range.
    """
    found: Any = _scalar(name, value)
    if value is None and optional:
        return None
    wrong = not _is_number(found)
    low, lower = (least, "of at least") if above is None else (above, "above")
    kind = "a finite number" if low is None or most is None else "a number"
    rule = rule or f"{kind}{_range(low, most, lower)}{' or None' * optional}"
    if wrong or not abs(found) <= _LARGEST_FLOAT:  # also NaN; an int may be too large for float()
        refuse(name, value, rule, wrong)
    if found and abs(found) < _SMALLEST_FLOAT:
        refuse(name, value, f"{rule}, and 0 or at least {_SMALLEST_FLOAT:.3g} in size")
    outside = (least is not None and found < least) or (above is not None and found <= above)
    if outside or (most is not None and found > most):
        refuse(name, value, rule)
    return float(found) + 0.0


def flag(name: str, value: Any) -> bool:
    """`value`, True or False (also NumPy's and JAX's), as bool.

    Raises:
        TypeError: it is anything else.
    """
    found = _scalar(name, value)
    if not isinstance(found, bool):
        refuse(name, value, "True or False", True)
    return found


def text(name: str, value: Any, rule: str = "text") -> str:
    """`value` as str.

    Raises:
        TypeError: it is anything else.
    """
    if not isinstance(value, str):
        refuse(name, value, rule, True)
    return str.__str__(value)


def one_of(
    name: str,
    value: Any,
    choices: Sequence[str],
    *,
    optional: bool = False,
    rule: str | None = None,
) -> Any:
    """The one of `choices` that `value` is, or an optional None; `rule` words it in a message.

    Raises:
        TypeError: it is no text.
        ValueError: it is none of them.
    """
    if value is None and optional:
        return None
    if not isinstance(value, str) or value not in choices:
        said = [*map(repr, choices), *["None"] * optional]
        listed = " or ".join(filter(None, (", ".join(said[:-1]), said[-1])))
        listed = f"one of {listed}" if len(said) > 2 else listed
        refuse(name, value, rule or listed, not isinstance(value, str))
    return choices[choices.index(value)]


def tuple_of(
    name: str,
    value: Any,
    each: Callable[[str, Any], Any],
    rule: str,
    *,
    entry_rule: str | None = None,
    optional: bool = False,
) -> Any:
    """A list, tuple, range or array as a tuple, each entry through `each`, or an optional None.

    Raises:
        TypeError: it is no such container; the message says `rule`.
        TypeError, ValueError: an entry that `each` refuses; the message says `entry_rule`, or
            `rule`, and shows the entry.
    """
    if value is None and optional:
        return None
    entries = _entries(name, value)
    if entries is None:
        refuse(name, value, rule, True)
    found = []
    for entry in entries:
        try:
            found.append(each(name, entry))
        except ValueError as error:
            said = f"{entry_rule or rule}; it holds {shown(entry)}"
            refuse(name, value, said, isinstance(error, TypeError))
    return tuple(found)


def token_ids(name: str, value: Any, rule: str = f"a list of {IDS}") -> tuple[int, ...]:
    """A list, tuple, range or one-dimensional array of token ids as a tuple of int.

    Raises:
        TypeError: it is no such container, or holds anything else.
        ValueError: an entry is a float, or negative.
    """
    return tuple_of(name, value, _id, rule, entry_rule=IDS)


def nested(name: str, value: Any, each: Callable[[str, Any], Any], *, axes: int) -> Any:
    """One value, or nested lists, tuples or an array of up to `axes` axes as nested tuples, every
    entry through `each`.

    Raises:
        TypeError, ValueError: those of `each`.
        ValueError: nothing in it, too many axes, or lists side by side that differ in shape.
    """

    def convert(value: Any, left: int) -> Any:
        entries = _entries(name, value)
        if entries is None:
            return each(name, value)
        found = tuple(convert(entry, left - 1) for entry in entries) if left else ()
        if len({_shape(entry) for entry in found}) != 1:
            raise _Uneven
        return found

    try:
        return convert(value, axes)
    except _Uneven:
        rule = "one value or nested lists of equal shapes, with up to"
        refuse(name, value, f"{rule} {axes} axes and none of them empty")


def instance(name: str, value: Any, kind: type, remedy: str) -> Any:
    """`value`, which must be of the class `kind`.

    Raises:
        TypeError: says so, and the `remedy`.
    """
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        refuse(name, value, f"{article} {kind.__name__}: {remedy}", True)
    return value


def shown(value: Any) -> str:
    """`value` for a message: its repr, shortened; by its type where it has none (a huge int)."""
    try:
        said = repr(value)
    except Exception:
        said = f"<{type(value).__name__}>"
    return said if len(said) <= 200 else f"{said[:150]}... ({len(said)} characters)"


def nearest(unknown: Sequence[Any], known: Iterable[str]) -> str:
    """The known names most like the unknown ones, for the end of a message."""
    texts = [name[:100] for name in unknown if isinstance(name, str)]
    like = [near for name in texts for near in difflib.get_close_matches(name, known, n=2)]
    return f"; did you mean {' or '.join(map(repr, like))}?" if like else ""


class WrongType(TypeError, ValueError):
    """A value of a type that an argument does not take; a ValueError too, for its callers."""


def refuse(name: str, value: Any, rule: str, wrong_type: bool = False) -> NoReturn:
    """Raise the error that names the argument, its value and what it must be."""
    raise (WrongType if wrong_type else ValueError)(f"{name}={shown(value)} must be {rule}")


def file_path(name: str, value: Any) -> Path:
    """Text or a path object as a `Path`, `~` expanded.

    Raises:
        TypeError: it is anything else.
        ValueError: no file can be called so.
    """
    if not isinstance(value, str | os.PathLike):
        refuse(name, value, "the path of a file or folder: text or pathlib.Path", True)
    try:
        path = Path(value).expanduser()
        with suppress(FileNotFoundError):
            os.stat(path)
        return path
    # no such user, a null byte, too long, forbidden
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        refuse(name, value, f"the path of a file or folder that can be read ({reason})")


class _Uneven(Exception):
    """An empty list, one axis too many, or lists side by side that differ in shape."""


def _scalar(name: str, value: Any) -> Any:
    """NumPy and JAX scalars and arrays without axes as Python's; anything else as it is."""
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name}={shown(value)} must be known when compiling: give a plain Python value, or "
            "mark it static for jax.jit"
        )
    if not isinstance(value, np.generic | np.ndarray | jax.Array) or value.ndim:
        return value
    kinds = (
        (np.timedelta64, lambda time: time),
        (jnp.integer, int),
        (jnp.floating, float),
        (jnp.bool_, bool),
    )
    return next((make(value) for kind, make in kinds if jnp.issubdtype(value.dtype, kind)), value)


def _id(name: str, value: Any) -> int:
    return integer(name, value, least=0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _entries(name: str, value: Any) -> list | None:
    """What a list, tuple, range or array with an axis holds; None: it is none of these."""
    _scalar(name, value)  # refuses tracers
    if isinstance(value, np.ndarray | jax.Array):
        return list(value) if value.ndim else None
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return list(value) if listed else None


def _shape(value: Any) -> tuple[int, ...]:
    return (len(value), *_shape(value[0])) if isinstance(value, tuple) else ()


def _range(least: float | None, most: float | None, lower: str = "of at least") -> str:
    """The words for a range, with a space before them."""
    if least is None:
        return "" if most is None else f" up to {most}"
    if most is None:
        return f" {lower} {least}"
    return f" above {least} and up to {most}" if lower == "above" else f" from {least} to {most}"
