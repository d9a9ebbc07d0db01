"""Reads the fields of an edit from forms and JSON, and describes them for OpenAPI."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from spmdeploy.editing.options import EditOptions, parse_padding
from spmdeploy.editing.session import Session
from spmdeploy.errors import UsageError
from spmdeploy.serialization import parse_json, shorten

PROBLEM = "application/problem+json"
_FILES = ("image", "labels", "mask", "instances")
_FIELDS: dict[str, dict[str, Any]] = {
    "image": {"description": "The photo: 8-bit PNG, JPEG, WebP or BMP."},
    "labels": {"description": "Label map: what the photo is to show. PNG of class ids."},
    "mask": {"description": "White is edited, black is kept."},
    "instances": {"description": "Instance map, for outlines between objects of one class."},
    "fill": {"type": "string", "description": "One class for everything under the mask, by name or id."},
    "extend": {
        "type": "string",
        "pattern": r"^\d{1,5},\d{1,5},\d{1,5},\d{1,5}$",
        "description": "Pixels to extend the photo by: left, top, right, bottom.",
    },
    "tiling": {"type": "string", "enum": ["auto", "off", "crop", "cascade"], "default": "auto"},
    "feather": {"type": "integer", "minimum": 0, "maximum": 1024, "default": 3},
    "dilate": {
        "type": "integer",
        "minimum": 0,
        "maximum": 1024,
        "default": 0,
        "description": "Pixels to grow the mask by.",
    },
    "match_surroundings": {
        "type": "boolean",
        "description": "Match colors and noise to known pixels of the classes. Default: where the labels fit.",
    },
}


def session_from_fields(fields: dict[str, Any]) -> Session:
    """Return the edit that a form or a JSON body describes.

    Args:
        fields: text or JSON values; files as their content and name.

    Raises:
        UsageError: a field is missing, unknown or wrong.
    """
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown:
        raise UsageError(f"unknown field {unknown[0]!r}", f"the fields are {', '.join(_FIELDS)}")

    def file(name: str) -> bytes | None:
        value = fields.get(name)
        if value is None:
            return None
        if not isinstance(value, tuple):
            raise UsageError(f"{name} is not a file", "send it as a file part of the form, or in base64 in JSON")
        content: bytes = value[0]
        return content

    photo = file("image")
    if photo is None:
        raise UsageError("image is missing", "send the photo as the file part `image`")
    extend = _text(fields, "extend")
    options: dict[str, Any] = {}
    for name, parse in (("tiling", _text), ("feather", _integer), ("dilate", _integer), ("match_surroundings", _flag)):
        if fields.get(name) is not None:
            options[name] = parse(fields, name)
    return Session(
        photo=photo,
        photo_name=str(fields["image"][1] or "image")[:200],
        labels=file("labels"),
        fill=_text(fields, "fill"),
        mask=file("mask"),
        instances=file("instances"),
        extend=None if extend is None else parse_padding(extend),
        options=EditOptions(**options),
    )


def _text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{name} is not a text", "send it as a string")
    return value


def _integer(fields: dict[str, Any], name: str) -> int:
    value = fields[name]
    if isinstance(value, str) and re.fullmatch("[0-9]{1,6}", value):
        return int(value)
    if type(value) is not int:
        raise UsageError(f"{name} is {shorten(value)}, not a whole number")
    return value


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields[name]
    if isinstance(value, bool):
        return value
    if value in ("true", "false"):
        return bool(value == "true")
    raise UsageError(f"{name} is {shorten(value)}, not true or false")


def decode_json_fields(body: bytes) -> dict[str, Any]:
    """Return the fields of a JSON body, files decoded from base64.

    Raises:
        UsageError: It is no JSON object, or a field is wrong.
    """
    try:
        fields = parse_json(body)
    except ValueError as exc:
        raise UsageError(f"the body is not JSON: {exc}") from exc
    if not isinstance(fields, dict):
        raise UsageError("the body is not a JSON object")
    for name in _FILES:
        if fields.get(name) is not None:
            try:
                fields[name] = (base64.b64decode(fields[name], validate=True), None)
            except (TypeError, ValueError, binascii.Error) as exc:
                raise UsageError(f"{name} is not base64", "encode the file as base64, without a data: prefix") from exc
    return fields


def _schema(file: dict[str, Any]) -> dict[str, Any]:
    fields = {name: facts | (file if name in _FILES else {}) for name, facts in _FIELDS.items()}
    return {"type": "object", "properties": fields, "required": ["image"], "additionalProperties": False}


def responses(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """Return the responses of a route that takes files, for its OpenAPI document."""
    problem = {"content": {PROBLEM: {"schema": {"type": "object"}}}}
    return {
        404: {"description": "There is no such thing.", **problem},
        422: {"description": "A parameter in the address is wrong.", **problem},
        200: {"description": "Done.", "content": {media_type: {} for media_type in media_types}},
        400: {"description": "Something about the inputs is wrong; `detail` and `hint` say what.", **problem},
        413: {"description": "The request is too large.", **problem},
        415: {"description": "The body is of another type.", **problem},
        429: {"description": "Too many edits wait; Retry-After says when to try again.", **problem},
        503: {"description": "The edit took too long, or the service is shutting down.", **problem},
    }


EDIT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _schema({"type": "string", "format": "binary"})},
            "application/json": {"schema": _schema({"type": "string", "contentEncoding": "base64"})},
        },
    }
}
FILE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
EDIT_RESPONSES = responses("image/png", "application/json", "application/x-ndjson")
