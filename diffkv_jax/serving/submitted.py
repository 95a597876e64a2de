"""What users submit, checked and made into a `Request`."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffkv_jax.arguments import instance, integer, refuse
from diffkv_jax.batching import as_batch
from diffkv_jax.inputs import as_samplings, request_keys, stop_ids
from diffkv_jax.model import CausalLM
from diffkv_jax.sampling import Sample
from diffkv_jax.serving.asked import STOPS
from diffkv_jax.serving.logprobs import MOST
from diffkv_jax.serving.penalties import NONE, Penalties
from diffkv_jax.serving.request import Request
from diffkv_jax.serving.text import Words, as_stop


def as_request(
    number: int,
    model: CausalLM,
    tokenizer: Any,
    prompt: Any,
    *,
    max_new_tokens: Any = 128,
    sampling: Any = None,
    seed: Any = None,
    stop: Any = (),
    stop_token_ids: Any = None,
    logprobs: Any = None,
    penalties: Any = None,
    priority: Any = 0,
) -> Request:
    """
    Raises:
        TypeError, ValueError: bad input, named.
    """
    tokens, _ = as_batch([as_tokens(prompt, tokenizer)], model.attention.vocab_size)
    (chosen,) = as_samplings(sampling, 1)
    if seed is None:
        seed = secrets.randbits(32) if isinstance(chosen, Sample) else 0
    if not (_is_key(seed) or (isinstance(seed, jax.Array | np.ndarray) and seed.ndim == 1)):
        seed = integer("seed", seed, least=-(2**63), most=2**63 - 1)
    key = request_keys((chosen,), seed, 1)
    if jax.random.key_impl(key) != jax.random.key_impl(jax.random.key(0)):
        refuse("seed", seed, "a number, or a key of JAX's default kind: jax.random.key(number)")
    stops = np.asarray(stop_ids(stop_token_ids, model))
    stops = stops[stops >= 0]
    if len(stops) > STOPS:
        refuse("stop_token_ids", stop_token_ids, f"at most {STOPS} token ids")
    found = as_stop(stop, tokenizer)
    return Request(
        number=number,
        prompt=tokens[0],
        max_new_tokens=integer("max_new_tokens", max_new_tokens, least=1),
        sampling=chosen,
        seed=seed,
        key=np.asarray(jax.random.key_data(key))[0],
        stop_token_ids=np.pad(stops, (0, STOPS - len(stops)), constant_values=-1),
        top_logprobs=integer("logprobs", logprobs, least=0, most=MOST, optional=True),
        penalties=_as_penalties(penalties, model),
        policy=None,
        priority=integer("priority", priority),
        words=None if tokenizer is None else Words(tokenizer, found),
    )


def _is_key(seed: Any) -> bool:
    return isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)


def _as_penalties(given: Any, model: CausalLM) -> Penalties:
    if isinstance(given, Mapping) and set(given) <= set(Penalties.__dataclass_fields__):
        given = Penalties(**given)
    found: Any = NONE if given is None else given
    instance("penalties", found, Penalties, "Penalties(repetition=1.1) makes one")
    if beyond := [i for i in found.bias if i >= model.attention.vocab_size]:
        refuse("bias", beyond[0], f"a token id below {model.attention.vocab_size}")
    return found


def as_tokens(prompt: Any, tokenizer: Any) -> Any:
    """Token ids of a prompt: text and messages by the tokenizer, the latter by its chat template.

    Raises:
        TypeError, ValueError: text without a tokenizer, or no such messages.
    """
    messages = (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(part, Mapping) for part in prompt)
    )
    if (messages or isinstance(prompt, str)) and tokenizer is None:
        refuse("prompt", prompt, "token ids: text needs an engine with tokenizer=")
    if isinstance(prompt, str):
        encode = tokenizer if callable(tokenizer) else tokenizer.encode  # of tokenizers itself
        found: Any = encode(prompt)
        return found.input_ids if hasattr(found, "input_ids") else found.ids
    if not messages:
        return prompt
    try:
        found = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)
    except Exception as error:
        raise ValueError(f"prompt: the chat template refuses these messages: {error}") from error
    return found["input_ids"] if isinstance(found, Mapping) else found
