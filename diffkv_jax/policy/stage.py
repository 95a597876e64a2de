"""`Stage`: one choice of a policy, a frozen dataclass that is a pytree.

Its static fields are part of the key that programs are compiled by; its data fields (thresholds,
budgets) are leaves, so that another value compiles nothing. Subclasses need no decorator:

    class FirstTokens(Score):
        count: int = 4

        def enter(self, tokens): ...
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array

from diffkv_jax.arguments import nearest, refuse, shown

Convert = Callable[[str, Any], Any]
T = TypeVar("T")


def static(
    *, default: Any = dataclasses.MISSING, convert: Convert | None = None, length: bool = False
) -> Any:
    """A static field, needed where it has no `default`.

    `convert(name, value)` makes what is kept of what is given, or raises; a `length` counts tokens,
    which are refused beyond the model's context.
    """
    return dataclasses.field(default=default, metadata={"convert": convert, "length": length})


def data(*, default: Any, convert: Convert | None = None) -> Any:
    """A field that is a leaf, or another stage."""
    return dataclasses.field(default=default, metadata={"convert": convert, "data": True})


@dataclass_transform(frozen_default=True, field_specifiers=(static, data))
class Stage:
    """The base of all stages; subclasses become frozen dataclasses and pytrees by themselves.

    What is given is converted and checked (`check`) where a stage is made, and not again where JAX
    takes it apart and puts tracers in place of its leaves.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        dataclasses.dataclass(frozen=True, repr=False)(cls)
        fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        leaves = leaf_names(cls)
        rest = tuple(f.name for f in fields if f.name not in leaves)

        def flatten(stage):
            keyed = tuple((jax.tree_util.GetAttrKey(name), getattr(stage, name)) for name in leaves)
            return keyed, tuple(getattr(stage, name) for name in rest)

        def unflatten(statics, values):
            names = (*leaves, *rest)
            return unchecked(cls, **dict(zip(names, (*values, *statics), strict=True)))

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        _KINDS[type_name(cls)] = cls

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            convert = field.metadata.get("convert")
            if convert is not None:
                value = convert(field.name, getattr(self, field.name))
                object.__setattr__(self, field.name, value)
            _check_hashable(field.name, getattr(self, field.name))
        self.check()

    def check(self) -> None:
        """Raise ValueError where fields do not go together."""

    def __repr__(self) -> str:
        """The fields that are not at their defaults."""
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        said = ((field.name, getattr(self, field.name), field.default) for field in fields)
        changed = (f"{name}={value!r}" for name, value, default in said if _differ(value, default))
        return f"{type(self).__name__}({', '.join(changed)})"


def _check_hashable(name: str, value: Any) -> None:
    try:
        hash(value)
    except TypeError:
        refuse(name, value, "hashable, as programs are compiled by it: a tuple for a list", True)


_KINDS: dict[str, type[Stage]] = {}


def _differ(value: Any, default: Any) -> bool:
    return value is not default and (hasattr(value, "shape") or value != default)


def unchecked(cls: type[T], **values: Any) -> T:
    """A stage of these values as they are: arrays, tracers, what JAX puts in their place."""
    stage = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(stage, name, value)
    return stage


def with_leaves(stage: T, **leaves: Any) -> T:
    """The stage with arrays in place of what some fields hold, unchecked."""
    return unchecked(type(stage), **(vars(stage) | leaves))


def leaf_names(stage: Stage | type[Stage]) -> tuple[str, ...]:
    """Its fields that are leaves, or stages themselves."""
    fields = dataclasses.fields(stage)  # pyright: ignore[reportArgumentType]
    return tuple(f.name for f in fields if f.metadata.get("data"))


def overrides(stage: Any, verb: str, base: type) -> bool:
    """Whether the class of `stage` has a `verb` of its own, so that a default costs nothing."""
    return getattr(type(stage), verb) is not getattr(base, verb)


def numbers_of(stage: Any, verb: str, value: Any, shape: tuple[int, ...], axes: str) -> Array:
    """What a `verb` gave, as float32 `shape`.

    Raises:
        ValueError: it has another shape.
    """
    if jnp.shape(value) != shape:
        raise ValueError(
            f"{type(stage).__name__}.{verb} must give float32 {axes} = {list(shape)}, gave "
            f"{list(jnp.shape(value))}"
        )
    return jnp.asarray(value, jnp.float32)


def lengths(stage: Any) -> Iterator[tuple[str, int]]:
    """Name and value of each field that counts tokens, of a stage and of those that it holds."""
    for field in dataclasses.fields(stage):
        value = getattr(stage, field.name)
        if field.metadata.get("length"):
            yield field.name, value
        elif isinstance(value, Stage):
            yield from lengths(value)


def type_name(cls: type) -> str:
    """What JSON calls a class: its name, with the module of those outside of this package."""
    inside = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
    return cls.__name__ if inside else f"{cls.__module__}:{cls.__qualname__}"


def to_mapping(value: Any) -> Any:
    """A stage as what JSON knows: its type and its fields."""
    if isinstance(value, tuple):
        return [to_mapping(entry) for entry in value]
    if not isinstance(value, Stage):
        return value
    fields = dataclasses.fields(value)  # pyright: ignore[reportArgumentType]
    return {"type": type_name(type(value))} | {
        field.name: to_mapping(getattr(value, field.name)) for field in fields
    }


def from_mapping(name: str, value: Any, base: type[T]) -> T:
    """Inverse of `to_mapping` for the field `name`; a stage stays as it is.

    Raises:
        TypeError, ValueError: neither a stage of the class `base` nor the mapping of one.
    """
    known = {key: kind for key, kind in _KINDS.items() if issubclass(kind, base)}
    rule = f"a {base.__name__}: one of {sorted(known)}"
    if isinstance(value, base):
        return value
    if not isinstance(value, Mapping):
        made = " (call it)" if isinstance(value, type) and issubclass(value, base) else ""
        refuse(name, value, f"{rule}{made}", True)
    kind = known.get(str(value.get("type")))
    if kind is None:
        given = value.get("type")
        outside = "; import the module that defines it first" if ":" in str(given) else ""
        refuse(f"{name}.type", given, f"{rule}{outside}{nearest([given], known)}")
    fields = [field.name for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    given = {key: _restored(key, entry) for key, entry in value.items() if key != "type"}
    if unknown := [key for key in given if key not in fields]:
        like = nearest(unknown, fields)
        raise ValueError(f"{name}: {kind.__name__} has fields {fields}, not {shown(unknown)}{like}")
    try:
        return kind(**given)
    except TypeError as error:  # of Python: a field that has no default is missing
        raise type(error)(f"{name}: {error}") from None


def _restored(name: str, value: Any) -> Any:
    """What JSON has made of a field of `to_mapping`."""
    if isinstance(value, list):
        return tuple(_restored(name, entry) for entry in value)
    known = isinstance(value, Mapping) and value.get("type") in _KINDS
    return from_mapping(name, value, Stage) if known else value
