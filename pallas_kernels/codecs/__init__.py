"""Codecs: `[head_dim, T]` blocks of K or V to rows of a page and back."""

from .api import demote as demote
from .api import encode as encode
from .formats import Block as Block
from .formats import Codec as Codec
from .formats import KVFormat as KVFormat
from .full import Full as Full
from .latent import LatentFormat as LatentFormat
from .uniform import Uniform as Uniform
