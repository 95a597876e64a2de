"""What a policy costs: distributions against the full cache's, tasks, and a command line
(`python -m diffkv_jax.evaluation --help`).
"""

from diffkv_jax.evaluation.answers import RunOptions as RunOptions
from diffkv_jax.evaluation.divergence import (
    Estimate as Estimate,
    Quality as Quality,
    Summary as Summary,
    quality as quality,
)
from diffkv_jax.evaluation.forcing import teacher_forced as teacher_forced
from diffkv_jax.evaluation.math_problems import (
    Problem as Problem,
    gsm8k as gsm8k,
    math500 as math500,
    read_gsm8k as read_gsm8k,
    read_math500 as read_math500,
)
from diffkv_jax.evaluation.needle import passkeys as passkeys
from diffkv_jax.evaluation.on_texts import OnTexts as OnTexts, on_texts as on_texts
from diffkv_jax.evaluation.questions import (
    TwoQuestions as TwoQuestions,
    two_questions as two_questions,
)
from diffkv_jax.evaluation.result import TaskResult as TaskResult
from diffkv_jax.evaluation.retrieval import (
    Records as Records,
    draw_records as draw_records,
    key_value_retrieval as key_value_retrieval,
    read_records as read_records,
)
from diffkv_jax.evaluation.ruler_tasks import (
    RulerProblems as RulerProblems,
    ruler as ruler,
    ruler_problems as ruler_problems,
)
