"""`Switches`: the few yes/no choices that tell one decoder family from another."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Switches:
    """What a family turns on in the shared decoder stack; sizes are in `ModelConfig`.

    Attributes:
        qkv_bias, o_bias, mlp_bias: biases on these projections.
        qk_norm: RMSNorm over head_dim on q and k, before the rotary embedding.
        sandwich_norms: norms after attention and after the MLP as well, each before its residual
            sum.
        norm_adds_one: RMSNorm multiplies by (1 + weight) rather than by weight.
        scale_embeddings: token embeddings are multiplied by sqrt(hidden_size).
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    norm_adds_one: bool = False
    scale_embeddings: bool = False
