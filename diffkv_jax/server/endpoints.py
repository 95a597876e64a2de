"""POST /v1/completions and /v1/chat/completions."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from diffkv_jax.server.asked import Asked, Chat, Completion, choices, parsed
from diffkv_jax.server.driver import Driver
from diffkv_jax.server.errors import ApiError, as_api_error
from diffkv_jax.server.told import Answer, TokenTexts
from diffkv_jax.serving import Request
from diffkv_jax.serving.submitted import as_tokens

GONE = 499  # nobody reads it: the client has left
SHORT = 16  # default of max_tokens for completions, as OpenAI's
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Endpoints:
    """Both, over one driver.

    Args:
        model_name: the one that requests have to name.
        max_body_bytes: of a request body.
        max_choices: most choices that one body can ask for.
        timeout_seconds: most that an answer may take, None: any time.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        model_name: str,
        max_body_bytes: int,
        max_choices: int | None,
        timeout_seconds: float | None,
    ):
        self.driver, self.model_name = driver, model_name
        self.max_body_bytes, self.max_choices = max_body_bytes, max_choices
        self.timeout_seconds = timeout_seconds
        self.texts = TokenTexts(driver.engine.tokenizer)

    async def completions(self, http: HttpRequest) -> Response:
        """POST /v1/completions."""
        return await self._answer(http, Completion)

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(http, Chat)

    async def _answer(self, http: HttpRequest, kind: type[Completion] | type[Chat]) -> Response:
        try:
            raw = await self._read(http)
        except ClientDisconnect:
            return Response(status_code=GONE)
        requests: list[Request] = []
        try:
            body = parsed(kind, raw)
            self.check_model(body.model)
            prompt_tokens = await run_in_threadpool(self._submit, body, requests)
            answer = Answer(body, len(requests), prompt_tokens, self.texts)
            if body.stream:
                lines = self._lines(answer, requests)
                return EventStream(lines, lambda: self.driver.drop(requests))
            return await self._unless_gone(http, self._whole(answer, requests))
        except BaseException:
            self.driver.drop(requests)
            raise

    async def _read(self, http: HttpRequest) -> bytes:
        most, found = self.max_body_bytes, bytearray()
        told = http.headers.get("content-length", "")
        size = int(told) if told.isdecimal() else 0
        if size <= most:
            async for part in http.stream():
                found += part
                size = max(size, len(found))
                if size > most:
                    break
        if size > most:
            raise ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
        return bytes(found)

    def check_model(self, name: str) -> None:
        """
        Raises:
            ApiError: there is no such model.
        """
        if name != self.model_name:
            message = f"the model {name!r} does not exist; it is called {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    # --- in a thread: tokenizers and the engine compute

    def _submit(self, body: Completion | Chat, found: list[Request]) -> int:
        """Submit every choice of every prompt; the number of tokens in the prompts."""
        is_chat, engine = isinstance(body, Chat), self.driver.engine
        given = [[m.told for m in body.messages]] if isinstance(body, Chat) else body.prompts
        count = len(given) * body.num_choices
        if self.max_choices is not None and count > self.max_choices:
            message = f"{count} choices are more than the {self.max_choices} that can be queued"
            raise ApiError(400, message, param="n")
        try:
            each = choices(body)
            prompts = [as_tokens(prompt, engine.tokenizer) for prompt in given]
            asked = [
                {**one, "prompt": prompt, "max_new_tokens": self._most(body, len(prompt))}
                for prompt in prompts
                for one in each
            ]
            self.driver.submit_all(asked, found)
        except (TypeError, ValueError) as error:
            raise _refused(str(error), is_chat) from error
        return sum(map(len, prompts))

    def _most(self, body: Asked, length: int) -> int:
        """Tokens to generate after a prompt: as asked, else `SHORT`, or in a chat all there are."""
        engine = self.driver.engine
        limit = min(engine.max_len, engine.model.attention.max_position_embeddings)
        room, asked = limit + 1 - length, body.most_tokens
        if asked is None:
            asked = max(room if isinstance(body, Chat) else min(SHORT, room), 1)
        if asked > room:
            raise ApiError(
                400,
                f"at most {limit} tokens are possible, but the prompt has {length} and up to "
                f"{asked} are to be generated",
                param="messages" if isinstance(body, Chat) else "prompt",
                code="context_length_exceeded",
            )
        return asked

    # --- on the event loop

    async def _whole(self, answer: Answer, requests: list[Request]) -> Response:
        index = {request: i for i, request in enumerate(requests)}
        async with aclosing(self.driver.stream(*requests, seconds=self.timeout_seconds)) as events:
            async for event in events:
                answer.take(index[event.request], event)
        return JSONResponse(answer.whole())

    async def _unless_gone(self, http: HttpRequest, answering: Any) -> Response:
        """The answer, which is cancelled when the client leaves before it."""
        work = asyncio.ensure_future(answering)
        gone = asyncio.ensure_future(until_gone(http.receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else Response(status_code=GONE)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _lines(self, answer: Answer, requests: list[Request]) -> AsyncGenerator[bytes, None]:
        index = {request: i for i, request in enumerate(requests)}
        for chunk in answer.beginning():
            yield _line(chunk)
        try:
            stream = self.driver.stream(*requests, seconds=self.timeout_seconds)
            async with aclosing(stream) as events:
                async for event in events:
                    for chunk in answer.chunks(index[event.request], event):
                        yield _line(chunk)
        except Exception as error:  # the status is sent already
            yield _line(as_api_error(error).body)
            return
        for chunk in answer.ending():
            yield _line(chunk)
        yield b"data: [DONE]\n\n"


class EventStream(Response):
    """Lines as they come, until the client leaves; `close` is called in the end in any case."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncGenerator[bytes, None], close: Callable[[], None]):
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._lines, self._close = lines, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._close()
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
            await self._lines.aclose()
        if not work.cancelled() and not isinstance(error := work.exception(), OSError | None):
            raise error

    async def _send(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        async for line in self._lines:
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_gone(receive: Receive) -> None:
    """Until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _line(told: dict[str, Any]) -> bytes:
    text = json.dumps(told, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


def _refused(message: str, is_chat: bool) -> ApiError:
    """An error of the engine, which names its argument first, in the names of the API."""
    message = re.sub(r"^(tokens: )?prompt 0\b", "prompt", message)  # each is submitted by itself
    name, prompt = re.split("[=: ]", message)[0], "messages" if is_chat else "prompt"
    api = {"max_new_tokens": "max_tokens", "bias": "logit_bias", "key": "seed"}
    param = prompt if name in ("prompt", "tokens") else api.get(name, name)
    if param not in (Chat if is_chat else Completion).model_fields:
        return ApiError(400, message)
    return ApiError(400, param + message[len(name) :], param=param)
