"""`CompressionPolicy`: one choice per stage, as data."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from diffkv_jax.arguments import nearest, refuse, shown
from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.policy.checks import (
    check_blocks,
    check_budgets,
    check_classes,
    check_merge,
    check_ranking,
    check_replay,
    check_thresholds,
    check_tiers,
)
from diffkv_jax.policy.fields import convert_fields
from diffkv_jax.policy.pairs import Merge
from diffkv_jax.policy.replay import Replay
from diffkv_jax.policy.selection import Score, Selection

Threshold = float | tuple[Any, ...]
Budget = float | int | str | tuple[Any, ...]
PYRAMID_STEEPNESS = 20.0
COSINE_FLOOR = 0.9  # what the last layer keeps of the one before it


@dataclass(frozen=True)
class CompressionPolicy:
    """Which tier a token goes to, how each tier stores it, and when that is decided (docs/design.md
    1).

    Attributes:
        name: shown in reports.
        tiers: formats of the stored tiers, most precise first, one or two: "full", "K8V4",
            "K4V2:2,4" (groups after the colon), "K4nV2n" (levels of the normal distribution, for
            rotated tokens) ...
        alpha_high: threshold of the high tier in units of uniform attention 1/P: a number, or
            nested tuples that broadcast to [layers, requests, kv_heads]; layers counts those
            without a sliding window.
        alpha_low: threshold below which a token is dropped, likewise; 0 drops nothing.
        observe: how many of the last prompt queries score the prompt, "all" of them, or None:
            attention does not score.
        window: number of most recent tokens that stay exact.
        flush: decode steps between two compression events; 1 is Algorithm 1 of the DiffKV paper.
        score: what tokens are ranked by, see `diffkv_jax.policy.selection.Selection`; "attention"
            when None and there is `observe`.
        group: "max" or "mean": how the query heads of a KV head are reduced to one score.
        keep: instead of thresholds, how many tokens of a head stay, those in the window and the
            sinks included: a share of the tokens seen (float up to 1), a number (int), memory for
            the whole cache such as "64MiB", out of which a number is made, or nested tuples of
            shares or numbers that broadcast like the thresholds. None: thresholds decide.
        keep_high: with two tiers, how many stay in the high one, likewise.
        layers: how `keep` is spread over the layers: "uniform"; "pyramid", linearly from nearly
            twice as much in the first to 1 / `PYRAMID_STEEPNESS` of it in the last (PyramidKV,
            arXiv:2406.02069); "cosine", each layer a share of the one before it (PyramidInfer,
            arXiv:2405.12532); "pooled", by scores: the heads of all layers share (KVzip), of
            "replay" scores.
        whole_layers: layers (counted as `keep` counts them) that keep everything.
        pooled: the KV heads of a layer share their budgets; each keeps at least this share of its
            own (Ada-KV, arXiv:2407.11550).
        sinks: first tokens that always stay.
        newest_weight: with "window" scores, what the last query counts; the first one that scores
            counts 1, linearly between.
        shared: the heads of a layer keep the same tokens, by scores averaged over them ("window"
            scores).
        nested: a prompt token that a layer drops is not there for deeper layers: they attend
            without it (`diffkv_jax.methods.pyramidinfer`).
        protect: token ids that always stay, such as the special ones of `diffkv_jax.token_classes`.
        recover: in place of thresholds and budgets, the share of its attention (up to 1) that a
            head must hold: after each prompt it picks the cheapest of the classes protected; and
            `punctuation`; and frequent; and local; all (FastGen, arXiv:2310.01801). A number, or
            nested tuples that broadcast like the thresholds.
        punctuation: token ids of that class.
        frequent, local: how many tokens those classes hold, as shares of the tokens seen: the most
            attended, the most recent.
        rotate: keys and values are kept turned by an orthogonal matrix, which helps codecs of few
            bits (`diffkv_jax.policy.transform`).
        un_rope: keys are kept without their rotary embedding and get it back where attention reads
            them; of kernels, only decode attention.
        block: tokens of a block, where a codec shares numbers over the tokens of one ("K2cV2"): a
            multiple of 32 up to 256, 32 when None.
        pooling: width of the moving average over positions, of "window" scores (SnapKV).
        future: of "expected" scores: how many positions after the prompt the queries to come may
            have (ExpectedAttention).
        epsilon: of "expected" scores: what is added to attention before it is multiplied with the
            value's norm.
        replay: of "replay" scores: what the model reads when it goes over the prompt again (KVzip,
            arXiv:2505.23416); `Replay()` when None.
        merge: deep layers share the directions of their keys and values in pairs (MiniCache),
            stored as the first of `tiers` says: plain XLA only. Those hold all tokens: thresholds
            and budgets are for the layers before them.

    Raises:
        TypeError: a field is given what it does not take; the message says what it does
            (`diffkv_jax.policy.fields`).
        ValueError: a number is outside its range, or the choices cannot work together; the message
            says why.
    """

    name: str
    tiers: tuple[str, ...]
    alpha_high: Threshold = 0.0
    alpha_low: Threshold = 0.0
    observe: int | Literal["all"] | None = None
    window: int = 64
    flush: int = 32
    score: Score | None = None
    group: Literal["max", "mean"] = "max"
    keep: Budget | None = None
    keep_high: Budget | None = None
    layers: Literal["uniform", "pyramid", "cosine", "pooled"] = "uniform"
    whole_layers: tuple[int, ...] = ()
    pooled: float | None = None
    sinks: int = 0
    pooling: int = 1
    rotate: bool = False
    un_rope: bool = False
    future: int = 512
    epsilon: float = 0.0
    newest_weight: float = 1.0
    shared: bool = False
    nested: bool = False
    protect: tuple[int, ...] = ()
    recover: Threshold | None = None
    punctuation: tuple[int, ...] = ()
    frequent: float = 0.3
    local: float = 0.3
    block: int | None = None
    replay: Replay | None = None
    merge: Merge | None = None

    def __post_init__(self):
        convert_fields(self)
        if self.score is None and self.observe is not None:
            object.__setattr__(self, "score", "attention")
        if self.replay is None and self.score == "replay":
            object.__setattr__(self, "replay", Replay())
        check_tiers(self.tiers)
        check_replay(self)
        check_ranking(self)
        check_classes(self)
        if self.block is None and not all(fmt.separable for fmt in self.formats("float32")):
            object.__setattr__(self, "block", 32)
        check_blocks(self)
        if self.merge is not None:
            check_merge(self)
        if self.keep is None:
            check_thresholds(self)
        else:
            check_budgets(self)

    def __repr__(self) -> str:
        """The fields that are not at their defaults."""
        said = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        changed = (f"{name}={value!r}" for name, value in said if value != defaults[name])
        return f"CompressionPolicy({', '.join(changed)})"

    @staticmethod
    def none(*, window: int = 64, flush: int = 32) -> "CompressionPolicy":
        """The plain cache on the same code path: every token stays, in the cache dtype."""
        return CompressionPolicy("none", ("full",), window=window, flush=flush)

    @property
    def selection(self) -> Selection:
        """What the compiler must know of the ranking and the budgets."""
        in_tokens = isinstance(self.keep, str) or (
            self.keep is not None and np.asarray(self.keep).dtype.kind == "i"
        )
        found: dict[str, Any] = {
            "budgeted": self.keep is not None,
            "in_tokens": in_tokens,
            "profiled": self.recover is not None,
        }
        found["across_layers"] = self.layers == "pooled"
        same = {
            name: getattr(self, name)
            for name in (field.name for field in dataclasses.fields(Selection))
            if name not in found
        }
        return Selection(**same, **found)

    def formats(self, cache_dtype: str) -> tuple[KVFormat, ...]:
        """The codecs of the stored tiers; "full" keeps `cache_dtype`."""
        return tuple(KVFormat.parse(name, cache_dtype) for name in self.tiers)

    def limits(self, layers: int, requests: int, kv_heads: int) -> np.ndarray:
        """Thresholds (alpha_high, alpha_low), budgets (keep_high, keep) or `recover` twice: float32
        [layers, requests, kv_heads, 2].

        `layers` counts those without a sliding window.

        Raises:
            ValueError: one of them does not broadcast to the model's layers and heads, or a whole
                layer is not there.
        """
        shape, in_tokens = (layers, requests, kv_heads), self.selection.in_tokens
        fields = (
            ("alpha_high", "alpha_low")
            if self.keep is None
            else ("keep" if self.keep_high is None else "keep_high", "keep")
        )
        fields = fields if self.recover is None else ("recover", "recover")
        both = np.stack([self._broadcast(field, shape) for field in fields], axis=-1)
        spread = {"pyramid": pyramid, "cosine": cosine}.get(self.layers)
        if spread is not None and layers:
            both = (
                both
                * spread(layers, None if in_tokens else both[..., 1].max())[:, None, None, None]
            )
        if beyond := [layer for layer in self.whole_layers if not 0 <= layer < shape[0]]:
            raise ValueError(
                f"whole_layers={self.whole_layers} of policy {self.name!r}: there is "
                f"no layer {beyond[0]} of {shape[0]}"
            )
        both[list(self.whole_layers)] = 2**30 if in_tokens else 1.0
        return both

    def _broadcast(self, field: str, shape: tuple[int, ...]) -> np.ndarray:
        """The numbers of a field, float32 `shape`."""
        value = getattr(self, field)
        try:
            return np.broadcast_to(np.asarray(value, np.float32), shape)
        except ValueError:
            rule = f"must broadcast to [layers, requests, kv_heads] = {shape}"
            raise ValueError(
                f"{field}={shown(value)} of policy {self.name!r} {rule}: thresholds, "
                f"budgets and recover do"
            ) from None

    def to_json(self) -> str:
        """The policy as JSON; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "CompressionPolicy":
        """A policy from the JSON of `to_json`.

        Raises:
            TypeError: `text` is no text.
            ValueError: it is no JSON, a field is unknown or missing, or its value cannot work.
        """
        if not isinstance(text, str | bytes | bytearray):
            refuse(
                "text", text, "the JSON text of a policy; diffkv_jax.load_policy reads files", True
            )
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            refuse("text", text, f"the JSON of a policy ({error})")
        return CompressionPolicy.from_mapping(data)

    @staticmethod
    def from_mapping(data: Any) -> "CompressionPolicy":
        """A policy from the names of its fields and their values, as JSON has them.

        Raises:
            TypeError, ValueError: it is no mapping, a field is unknown or missing, or its value
                cannot work.
        """
        known = [field.name for field in dataclasses.fields(CompressionPolicy)]
        rule = f"a policy must be a JSON object with 'name', 'tiers' and any of {sorted(known)}"
        if not isinstance(data, Mapping):
            raise ValueError(f"{rule}, given {shown(data)}")
        unknown = [name for name in data if not isinstance(name, str) or name not in known]
        missing = [name for name in ("name", "tiers") if name not in data]
        if unknown or missing:
            said = [f"unknown {shown(unknown)}"] * bool(unknown) + [f"missing {missing}"] * bool(
                missing
            )
            raise ValueError(f"{rule}; {', '.join(said)}{nearest(unknown, known)}")
        return CompressionPolicy(**data)


def pyramid(layers: int, largest_share: float | None) -> np.ndarray:
    """Factors of each layer's budget, float [layers], mean 1: linear, the last layer's is 1 /
    PYRAMID_STEEPNESS.

    PyramidKV (arXiv:2406.02069). `largest_share`: of the tokens, when budgets are shares: no layer
    keeps more than all.
    """
    first = 2 - 1 / PYRAMID_STEEPNESS
    first = first if largest_share is None else min(first, 1 / float(largest_share))
    return np.linspace(first, 2 - first, layers) if layers > 1 else np.ones(layers)


def cosine(layers: int, largest_share: float | None) -> np.ndarray:
    """Factors of each layer's budget, float [layers], mean 1: layer l keeps (1 - r)(cos(pi l /
    layers) + 1) / 2 + r of the one before.

    PyramidInfer (arXiv:2405.12532), r = COSINE_FLOOR. `largest_share` as in `pyramid`: the factors
    come nearer to 1 until it fits.
    """
    kept = np.cumprod(
        (1 - COSINE_FLOOR) * (np.cos(np.pi * np.arange(layers) / layers) + 1) / 2 + COSINE_FLOOR
    )
    beyond = kept / kept.mean() - 1
    room = np.inf if largest_share is None else 1 / float(largest_share) - 1
    return 1 + beyond * min(1, room / max(beyond[0], 1e-9))
