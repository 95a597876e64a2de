"""What each row of a call is asked for, as arrays: another value compiles nothing."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffkv_jax.decode_loop import Requests
from diffkv_jax.sampling import Greedy, rules
from diffkv_jax.serving.penalties import NONE, Changes, changes
from diffkv_jax.serving.request import Request

STOPS = 32  # stop ids of one request


class Asked(NamedTuple):
    """Of R rows."""

    requests: Requests  # limit int32 [R]: tokens still to come; stops int32 [R, STOPS]
    penalties: Changes
    told: Array  # bool [R] whose log-probabilities are kept


def asked_of(requests: Sequence[Request | None], max_len: int) -> Asked:
    """By the requests of rows; None asks for nothing."""
    nobody = np.asarray(jax.random.key_data(jax.random.key(0)))
    keys = np.stack([r.key if r else nobody for r in requests])
    no_stops = np.full(STOPS, -1, np.int32)
    stops = np.stack([r.stop_token_ids if r else no_stops for r in requests])
    told = [r is not None and r.top_logprobs is not None for r in requests]
    # the history of those alone who are penalised for it
    found = [
        (r.penalties, r.prompt.tolist(), r.tokens) if r and r.penalties.change else (NONE, [], [])
        for r in requests
    ]
    return Asked(
        Requests(
            rules([r.sampling if r else Greedy() for r in requests]),
            jax.random.wrap_key_data(jnp.asarray(keys)),
            jnp.asarray(limits(requests)),
            jnp.asarray(stops),
        ),
        changes(found, max_len),
        jnp.asarray(told),
    )


def later(asked: Asked, requests: Sequence[Request | None], max_len: int) -> Asked:
    """`asked` of the same requests, some tokens later."""
    if any(r is not None and r.penalties.change for r in requests):
        return asked_of(requests, max_len)
    left = jnp.asarray(limits(requests))
    return asked._replace(requests=asked.requests._replace(limit=left))


def limits(requests: Sequence[Request | None]) -> np.ndarray:
    """Tokens that each may still generate, int32 [R]."""
    left = [r.max_new_tokens - len(r.tokens) if r else 0 for r in requests]
    return np.array(left, np.int32)
