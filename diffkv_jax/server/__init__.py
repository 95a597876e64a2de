"""An HTTP server with OpenAI's API over one `Engine` (`pip install 'diffkv-jax[serve]'`).

    from diffkv_jax.server import serve
    serve(Engine(model, params, tokenizer=tokenizer), model_name="mine", port=8000)

| endpoint | |
| --- | --- |
| POST `/v1/completions` | `prompt`: a text, token ids, or a list of either |
| POST `/v1/chat/completions` | `messages`, texts only, by the tokenizer's chat template |
| GET `/v1/models`, `/v1/models/{id}` | the one model |
| GET `/health` | 200, 503 while shutting down, 500 once a step of the engine has raised |
| GET `/metrics` | for Prometheus: requests, tokens, pages, latencies |
| GET `/`, `/stats.json` | a page of what the engine does, and its numbers |

Both take `n`, `max_tokens` (and `max_completion_tokens`; 16 by default, for a chat as many as there
is room for), `temperature` (0: the likeliest token), `top_p`, `top_k`, `min_p`, `seed` (of the i-th
choice `seed + i`), `frequency_penalty`, `presence_penalty`, `repetition_penalty`, `logit_bias`,
`stop`, `logprobs`, `stream`, `stream_options.include_usage`; `user` means nothing. What is not
known or not supported is refused, not ignored.

A request that outgrows the pool even alone ends with "length", or with 503 where nothing was
generated. Clients that leave cancel their requests. In a stream errors come as
`data: {"error": ...}`, without `[DONE]`.

`app` and `serve` have the options: `api_key` (for all under `/v1`), `max_body_bytes` (413),
`max_queue` (429 with Retry-After), `timeout_seconds` (504), `drain_seconds`.
"""

from diffkv_jax.server.application import app as app, serve as serve
from diffkv_jax.server.driver import Driver as Driver
