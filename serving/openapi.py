"""The endpoint's own description at GET /openapi.json: bodies as they are checked, errors in their one shape."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

_REFS = "#/components/schemas/{model}"
_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": _TEXT, "code": _TEXT},
            "additionalProperties": False,
        }
    },
}
ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"description": "An error.", "content": {"application/json": {"schema": ERROR}}}
}
"""For `responses=` of a route: every answer but 200."""


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """For `openapi_extra=` of a route whose body we parse ourselves."""
    schema = {"$ref": _REFS.format(model=model.__name__)}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


def describe(app: FastAPI, bodies: list[type[BaseModel]]) -> None:
    """Have the app's description define these bodies, and what they hold, where `body_of` points."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        whole = plain()
        schemas = whole.setdefault("components", {}).setdefault("schemas", {})
        for body in bodies:
            own = body.model_json_schema(ref_template=_REFS)
            schemas |= own.pop("$defs", {})
            schemas[body.__name__] = own
        return whole

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
