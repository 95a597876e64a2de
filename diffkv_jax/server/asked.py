"""Request bodies of OpenAI's API, and what they ask of the engine."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from diffkv_jax.sampling import Greedy, Sample
from diffkv_jax.server.errors import ApiError
from diffkv_jax.serving import Penalties

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
PROMPT = "a text, a list of texts, token ids, or a list of lists of token ids"

# Fields of OpenAI's API that are not supported, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple] = {
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
}

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class StreamOptions(BaseModel):
    model_config = STRICT
    include_usage: bool | None = None


class Asked(BaseModel):
    """What both endpoints take; None is a default."""

    model_config = STRICT
    model: str
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def top_logprobs_told(self) -> int | None:
        """`logprobs` of `Engine.submit`."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return bool(self.stream_options and self.stream_options.include_usage)


class Completion(Asked):
    """POST /v1/completions."""

    prompt: Any
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def top_logprobs_told(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """
        Raises:
            ApiError: it is none.
        """
        given = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if given is self.prompt and _is_ids(given):
            return [given]
        texts = all(isinstance(x, str) for x in given)
        if not given or not (texts or all(_is_ids(x) for x in given)):
            raise ApiError(400, f"prompt must be {PROMPT}", param="prompt")
        return given


class TextPart(BaseModel):
    model_config = STRICT
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None

    @property
    def told(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content if isinstance(self.content, list) else None
        content = "".join(part.text for part in parts) if parts else self.content
        role = "system" if self.role == "developer" else self.role
        found = {"role": role, "content": content if isinstance(content, str) else ""}
        return found if self.name is None else {**found, "name": self.name}


class Chat(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top_logprobs_told(self) -> int | None:
        if not self.logprobs and self.top_logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None


def _is_id(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_ids(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(map(_is_id, x))


Body = TypeVar("Body", bound=Asked)


def parsed(kind: type[Body], raw: bytes) -> Body:
    """The body of a request.

    Raises:
        ApiError: it is no such body; the first fault is named.
    """
    try:
        given = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(given, dict):
        raise ApiError(400, "the body must be a JSON object")
    for name in [name for name in given if name in UNSUPPORTED]:
        value = given.pop(name)
        harmless = any(value == x and type(value) is type(x) for x in UNSUPPORTED[name])
        if value is not None and not harmless:
            raise ApiError(400, f"{name} is not supported", param=name, code="unsupported")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(str(part) for part in fault["loc"]) or None
        name = str(fault["loc"][0]) if fault["loc"] else None
        raise ApiError(400, _said(fault["type"], name, param, fault["msg"]), param=name) from error


def _said(kind: str, name: str | None, where: str | None, message: str) -> str:
    if kind == "extra_forbidden":
        return f"{where} is not a parameter of this endpoint"
    if kind == "missing":
        return f"{where} is required"
    return f"{where or name}: {message}"


def _penalties(body: Asked) -> Penalties:
    try:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    except ValueError as error:
        message = "logit_bias must be an object of token ids and numbers"
        raise ApiError(400, message, param="logit_bias") from error
    return Penalties(
        bias=bias,
        repetition=body.repetition_penalty or 1.0,
        frequency=body.frequency_penalty or 0.0,
        presence=body.presence_penalty or 0.0,
    )


def choices(body: Asked) -> list[dict[str, Any]]:
    """Keywords of `Engine.submit` for each choice of one prompt, without prompt and length.

    Raises:
        ApiError, ValueError: a value is out of range.
    """
    common = {
        "sampling": _sampling(body),
        "stop": body.stop or (),
        "logprobs": body.top_logprobs_told,
        "penalties": _penalties(body),
    }
    seeds = [None if body.seed is None else body.seed + i for i in range(body.num_choices)]
    return [{**common, "seed": seed} for seed in seeds]


def _sampling(body: Asked) -> Greedy | Sample:
    temperature = 1.0 if body.temperature is None else body.temperature
    if temperature == 0:
        return Greedy()
    top_k = body.top_k if body.top_k and body.top_k > 0 else None
    return Sample(temperature, top_k=top_k, top_p=body.top_p, min_p=body.min_p or None)
