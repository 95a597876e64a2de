"""What a policy with the usual transform gets: the map that suits codecs with one scale a token,
wherever there is a text to learn it from.
"""

from dataclasses import replace

from diffkv_jax.calibration.calibration import Calibration
from diffkv_jax.model import AttentionSpec
from diffkv_jax.pallas_kernels.codecs.full import Full
from diffkv_jax.pallas_kernels.codecs.tiles import Scalar
from diffkv_jax.policy.affine import Centered, Chain
from diffkv_jax.policy.learned import Learned
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.transform import EXACT, Transform, Usual

LEARNED = Chain((Centered(), Learned()))


def with_usual(policy: CompressionPolicy, attention: AttentionSpec) -> CompressionPolicy:
    """The policy with what `Usual` stands for where there is a text."""
    if not isinstance(policy.transform, Usual):
        return policy
    return replace(policy, transform=_suited(policy, attention))


def as_calibrated(policy: CompressionPolicy, calibration: Calibration | None) -> CompressionPolicy:
    """The policy with what `Usual` stands for where this is all that was learned."""
    if not isinstance(policy.transform, Usual):
        return policy
    return replace(policy, transform=EXACT if calibration is None else calibration.transform)


def _suited(policy: CompressionPolicy, attention: AttentionSpec) -> Transform:
    """Centred where attention allows it; layers that share keys or values are left as they are, and
    codecs that scale channels or learn tables.
    """
    codecs = [codec for fmt in policy.formats("float32") for codec in (fmt.key, fmt.value)]
    scaled = all(isinstance(codec, Scalar) for codec in codecs)
    exact = all(isinstance(codec, Full) for codec in codecs)
    if policy.pairs is not None or exact or not scaled:
        return EXACT
    return next((one for one in (LEARNED, Learned()) if _allowed(one, attention)), EXACT)


def _allowed(transform: Transform, attention: AttentionSpec) -> bool:
    try:
        transform.check_model(attention)
    except ValueError:
        return False
    return True
