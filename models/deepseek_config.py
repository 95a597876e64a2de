"""The sizes that only DeepSeek's families have, under the names of config.json: latent attention
and the mixture of experts.
"""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class LatentSizes:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1).

    Attributes:
        kv_lora_rank: channels of the latent c that a token's keys and values are made from.
        qk_nope_head_dim, qk_rope_head_dim: channels of a head's query and key without and with the
            rotary embedding; the rotary key is one for all heads.
        v_head_dim: channels of a head's value.
        q_lora_rank: channels of the queries' own latent; None = queries are projected directly.
        rope_interleave: whether the checkpoint pairs rotary channels 2i and 2i + 1, rather than i
            and i + half.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None
    rope_interleave: bool

    def __post_init__(self) -> None:
        _check_counts(self, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if self.q_lora_rank is not None:
            _check_counts(self, "q_lora_rank")
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even; the rotary embedding "
                "pairs its channels."
            )


@dataclass(frozen=True)
class ExpertSizes:
    """The mixture of experts of the layers from `first_k_dense_replace` on (arXiv:2401.06066;
    arXiv:2412.19437, section 2.1.2).

    Attributes:
        n_routed_experts, n_shared_experts: experts that a router picks from, and those that every
            token goes through.
        num_experts_per_tok: how many the router picks.
        moe_intermediate_size: inner channels of one expert.
        first_k_dense_replace: layers before the first with experts.
        n_group, topk_group: experts come in so many groups, of which a token goes to the best few;
            None = no groups.
        scoring: "softmax" (V2), or "sigmoid" (V3), with a bias for each expert that counts in the
            choice only.
        norm_topk_prob: whether the picked experts' weights are made to sum to 1.
        routed_scaling_factor: factor on these weights.
    """

    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    n_group: int | None
    topk_group: int | None
    scoring: Literal["softmax", "sigmoid"]
    norm_topk_prob: bool
    routed_scaling_factor: float

    def __post_init__(self) -> None:
        _check_counts(
            self,
            "n_routed_experts",
            "n_shared_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
        )
        _check_counts(self, "first_k_dense_replace", least=0)
        if self.n_group is not None:
            _check_counts(self, "n_group", "topk_group")
        groups, taken = self.n_group or 1, self.topk_group or 1
        if self.n_routed_experts % groups or not taken <= groups:
            raise ValueError(
                f"n_routed_experts={self.n_routed_experts} must be a multiple of "
                f"n_group={self.n_group}, which must be at least topk_group={self.topk_group}; "
                "correct config.json."
            )
        size = self.n_routed_experts // groups
        if self.num_experts_per_tok > taken * size:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must not exceed the "
                f"{taken * size} experts to pick from."
            )
        if self.scoring == "sigmoid" and size < 2:
            raise ValueError(
                f"n_group={self.n_group} leaves one expert a group, and a group counts by its two "
                "best; take fewer groups."
            )


def _check_counts(sizes: Any, *names: str, least: int = 1) -> None:
    for name in names:
        value = getattr(sizes, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"{name}={value!r} must be an integer of at least {least}; correct it in "
                "config.json."
            )
