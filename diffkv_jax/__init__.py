"""KV-cache compression for language models in JAX: DiffKV tiers in one paged, immutable cache."""

import diffkv_jax.fitting.judge  # noqa: F401
from diffkv_jax.cache.cache import KVCache as KVCache
from diffkv_jax.cache.kept import kept_positions as kept_positions
from diffkv_jax.cache.report import MemoryReport as MemoryReport, memory_report as memory_report
from diffkv_jax.cache.spec import CacheSpec as CacheSpec
from diffkv_jax.calibration.calibrate import calibrate as calibrate
from diffkv_jax.calibration.calibration import Calibration as Calibration
from diffkv_jax.calibration.sample_text import calibration_text as calibration_text
from diffkv_jax.choice.automatic import AutoPolicy as AutoPolicy
from diffkv_jax.choice.fitted import FitReport as FitReport, FittedPolicy as FittedPolicy
from diffkv_jax.evaluation import (
    Quality as Quality,
    quality as quality,
    teacher_forced as teacher_forced,
)
from diffkv_jax.fitting.fit import fit_policy as fit_policy
from diffkv_jax.fitting.inspect import ModelReport as ModelReport, inspect_model as inspect_model
from diffkv_jax.generate import (
    GenerateOutput as GenerateOutput,
    GenerationInterrupted as GenerationInterrupted,
    generate as generate,
)
from diffkv_jax.make_cache import make_cache as make_cache
from diffkv_jax.methods import *  # noqa: F403
from diffkv_jax.methods.registry import load_policy as load_policy
from diffkv_jax.methods.replay import Replay as Replay, replay_words as replay_words
from diffkv_jax.model import AttentionSpec as AttentionSpec, CausalLM as CausalLM
from diffkv_jax.pallas_kernels.codecs import Codec as Codec, register_codec as register_codec
from diffkv_jax.policy.affine import (
    Balanced as Balanced,
    Centered as Centered,
    Chain as Chain,
    even_channels as even_channels,
)
from diffkv_jax.policy.keep import (
    Budget as Budget,
    Keep as Keep,
    KeepAll as KeepAll,
    KeepView as KeepView,
    Thresholds as Thresholds,
)
from diffkv_jax.policy.learned import Learned as Learned
from diffkv_jax.policy.pairs import LayerPairs as LayerPairs
from diffkv_jax.policy.policy import CompressionPolicy as CompressionPolicy
from diffkv_jax.policy.protect import (
    Protect as Protect,
    TokenClasses as TokenClasses,
    token_classes as token_classes,
)
from diffkv_jax.policy.schedule import Schedule as Schedule
from diffkv_jax.policy.score import (
    KeyScore as KeyScore,
    LeavingTokens as LeavingTokens,
    PromptQueries as PromptQueries,
    Score as Score,
    ScoreView as ScoreView,
)
from diffkv_jax.policy.stage import data as data, static as static
from diffkv_jax.policy.transform import (
    Exact as Exact,
    Hadamard as Hadamard,
    Transform as Transform,
    Usual as Usual,
    WithoutRope as WithoutRope,
)
from diffkv_jax.sampling import Greedy as Greedy, Sample as Sample
from diffkv_jax.serving import (
    Engine as Engine,
    Event as Event,
    Penalties as Penalties,
    Request as Request,
    TokenLogprob as TokenLogprob,
)
