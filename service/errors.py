"""Every error that a caller can see, with its HTTP status.

HeadstartError                 500  server_error
├── InputError                 422  invalid_request_error   (names field, value, what is allowed)
│   ├── MalformedError         400  the body is not what the content type says
│   ├── TooLargeError          413  the body is over the limit
│   └── MediaTypeError         415  content type not understood
├── AuthenticationError        401  authentication_error
├── NotFoundError              404  not_found_error
├── MethodError                405  invalid_request_error
├── NotAcceptableError         406  invalid_request_error   (the Accept header allows no reply)
├── ConflictError              409  conflict_error
├── GoneError                  410  gone_error
├── CancelledError             499  cancelled_error         (the client left or asked to stop)
├── BusyError                  429  rate_limit_error        (carries Retry-After)
├── NonFiniteError             500  server_error            (the latents of one picture overflowed)
├── UnavailableError           503  unavailable_error       (not ready, shutting down)
│   └── OutOfMemoryError       503                          (after the batch was split as far as it goes)
├── DeadlineError              504  deadline_error
└── SetupError                 exit status 2                (bad flag, missing weights, port in use)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class HeadstartError(Exception):
    """Root of the tree. `code` is a short machine-readable slug, `param` the field at fault."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def body(self) -> dict[str, Any]:
        """The reply's JSON: `{"error": {message, type, param, code}}`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InputError(HeadstartError):
    status = 422
    type = "invalid_request_error"
    code = "invalid_value"


class MalformedError(InputError):
    status = 400
    code = "malformed_body"


class TooLargeError(InputError):
    status = 413
    code = "body_too_large"


class MediaTypeError(InputError):
    status = 415
    code = "unsupported_media_type"


class AuthenticationError(HeadstartError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotFoundError(HeadstartError):
    status = 404
    type = "not_found_error"
    code = "not_found"


class MethodError(HeadstartError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class NotAcceptableError(HeadstartError):
    status = 406
    type = "invalid_request_error"
    code = "not_acceptable"


class ConflictError(HeadstartError):
    status = 409
    type = "conflict_error"
    code = "conflict"


class GoneError(HeadstartError):
    status = 410
    type = "gone_error"
    code = "gone"


class CancelledError(HeadstartError):
    status = 499
    type = "cancelled_error"
    code = "cancelled"


class BusyError(HeadstartError):
    """The queue is full. `retry_after` is in whole seconds, at least 1."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = max(1, retry_after)


class NonFiniteError(HeadstartError):
    code = "non_finite_latents"


class UnavailableError(HeadstartError):
    status = 503
    type = "unavailable_error"
    code = "not_ready"


class OutOfMemoryError(UnavailableError):
    code = "out_of_memory"


class DeadlineError(HeadstartError):
    status = 504
    type = "deadline_error"
    code = "deadline_exceeded"


class SetupError(HeadstartError):
    """The service cannot start. The command line prints the message alone and exits with status 2."""

    code = "setup"


def invalid(field: str, value: object, allowed: str) -> InputError:
    """An `InputError` that names the field, the value (shortened) and what is allowed."""
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return InputError(f"{field}: {shown} is not allowed; {allowed}", param=field)


def renamed(error: InputError, names: Mapping[str, str]) -> InputError:
    """The same error in the caller's words.

    Args:
        names: what the caller calls a field, where that is not its name; "size: width" for a part of one.
    """
    field = error.param or ""
    name = names.get(field, field)
    message = name + error.message.removeprefix(field) if error.message.startswith(field) else error.message
    return InputError(message, param=name.partition(":")[0], code=error.code)
