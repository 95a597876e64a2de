"""Models, engines and prompts from what a command line says."""

import sys
from typing import Any

from diffkv_jax.commands.failing import say

COMPILED = 2**30  # bytes of compiled programs that are kept


def load(model: str, dtype: str = "auto", *, text: bool = True) -> Any:
    """What `load_pretrained` returns.

    Raises:
        ValueError: nothing loadable; no tokenizer where `text` needs one.
    """
    from diffkv_jax.models import load_pretrained

    _keep_compiled()
    loaded = load_pretrained(model, dtype)
    if text and loaded.tokenizer is None:
        raise ValueError(f"{model} holds no tokenizer: put the model's tokenizer files beside it")
    return loaded


def _keep_compiled() -> None:
    """Compiled programs in the library's cache folder, unless JAX has been told of another: the
    next run of a command starts without compiling.
    """
    import jax

    from diffkv_jax.pallas_kernels.native.build import cache_directory

    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = cache_directory() / "compiled"
        jax.config.update("jax_compilation_cache_max_size", COMPILED)
        jax.config.update("jax_compilation_cache_dir", str(folder))


def policy_from(spelled: str) -> Any:
    """A policy as `policy_of` understands it; before the model is loaded, so that a misspelled one
    is refused at once.

    Raises:
        ValueError: it is none.
    """
    from diffkv_jax.evaluation.policies import policy_of

    return policy_of(spelled)


def engine_for(loaded: Any, policy: Any, memory_budget: str | None, **options: Any) -> Any:
    """An `Engine` with what is given; says so where a policy is to be fitted first."""
    from diffkv_jax.choice.automatic import asks_for_fit
    from diffkv_jax.serving import Engine

    if asks_for_fit(policy):
        say("the policy is fitted to the model first, once: this may take minutes")
    elif sys.stderr.isatty():
        say("preparing the cache; the first time with a model and policy takes a minute or two")
    return Engine(
        loaded.model,
        loaded.params,
        tokenizer=loaded.tokenizer,
        policy=policy,
        memory_budget=memory_budget,
        **options,
    )


def sampling_of(
    temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None
) -> Any:
    """How tokens are drawn: the likeliest one unless something asks for draws.

    Raises:
        TypeError, ValueError: a number out of range.
    """
    from diffkv_jax.sampling import Greedy, Sample

    limits = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    sample = Sample(1.0 if not temperature else temperature, **limits)  # which checks them
    asked = temperature is not None or any(limit is not None for limit in limits.values())
    return sample if asked and temperature != 0 else Greedy()


def asked_with(
    sampling: Any, seed: int | None, stop: list[str] | None, max_new_tokens: int
) -> dict[str, Any]:
    """What `Engine.submit` is given beside the prompt."""
    given = {"sampling": sampling, "seed": seed, "stop": stop or ()}
    return {**given, "max_new_tokens": max_new_tokens}


def has_template(tokenizer: Any) -> bool:
    """Whether it knows how a conversation is written."""
    return bool(getattr(tokenizer, "chat_template", None))


def check_template(tokenizer: Any, model: str) -> None:
    """
    Raises:
        ValueError: there is no chat template.
    """
    if not has_template(tokenizer):
        raise ValueError(
            f"{model} has no chat template: take an instruction-tuned model, or "
            "`diffkv generate --no-chat`"
        )
