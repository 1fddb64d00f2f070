"""A request's body, read up to a limit."""

from fastapi import Request

from graftwork.serving.api_error import ApiError

MAX_BODY_BYTES = 4 * 2**20
"""A larger body is refused before it is read whole: a prompt of 128k tokens takes about 0.6 MB."""


async def read_body(request: Request) -> bytes:
    """The whole body. Raises ApiError 413 where it is larger than MAX_BODY_BYTES."""
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
        raise ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.", code="request_too_large")
    return b"".join(parts)
