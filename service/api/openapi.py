"""Request bodies for /openapi.json: routes read them by hand, so FastAPI cannot know them."""

from __future__ import annotations

from typing import Any

from service.api.schemas import Body


def json_body(body: type[Body]) -> dict[str, Any]:
    """The `requestBody` of a route, with nested models written out in place."""
    schema = body.model_json_schema()
    definitions = schema.pop("$defs", {})
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": _inline(schema, definitions)}}}
    }


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inline(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {key: _inline(value, definitions) for key, value in node.items()}
