"""Codecs: `[head_dim, T]` blocks of K or V to rows of a page and back."""

from .api import demote as demote, encode as encode
from .codec import Codec as Codec, Fitting as Fitting, without_meta as without_meta
from .coupled import Coupled as Coupled
from .formats import Block as Block, KVFormat as KVFormat, register_codec as register_codec
from .full import Full as Full
from .latent import LatentFormat as LatentFormat
from .levels import Levels as Levels, StaticLevels as StaticLevels
from .low_rank import LowRank as LowRank
from .normal import Normal as Normal
from .outliers import Outliers as Outliers
from .per_channel import PerChannel as PerChannel
from .shared import (
    Shared as Shared,
    angle as angle,
    read_by as read_by,
    shared_format as shared_format,
)
from .uniform import Uniform as Uniform
