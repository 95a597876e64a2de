"""What a policy learns of the built-in text where no calibration is given: fitted once, kept."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from diffkv_jax.calibration.calibrate import calibrate, spec_of
from diffkv_jax.calibration.calibration import Calibration, fingerprint, learned_codecs
from diffkv_jax.calibration.kept import Kept, kept_name, read_for
from diffkv_jax.calibration.sample_text import SampleText
from diffkv_jax.model import CausalLM
from diffkv_jax.pallas_kernels.native.build import cache_directory
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.stage import to_mapping

VERSION = 2  # of the text and of what is fitted: raised where either changes

_known: Kept[Calibration] = Kept()


def fitted(
    model: CausalLM, params: Mapping[str, Any], policy: CompressionPolicy
) -> Calibration | None:
    """What `calibrate` learns of the model's built-in text where only the transform learns, in
    seconds; None where a codec does (minutes) or nothing, or the model has no text. The policy has
    another transform than `Usual`.

    It is kept in this process and in the folder `calibrations` of $DIFFKV_JAX_CACHE (else
    diffkv_jax in the user's cache folder) under the model's fingerprint.
    """
    text = getattr(model, "text", None)
    if not isinstance(text, SampleText) or not policy.transform.learned:
        return None
    if learned_codecs(spec_of(model, policy, 1)):
        return None
    what = [VERSION, policy.tiers, to_mapping(policy.transform), policy.protect.sinks]
    name = kept_name(fingerprint(model, params), json.dumps(what))

    def make() -> Calibration:
        return calibrate(model, params, policy=policy, progress=sys.stderr.isatty())

    folder = cache_directory() / "calibrations" / name
    return _known.get(folder, read_for(model, params, Calibration.load), make)
