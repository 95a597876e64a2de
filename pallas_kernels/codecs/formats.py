"""`KVFormat`: how a token's K and V are stored in one tier, and the named formats."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from jax import Array

from .full import Full
from .normal import Normal
from .uniform import Uniform

Codec = Uniform | Normal | Full


class Block(NamedTuple):
    """Encoded tokens of one tier: payloads uint8 `[..., rows, T]`, metadata float16 `[..., meta_rows, T]`."""

    k_payload: Array
    v_payload: Array
    k_meta: Array
    v_meta: Array


@dataclass(frozen=True)
class KVFormat:
    """Codecs of K and of V in one tier. `parse("K8V4")` names one."""

    key: Codec
    value: Codec

    @staticmethod
    def parse(name: str, dtype: str = "bfloat16") -> "KVFormat":
        """`K<bits>V<bits>`, optionally with groups as `K4V2:2,4` or `n` after bits for levels of N(0, 1) as `K4nV2n`; `full`: in `dtype`.

        Raises:
            ValueError: the name has another form or other bit widths.
        """
        if name == "full":
            return KVFormat(Full(dtype), Full(dtype))
        match = re.fullmatch(r"K(\d)(n?)V(\d)(n?)(?::(\d+),(\d+))?", name)
        if match is None:
            raise ValueError(
                f"format {name!r} must be 'full' or K<bits>V<bits> such as 'K8V4', groups after a colon as in 'K4V2:2,4', n after the bits "
                "for levels of the normal distribution as in 'K4nV4n'"
            )
        k_bits, k_letter, v_bits, v_letter, k_groups, v_groups = match.groups()
        return KVFormat(_codec(k_bits, k_letter, k_groups), _codec(v_bits, v_letter, v_groups))

    @property
    def name(self) -> str:
        """The name that `parse` reads."""
        if isinstance(self.key, Full) or isinstance(self.value, Full):
            return "full"
        k_groups, v_groups = self.key.scale_groups, self.value.scale_groups
        k_letter, v_letter = ("n" * isinstance(codec, Normal) for codec in (self.key, self.value))
        groups = "" if k_groups == v_groups == 1 else f":{k_groups},{v_groups}"
        return f"K{self.key.bits}{k_letter}V{self.value.bits}{v_letter}{groups}"

    def token_bytes(self, head_dim: int) -> int:
        """Payload and metadata bytes of one token of one head."""
        return self.key.rows(head_dim) + self.value.rows(head_dim) + 2 * (self.key.meta_rows + self.value.meta_rows)

    def encode(self, k: Array, v: Array) -> Block:
        """K and V `[..., head_dim, T]` to an encoded block."""
        k_payload, k_meta = self.key.encode(k)
        v_payload, v_meta = self.value.encode(v)
        return Block(k_payload, v_payload, k_meta, v_meta)

    def decode(self, block: Block) -> tuple[Array, Array]:
        """The float32 K and V `[..., head_dim, T]` that attention reads."""
        return self.key.decode(block.k_payload, block.k_meta), self.value.decode(block.v_payload, block.v_meta)

    def key_logits(self, q: Array, block: Block) -> Array:
        """`q [..., G, d]` times the keys of a block, `[..., G, T]`."""
        return self.key.key_logits(q, block.k_payload, block.k_meta)

    def value_mix(self, p: Array, block: Block, valid: Array) -> Array:
        """Weights `p [..., G, T]` times the values of a block, `[..., G, d]`; tokens not `valid [..., T]` are never read."""
        return self.value.value_mix(p, block.v_payload, block.v_meta, valid)

    @property
    def in_kernels(self) -> bool:
        """Whether the native, Triton and TPU kernels know both codecs."""
        return self.key.in_kernels and self.value.in_kernels

    def demote(self, target: "KVFormat", block: Block) -> Block:
        """Requantise a block of this format to `target`: on the integer codes where the groups match, else through float32."""
        k_payload, k_meta = _demote(self.key, target.key, block.k_payload, block.k_meta)
        v_payload, v_meta = _demote(self.value, target.value, block.v_payload, block.v_meta)
        return Block(k_payload, v_payload, k_meta, v_meta)


def _codec(bits: str, letter: str, groups: str | None) -> Codec:
    if letter == "n" and int(groups or 1) != 1:
        raise ValueError(f"groups={groups} beside n: levels of the normal distribution have one scale a token; give 1 or leave n out")
    return Normal(int(bits)) if letter == "n" else Uniform(int(bits), int(groups or 1))


def _demote(source: Codec, target: Codec, payload: Array, meta: Array) -> tuple[Array, Array]:
    if isinstance(source, Uniform) and isinstance(target, Uniform) and source.can_demote_to(target):
        return source.demote(target, payload, meta)
    return target.encode(source.decode(payload, meta))
