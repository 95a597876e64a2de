"""`KVFormat`: how a token's K and V are stored in one tier, and the named formats."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from jax import Array

from .full import Full
from .uniform import Uniform

Codec = Uniform | Full


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
        """`K<bits>V<bits>`, optionally with groups as `K4V2:2,4`, or `full` (kept in `dtype`).

        Raises:
            ValueError: the name has another form or other bit widths.
        """
        if name == "full":
            return KVFormat(Full(dtype), Full(dtype))
        match = re.fullmatch(r"K(\d)V(\d)(?::(\d+),(\d+))?", name)
        if match is None:
            raise ValueError(f"format {name!r} must be 'full' or K<bits>V<bits> such as 'K8V4', groups after a colon as in 'K4V2:2,4'")
        k_bits, v_bits, k_groups, v_groups = (int(part or 1) for part in match.groups())
        return KVFormat(Uniform(k_bits, k_groups), Uniform(v_bits, v_groups))

    @property
    def name(self) -> str:
        """The name that `parse` reads."""
        if isinstance(self.key, Full) or isinstance(self.value, Full):
            return "full"
        groups = "" if self.key.groups == self.value.groups == 1 else f":{self.key.groups},{self.value.groups}"
        return f"K{self.key.bits}V{self.value.bits}{groups}"

    def rows(self, head_dim: int) -> tuple[int, int]:
        """Payload rows (bytes a token) of a block's first half (`k_payload`) and of its second."""
        return self.key.rows(head_dim), self.value.rows(head_dim)

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
        return self.key.decode(block.k_payload, block.k_meta), self.value.decode(block.v_payload, block.v_meta)

    def key_logits(self, q: Array, block: Block) -> Array:
        """`q [..., G, d]` times the keys of a block, `[..., G, T]`."""
        return self.key.key_logits(q, block.k_payload, block.k_meta)

    def value_mix(self, p: Array, block: Block, valid: Array) -> Array:
        """Weights `p [..., G, T]` times the values of a block, `[..., G, d]`; tokens not `valid [..., T]` are never read."""
        return self.value.value_mix(p, block.v_payload, block.v_meta, valid)

    def values(self, k: Array, v: Array) -> Array:
        """What attention mixes of exact tokens `k`, `v [..., d]`: V."""
        del k
        return v

    @property
    def in_kernels(self) -> bool:
        """Whether the native, Triton and TPU kernels know both codecs."""
        return self.key.in_kernels and self.value.in_kernels

    def demote(self, target: "KVFormat", block: Block) -> Block:
        """Requantise a block of this format to `target`: on the integer codes where the groups match, else through float32."""
        k_payload, k_meta = _demote(self.key, target.key, block.k_payload, block.k_meta)
        v_payload, v_meta = _demote(self.value, target.value, block.v_payload, block.v_meta)
        return Block(k_payload, v_payload, k_meta, v_meta)


def _demote(source: Codec, target: Codec, payload: Array, meta: Array) -> tuple[Array, Array]:
    if isinstance(source, Uniform) and isinstance(target, Uniform) and source.can_demote_to(target):
        return source.demote(target, payload, meta)
    return target.encode(source.decode(payload, meta))
