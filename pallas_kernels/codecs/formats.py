"""`KVFormat`: how K and V are stored in one tier, and the grammar of the named formats."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
from jax import Array

from .codec import Codec
from .coupled import Coupled
from .full import Full
from .levels import Levels, StaticLevels
from .low_rank import LowRank
from .normal import Normal
from .outliers import Outliers
from .per_channel import PerChannel
from .tiles import Scalar
from .uniform import Grouped, Uniform


class Kind(NamedTuple):
    """What a letter behind the bits stands for.

    Attributes:
        make: the codec from its bits and, where it `takes` one, the number of groups a token or the
            number behind the letter.
        outliers, fill: along which vectors `+o` keeps outliers apart, and what replaces them.
    """

    make: Callable[..., Codec]
    takes: Literal["groups", "number"] | None = None
    outliers: Literal["token", "channel"] = "token"
    fill: Literal["mean", "median"] = "mean"


KINDS = {
    "": Kind(Uniform, takes="groups"),
    "g": Kind(Grouped, takes="number"),  # groups of so many channels, whatever head_dim is
    "n": Kind(Normal),
    "c": Kind(PerChannel, outliers="channel"),
    "v": Kind(Coupled, takes="number"),  # a code for so many channels
    "t": Kind(Levels, fill="median"),
    "s": Kind(StaticLevels, fill="median"),
}
_LONGEST = 100  # characters of a name
_TENSOR = r"(\d+)([a-z]?)(\d*)"
_NAME = re.compile(rf"K{_TENSOR}V{_TENSOR}(?::(\d+),(\d+))?(?:\+o(\d+\.?\d*))?(?:\+r(\d+))?")


def _built_in(make: Callable[..., Codec]) -> bool:
    return getattr(make, "__module__", "").startswith(f"{__package__}.")


def register_codec(
    letter: str, make: Callable[..., Codec], *, takes: Literal["groups", "number"] | None = None
) -> None:
    """Let `letter` behind the bits in a format's name stand for a codec of your own: with "x", the
    tier "K4xV8" keeps keys as `make(4)` does. Plain XLA runs it, wherever a policy takes tiers.

    A process knows the letter once this has been called, also policies read from JSON. Calling it
    again replaces the codec.

    Args:
        letter: one of a to z that no format of this library uses.
        make: the codec from its bits and, where it `takes` one, one number more: the "number"
            behind the letter ("K4x16V8"), or the "groups" a token behind the colon.

    Raises:
        ValueError: the letter is not one, or taken.
    """
    taken = sorted(letter for letter, kind in KINDS.items() if letter and _built_in(kind.make))
    if not re.fullmatch("[a-z]", str(letter)) or letter in taken:
        raise ValueError(f"letter={letter!r} must be one of a to z, and none of {taken}")
    if takes not in (None, "groups", "number"):
        raise ValueError(f"takes={takes!r} must be 'groups', 'number' or None")
    KINDS[letter] = Kind(make, takes)


class Block(NamedTuple):
    """Encoded tokens: payloads uint8 `[..., rows, T]`, metadata float16 `[..., meta_rows, T]`."""

    k_payload: Array
    v_payload: Array
    k_meta: Array
    v_meta: Array


@dataclass(frozen=True)
class KVFormat:
    """Codecs of K and of V in one tier. `parse("K8V4")` names one."""

    key: Codec
    value: Codec
    name: str = field(default="full", compare=False)  # what it was parsed from

    @staticmethod
    def parse(name: str, dtype: str = "bfloat16") -> "KVFormat":
        """`K<bits>V<bits>` or `full` (kept in `dtype`).

        A letter behind the bits names another codec (`KINDS`): `K4nV2n` has the levels of N(0, 1);
        `K2cV2g32` is two bits, the keys per channel over a block, the values in groups of 32
        channels; `K8v4V8v4` has a learned code of eight bits for four channels, `K4sV4t` learned
        levels of the channel's and of the token's range. Groups a token follow a colon as in
        `K4V2:2,4`; `+o2` keeps two percent of outliers apart, `+r4` the error in four ranks.

        Raises:
            ValueError: the name has another form or other bit widths.
        """
        if name == "full":
            return KVFormat(Full(dtype), Full(dtype))
        match = _NAME.fullmatch(name) if len(name) <= _LONGEST else None
        if match is None or match[2] not in KINDS or match[5] not in KINDS:
            raise ValueError(
                f"format {name[:_LONGEST]!r} must be 'full' or K<bits>V<bits> such as 'K8V4', with "
                f"a letter behind the bits of {[kind for kind in KINDS if kind]}, groups after a "
                "colon as in 'K4V2:2,4', outliers in percent as in '+o2', ranks of the error as in "
                "'+r4'"
            )
        k = (match[1], match[2], match[3], match[7])
        v, beside = (match[4], match[5], match[6], match[8]), (match[9], match[10])
        key = _tensor(name, *k, *beside)
        return KVFormat(key, _tensor(name, *v, *beside, as_tokens=match[2] == "c"), name)

    def for_block(self, head_dim: int, tokens: int) -> "KVFormat":
        """The format of blocks `[head_dim, tokens]`: some codecs' rows depend on both.

        Raises:
            ValueError: they cannot hold such blocks.
        """
        first, second = self.widths(head_dim)
        key = self.key.for_block(first, tokens)
        return replace(self, key=key, value=self.value.for_block(second, tokens))

    @property
    def separable(self) -> bool:
        """Whether one token's lane can change without touching others; else whole blocks only."""
        return self.key.separable and self.value.separable

    @property
    def learned(self) -> bool:
        """Whether either codec has a table that `calibrate` makes."""
        return self.key.learned or self.value.learned

    def widths(self, head_dim: int) -> tuple[int, int]:
        """Channels of a block's first half (`k_payload`) and of its second: those of K and of V."""
        return head_dim, head_dim

    def rows(self, head_dim: int) -> tuple[int, int]:
        """Payload rows (bytes a token) of a block's halves."""
        first, second = self.widths(head_dim)
        return self.key.rows(first), self.value.rows(second)

    def token_bytes(self, head_dim: int) -> int:
        """Payload and metadata bytes of one token of one head."""
        return sum(self.rows(head_dim)) + 2 * (self.key.meta_rows + self.value.meta_rows)

    def encode(self, k: Array, v: Array) -> Block:
        """K and V `[..., head_dim, T]` to an encoded block."""
        k_payload, k_meta = self.key.encode(k)
        v_payload, v_meta = self.value.encode(v)
        return Block(k_payload, v_payload, k_meta, v_meta)

    def decode(self, block: Block) -> tuple[Array, Array]:
        """The float32 K and V `[..., head_dim, T]` that attention reads."""
        k = self.key.decode(block.k_payload, block.k_meta)
        return k, self.value.decode(block.v_payload, block.v_meta)

    def key_logits(self, q: Array, block: Block) -> Array:
        """`q [..., G, d]` times the keys of a block, `[..., G, T]`."""
        return self.key.key_logits(q, block.k_payload, block.k_meta)

    def value_mix(self, p: Array, block: Block, valid: Array) -> Array:
        """Weights `p [..., G, T]` times the values of a block, `[..., G, d]`; tokens not `valid
        [..., T]` are never read.
        """
        return self.value.value_mix(p, block.v_payload, block.v_meta, valid)

    def values(self, k: Array, v: Array) -> Array:
        """What attention mixes of exact tokens `k`, `v [..., d]`: V."""
        del k
        return v

    def scalars(self) -> tuple[Scalar, Scalar]:
        """Both codecs, where kernels read and write them."""
        assert isinstance(self.key, Scalar) and isinstance(self.value, Scalar), self
        return self.key, self.value

    def demote(self, target: "KVFormat", block: Block) -> Block:
        """Requantise a block of this format to `target`: on the integer codes where the groups
        match, else through float32.
        """
        k_payload, k_meta = self.key.demote(target.key, block.k_payload, block.k_meta)
        v_payload, v_meta = self.value.demote(target.value, block.v_payload, block.v_meta)
        return Block(k_payload, v_payload, k_meta, v_meta)


def native_formats(formats: Sequence[KVFormat], blocks: Sequence[int]) -> np.ndarray:
    """Codecs of tiers, `blocks` a page, for `Layout::make` of native/pages.h: int64 [tiers * 5]."""
    numbers = []
    for fmt, count in zip(formats, blocks, strict=True):
        key, value = fmt.key.native, fmt.value.native
        assert key is not None and value is not None, fmt
        numbers += [*key, *value, count]
    return np.array(numbers, np.int64)


def _tensor(
    name: str,
    bits: str,
    letter: str,
    number: str,
    groups: str | None,
    share: str | None,
    rank: str | None,
    as_tokens: bool = False,
) -> Codec:
    """The codec of one tensor of the format `name`; `share` of outliers in percent, `as_tokens` as
    `Grouped` has it.
    """
    kind = KINDS[letter]
    if bool(number) != (kind.takes == "number"):
        raise ValueError(
            f"format {name!r}: the letter {letter!r} {'takes no' if number else 'needs a'} number "
            "behind it, as in 'K4g32V4c'"
        )
    if kind.takes != "groups" and groups not in (None, "1"):
        raise ValueError(
            f"format {name!r}: {bits}{letter} has no groups a token, give 1 for it after the colon"
        )
    extra = {"groups": int(groups or 1), "number": int(number or 0), None: None}[kind.takes]
    codec = kind.make(int(bits)) if kind.takes is None else kind.make(int(bits), extra)
    if letter == "g":
        codec = Grouped(int(bits), extra or 0, as_tokens)
    codec = (
        codec if share is None else Outliers(codec, float(share) / 100, kind.outliers, kind.fill)
    )
    return codec if rank is None else LowRank(codec, int(rank))
