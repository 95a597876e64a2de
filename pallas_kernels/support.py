"""Which pages the operations of the kernels can work on: why not, in words; None where they can."""

from .codecs.tiles import Scalar
from .pages import PageLayout


def reads(implementation: str, layout: PageLayout) -> str | None:
    """For decode attention, which reads pages: codecs with `tiles`, on the CPU `native` ones."""
    d, kernels = layout.head_dim, f"the {implementation} kernels"
    for fmt in layout.formats:
        if fmt.widths(d) != (d, d):
            return f"{fmt.name!r} keeps a latent, and {kernels} read a V of K's width"
        for codec in (fmt.key, fmt.value):
            if (codec.native if implementation == "cpu" else codec.tiles(d)) is None:
                return f"{type(codec).__name__} of {fmt.name!r} is not in {kernels}"
    return None


def writes(implementation: str, layout: PageLayout) -> str | None:
    """For all operations that work on whole pages, prefill attention too: codecs that are `Scalar`
    besides, and keys with their rotary embedding.
    """
    if layout.rope is not None:
        return "keys are stored without their rotary embedding"
    for fmt in layout.formats:
        for codec in (fmt.key, fmt.value):
            if not isinstance(codec, Scalar):
                return f"{type(codec).__name__} of {fmt.name!r} is read by decode attention at most"
    return reads(implementation, layout)
