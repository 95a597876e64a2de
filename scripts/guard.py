"""What every policy compiles to and computes, as digests: a move that changes none of them changed
nothing.

    python scripts/guard.py record FILE [PATTERN]     # policy/implementation, for those that match
    python scripts/guard.py compare OLD NEW           # what differs

For every named policy and implementation: sorted primitives with their shapes of a decode step, a
prompt chunk and a replay pass; on plain XLA and native code also what they take of memory when
compiled and what `generate` computes, as digests of all arrays.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
import hashlib
import json
import re
import sys
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import diffkv_jax as dkv
from diffkv_jax.methods.registry import NAMED
from diffkv_jax.steps import jitted
from diffkv_jax.testing.tiny import prompt, tiny_latent_model, tiny_model

IMPLEMENTATIONS = ("xla", "cpu", "triton", "mosaic_tpu")
LENGTHS, NEW, CHUNK = (200, 130), 40, 64
LEARNED = {"coupled_quantization", "kvquant", "kvquant_with_cq_keys"}
OTHERS = {
    "none",
    "quality",
    "balanced",
    "snapkv",
    "kvzip",
    "h2o",
    "expected_attention",
    "latent_snapkv",
}
MODELS = {
    "": partial(tiny_model, q_heads=4, kv_heads=2, layers=4),
    "latent": partial(tiny_latent_model, layers=2),
    "windows": partial(tiny_model, windows=(16, None)),
}


def digest(array) -> str:
    array = np.asarray(array)
    return (
        f"{array.dtype}{list(array.shape)} "
        f"{hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]}"
    )


def primitives(jaxpr, found: Counter) -> Counter:
    """Primitives of a jaxpr and of all it holds, with the types they take and give."""
    for eqn in jaxpr.eqns:
        shapes = [
            str(getattr(v.aval, "str_short", lambda v=v: v.aval)())
            for v in (*eqn.invars, *eqn.outvars)
        ]
        found[f"{eqn.primitive.name} {' '.join(shapes)}"] += 1
        for value in eqn.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    primitives(inner, found)
    return found


def programs(model, params, cache):
    requests = len(LENGTHS)
    tokens, length = (
        jax.ShapeDtypeStruct((requests, CHUNK), jnp.int32),
        jax.ShapeDtypeStruct((requests,), jnp.int32),
    )
    flag, flags, first = (
        jax.ShapeDtypeStruct(s, d) for s, d in (((), bool), ((requests,), bool), ((), jnp.int32))
    )
    yield "prompt", jitted.prefill_chunk, (params, cache, tokens, length, flag)
    yield (
        "decode",
        jax.jit(jitted.decode_step, static_argnums=0, donate_argnums=2),
        (params, cache, length, flags),
    )
    yield "replay", jitted.score_pass, (params, cache, tokens, length, first)
    yield "end", jitted.end_passes, (cache, flags)


def record(name: str, kind: str, implementation: str) -> dict:
    model, params = MODELS[kind]()
    policy = dkv.CompressionPolicy.none() if name == "none" else NAMED[name]()
    asked: dict = {
        "max_new_tokens": NEW,
        "implementation": implementation,
        "interpret": implementation in IMPLEMENTATIONS[2:],
    }
    if name in LEARNED:
        asked["calibration"] = dkv.calibrate(model, params, [prompt(600, 5)], policy)
    prompts = [prompt(n, i) for i, n in enumerate(LENGTHS)]
    small = dkv.generate(
        model,
        params,
        [p[:3] for p in prompts],
        policy=policy,
        max_len=256,
        **asked | {"max_new_tokens": 0},
    )
    shapes = jax.eval_shape(lambda c: c, small.cache)
    found: dict = {}
    for part, function, args in programs(model, params, shapes):
        args = args if part == "end" else (model, *args)
        if part in ("replay", "end") and "kvzip" not in name:
            continue
        jaxpr = jax.make_jaxpr(function, static_argnums=() if part == "end" else 0)(*args)
        found[f"{part} primitives"] = dict(sorted(primitives(jaxpr.jaxpr, Counter()).items()))
        if implementation in ("xla", "cpu") and kind == "":
            compiled = function.lower(*args).compile()
            memory = compiled.memory_analysis()
            found[f"{part} memory"] = {
                k: getattr(memory, f"{k}_size_in_bytes")
                for k in ("temp", "argument", "output", "alias")
            }
            found[f"{part} operations"] = dict(
                Counter(re.findall(r"= \S+ ([a-z][a-z-]*)\(", compiled.as_text()))
            )
    if implementation in ("xla", "cpu"):
        try:
            out = dkv.generate(model, params, prompts, policy=policy, prefill_chunk=CHUNK, **asked)
        except ValueError:  # decides once a prompt
            out = dkv.generate(model, params, prompts, policy=policy, **asked)
        found["tokens"] = digest(out.tokens)
        found["cache"] = sorted(digest(x) for x in jax.tree.leaves(out.cache))
    return found


def main() -> None:
    if sys.argv[1] == "compare":
        return compare(*(json.loads(Path(p).read_text()) for p in sys.argv[2:4]))
    path, pattern = Path(sys.argv[2]), re.compile(sys.argv[3] if len(sys.argv) > 3 else "")
    results = json.loads(path.read_text()) if path.exists() else {}
    for kind in MODELS:
        for name in ("none", *NAMED):
            for implementation in IMPLEMENTATIONS:
                key = f"{kind}:{name}/{implementation}"
                if kind and name not in OTHERS:
                    continue
                if key in results or not pattern.search(key):
                    continue
                try:
                    results[key] = record(name, kind, implementation)
                except (ValueError, TypeError) as error:
                    results[key] = {"refused": type(error).__name__}
                    if "plain XLA only" not in str(error) and kind == "":
                        traceback.print_exc()
                path.write_text(json.dumps(results, indent=0))
                jax.clear_caches()
                print(key, len(results), flush=True)


def compare(old: dict, new: dict) -> None:
    for key in sorted(old.keys() & new.keys()):
        for part in sorted(old[key].keys() | new[key].keys()):
            a, b = old[key].get(part), new[key].get(part)
            if a == b:
                continue
            if isinstance(a, dict) and isinstance(b, dict):
                less = {k: v - b.get(k, 0) for k, v in a.items() if v != b.get(k, 0)}
                more = {k: v - a.get(k, 0) for k, v in b.items() if k not in a}
                print(
                    f"{key} {part}: {sum(abs(v) for v in less.values()) + sum(more.values())} "
                    f"differ; {str(less)[:300]} {str(more)[:200]}"
                )
            elif isinstance(a, list) and isinstance(b, list):
                print(
                    f"{key} {part}: gone {sorted((Counter(a) - Counter(b)).elements())[:6]} new "
                    f"{sorted((Counter(b) - Counter(a)).elements())[:6]}"
                )
            else:
                print(f"{key} {part}: {a} -> {b}")
    print(
        f"{len(old.keys() & new.keys())} compared; only old "
        f"{sorted(old.keys() - new.keys())[:9]}, only new {sorted(new.keys() - old.keys())[:9]}"
    )


main()
