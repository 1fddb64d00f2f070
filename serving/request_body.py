"""A request's body, read up to a limit of size and time."""

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect

from graftwork.serving.api_error import ApiError

MAX_BODY_BYTES = 4 * 2**20
"""A larger body is refused before all of it is read: a prompt of 128k tokens takes about 0.6 MB."""
BODY_TIMEOUT_S = 30.0
"""From the end of the head to the end of the body."""


async def read_body(request: Request) -> bytes:
    """Return the whole body. Raises ApiError: 413 larger than MAX_BODY_BYTES, 408 too slow, 499 the client has left."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await _read(request)
    except TimeoutError:
        message = f"The body was not complete after {BODY_TIMEOUT_S:g} s. Send the request again."
        raise ApiError(408, message, code="request_timeout") from None
    except ClientDisconnect:
        raise ApiError(499, "The client closed the connection within the body.", code="client_disconnected") from None


async def _read(request: Request) -> bytes:
    declared = request.headers.get("content-length", "0")
    parts, size = [], int(declared) if declared.isdecimal() else 0
    if size <= MAX_BODY_BYTES:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > MAX_BODY_BYTES:
                break
    if size > MAX_BODY_BYTES:
        message = f"The body is larger than {MAX_BODY_BYTES} bytes. Send a shorter prompt or fewer texts."
        raise ApiError(413, message, code="request_too_large")
    return b"".join(parts)
