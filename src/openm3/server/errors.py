"""What a client is told when its request fails: one exception, and its body in each protocol's own shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openm3.errors import BusyError, EngineError, OpenM3Error

_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_OPENAI = {401: "authorized_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_MINIMAX_CODES = {400: 2013, 401: 1004, 404: 2013, 408: 1001, 413: 2013, 429: 1002, 500: 1000, 503: 1000}


class RequestError(OpenM3Error):
    """A request that is refused, with the HTTP status, and the field that is wrong if one is.

    `details` are for Anthropic's clients, which act on some of them.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.details = details


def refusal(error: Exception) -> RequestError:
    """Any exception as what a client may be told of it: never a trace, and of what nobody foresaw only that it was."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, BusyError):
        return RequestError(str(error), status=429, code="busy")
    if isinstance(error, EngineError):
        return RequestError("the engine has stopped; the server's log says why", status=503, code="engine_stopped")
    if isinstance(error, OpenM3Error):
        return RequestError(str(error))
    return RequestError("internal error; the server's log says more under this request's id", status=500)


def error_body(error: RequestError, path: str, request_id: str) -> dict[str, Any]:
    """The body for a path: Anthropic's shape under its paths, elsewhere OpenAI's with MiniMax's fields beside it."""
    if is_anthropic(path):
        kind = _ANTHROPIC.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        said = {"type": kind, "message": error.message} | ({"details": dict(error.details)} if error.details else {})
        return {"type": "error", "error": said, "request_id": request_id}
    code = _MINIMAX_CODES.get(error.status, 1000 if error.status >= 500 else 2013)
    detail = {
        "message": f"{error.message} ({code})",
        "type": _OPENAI.get(error.status, "bad_request_error"),
        "param": error.param,
        "code": error.code or str(code),
        "http_code": str(error.status),
    }
    return {"type": "error", "error": detail, "request_id": request_id}


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's protocol."""
    return path.startswith(("/v1/messages", "/anthropic/"))
