"""Errors in the form of OpenAI's API."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from diffkv_jax.server.driver import Closed, EngineFailed, Full

INVALID, LIMIT, SERVER = "invalid_request_error", "rate_limit_error", "server_error"


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        told = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}

    def response(self) -> JSONResponse:
        """As an answer."""
        return JSONResponse(self.body, self.status, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """What an exception of the driver, the engine or Starlette comes to for a client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail, headers=dict(error.headers or {}))
    if isinstance(error, Full):
        after = {"Retry-After": "1"}
        return ApiError(429, str(error), kind=LIMIT, code="too_many_requests", headers=after)
    if isinstance(error, Closed):
        return ApiError(503, str(error), kind=SERVER, code="shutting_down")
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request took too long", kind="timeout_error", code="timeout")
    if isinstance(error, EngineFailed):
        return ApiError(500, "the engine has failed; see /health", kind=SERVER, code="engine")
    return ApiError(500, "internal error", kind=SERVER)


def answer_error(_: Request, error: Exception) -> JSONResponse:
    """A Starlette exception handler."""
    return as_api_error(error).response()
