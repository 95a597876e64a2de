"""`CompressionPolicy`: one choice per stage, as data."""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from diffkv_jax.arguments import nearest, refuse, shown, text, tuple_of
from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.policy.checks import check_stages, check_tiers
from diffkv_jax.policy.keep import Keep, KeepAll
from diffkv_jax.policy.pairs import LayerPairs
from diffkv_jax.policy.protect import Protect
from diffkv_jax.policy.schedule import Schedule
from diffkv_jax.policy.score import Score
from diffkv_jax.policy.stage import (
    Stage,
    data,
    from_mapping,
    static,
    to_mapping,
    with_leaves,
)
from diffkv_jax.policy.transform import USUAL, Transform

VERSION = 2  # of the JSON
_FIRST_VERSION = {  # its flat fields, and where what they said stands now
    "tiers": "tiers",
    **dict.fromkeys(("alpha_high", "alpha_low"), "keep: Thresholds"),
    **dict.fromkeys(("keep", "keep_high", "layers", "whole_layers", "pooled"), "keep: Budget"),
    **dict.fromkeys(("recover", "punctuation", "frequent", "local"), "keep: HeadClasses"),
    **dict.fromkeys(("observe", "score", "group", "pooling", "future", "epsilon"), "score"),
    **dict.fromkeys(("newest_weight", "shared", "nested", "replay"), "score"),
    **dict.fromkeys(("sinks", "protect"), "protect"),
    **dict.fromkeys(("window", "flush", "block"), "schedule"),
    **dict.fromkeys(("rotate", "un_rope"), "transform"),
    "merge": "pairs",
}


def _stage(kind: type, name: str, value: Any, *, optional: bool = False) -> Any:
    return None if value is None and optional else from_mapping(name, value, kind)


class CompressionPolicy(Stage):
    """Which tier a token goes to, how each tier stores it, and when that is decided (docs/design.md
    1). Methods of the literature are such policies (`diffkv_jax.methods`); docs/your_own_method.md
    shows how to write a stage.

    Attributes:
        name: shown in reports.
        transform: what keys and values go through before they are stored; `Exact()`: nothing.
        score: what tokens are ranked by; None: nothing ranks them.
        keep: which of them stay.
        protect: tokens that always stay.
        tiers: formats of the stored tiers, most precise first, one or two: "full", "K8V4",
            "K4V2:2,4" (groups after the colon), "K4nV2n" (levels of the normal distribution, for
            rotated tokens) ...
        schedule: when tokens leave the recent window.
        pairs: deep layers share the directions of their keys and values in pairs (MiniCache),
            stored as the first of `tiers` says: plain XLA only. Those hold all tokens: `keep` is
            for the layers before them.

    Raises:
        TypeError: a field is given what it does not take; the message says what it does.
        ValueError: a number is outside its range, or the stages cannot work together; the message
            says why.
    """

    name: str = static(convert=partial(text, rule="the text that reports show"))
    transform: Transform = data(default=USUAL, convert=partial(_stage, Transform))
    score: Score | None = data(default=None, convert=partial(_stage, Score, optional=True))
    keep: Keep = data(default=KeepAll(), convert=partial(_stage, Keep))
    protect: Protect = data(default=Protect(), convert=partial(_stage, Protect))
    tiers: tuple[str, ...] = static(
        default=("full",),
        convert=partial(tuple_of, each=text, rule="a list of format names: ['K8V4', 'K4V2']"),
    )
    schedule: Schedule = data(default=Schedule(), convert=partial(_stage, Schedule))
    pairs: LayerPairs | None = data(
        default=None, convert=partial(_stage, LayerPairs, optional=True)
    )

    def check(self) -> None:
        check_tiers(self.tiers)
        check_stages(self)

    @staticmethod
    def none(*, window: int = 64, flush: int = 32) -> "CompressionPolicy":
        """The plain cache on the same code path: every token stays, in the cache dtype."""
        return CompressionPolicy("none", schedule=Schedule(window=window, flush=flush))

    @property
    def queries(self) -> int | Literal["all"]:
        """`Score.queries`; 0 without a score."""
        return 0 if self.score is None else self.score.queries

    @property
    def in_decode(self) -> bool:
        """Whether tokens leave their tier after the prompt too."""
        return self.score is not None and self.score.in_decode and not self.score.has_passes

    @property
    def group(self) -> int | None:
        """Tokens that share numbers of a codec; None: no codec does, or their page says."""
        shares = not all(fmt.separable for fmt in self.formats("float32"))
        return self.schedule.group or (32 if shares else None)

    @property
    def token_classes(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of the classes 1 (always stay), 2, ... (`cache.token_class`)."""
        return (self.protect.token_ids, *self.keep.token_classes)

    @property
    def classifies(self) -> bool:
        """Whether the classes of tokens must be known."""
        return any(self.token_classes)

    @property
    def rescores(self) -> bool:
        """Whether the scores of all tokens may change when the policy decides."""
        return self.keep.marks or (self.score is not None and self.score.rescores)

    def formats(self, cache_dtype: str) -> tuple[KVFormat, ...]:
        """The codecs of the stored tiers; "full" keeps `cache_dtype`."""
        return tuple(KVFormat.parse(name, cache_dtype) for name in self.tiers)

    def bind(self, layers: int, requests: int, kv_heads: int) -> "CompressionPolicy":
        """The policy that a cache carries: thresholds and budgets as arrays [layers, requests,
        kv_heads]; without a name, by which programs would be compiled, and without pairs, of which
        the cache's spec knows whether the model has any.

        `layers` counts those without a sliding window.

        Raises:
            ValueError: one of them does not broadcast to the model's layers and heads, or a layer
                that it names is not there.
        """
        try:
            keep = self.keep.bind((layers, requests, kv_heads))
        except ValueError as error:
            raise type(error)(f"policy {self.name!r}: {error}") from None
        return with_leaves(self, keep=keep, pairs=None, name="")

    def to_json(self) -> str:
        """The policy as JSON; `from_json` reads it back."""
        return json.dumps({"version": VERSION} | to_mapping(self))

    @staticmethod
    def from_json(text: str) -> "CompressionPolicy":
        """A policy from the JSON of `to_json`.

        Raises:
            TypeError: `text` is no text.
            ValueError: it is no JSON, a field is unknown, its value cannot work, or it is a policy
                of an earlier version.
        """
        if not isinstance(text, str | bytes | bytearray):
            rule = "the JSON text of a policy; diffkv_jax.load_policy reads files"
            refuse("text", text, rule, True)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            refuse("text", text, f"the JSON of a policy ({error})")
        return CompressionPolicy.from_mapping(found)

    @staticmethod
    def from_mapping(found: Any) -> "CompressionPolicy":
        """A policy from the names of its fields and their values, as JSON has them.

        Raises:
            TypeError, ValueError: it is no mapping, a field is unknown, or its value cannot work.
        """
        names = ("name", "transform", "score", "keep", "protect", "tiers", "schedule", "pairs")
        rule = f"a policy must be a JSON object with 'name' and any of {list(names[1:])}"
        if not isinstance(found, Mapping):
            raise ValueError(f"{rule}, given {shown(found)}")
        given = {name: value for name, value in found.items() if name not in ("version", "type")}
        _check_version(found.get("version", VERSION), given)
        if unknown := [name for name in given if not isinstance(name, str) or name not in names]:
            raise ValueError(f"{rule}; unknown {shown(unknown)}{nearest(unknown, names)}")
        if "name" not in given:
            raise ValueError(f"{rule}; missing 'name'")
        return CompressionPolicy(**given)


def _check_version(version: Any, given: Mapping) -> None:
    """Refuse a policy of another version; of the first one with where its fields have gone."""
    old = [name for name in _FIRST_VERSION if name in given and name not in ("tiers", "protect")]
    flat = [name for name in old if name not in ("score", "keep") or not _staged(given[name])]
    if flat:
        gone = ", ".join(f"{name} -> {_FIRST_VERSION[name]}" for name in flat)
        raise ValueError(
            f"this policy has the flat fields of version 1 ({gone}): write each stage, such as "
            '{"version": 2, "score": {"type": "MeanAttention", "queries": 64}, "keep": {"type": '
            '"Thresholds", "alpha_high": 1.0}, "tiers": ["K8V4", "K4V2"]}, or make the file anew '
            "with diffkv_jax.diffkv(...).to_json()"
        )
    if version != VERSION:
        raise ValueError(f"version={shown(version)} must be {VERSION}, that of this library")


def _staged(value: Any) -> bool:
    return isinstance(value, Stage | Mapping | None)
