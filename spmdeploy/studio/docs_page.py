"""The page /docs: the OpenAPI document as plain HTML, without scripts, so that it works offline."""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi.responses import HTMLResponse


def docs_page(document: dict[str, Any]) -> HTMLResponse:
    """Return a page that lists every route with its parameters, body fields and responses."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>spmdeploy service</title>",
        "<meta name='viewport' content='width=device-width'>",
        "<link rel='stylesheet' href='/static/docs.css'></head><body>",
        f"<main><h1>{escape(document['info']['title'])} {escape(document['info']['version'])}</h1>",
        f"<p>{escape(document['info']['description'])} Machine-readable: <a href='/openapi.json'>openapi.json</a>.</p>",
    ]
    for path, methods in document["paths"].items():
        for method, facts in methods.items():
            parts.append(f"<section><h2><code>{escape(method.upper())} {escape(path)}</code></h2>")
            parts += [f"<p>{escape(text)}</p>" for text in facts.get("description", "").split("\n\n") if text]
            rows = [(item["name"], item["in"], item.get("description", "")) for item in facts.get("parameters", ())]
            for kind, body in facts.get("requestBody", {}).get("content", {}).items():
                fields = body["schema"].get("properties", {})
                rows += [(name, kind, _field(field)) for name, field in fields.items()] or [("body", kind, "a file")]
            if rows:
                parts.append(_table(("field", "in", "meaning"), rows))
            answers = [
                (status, ", ".join(answer.get("content", {})), answer["description"])
                for status, answer in facts["responses"].items()
            ]
            parts.append(_table(("status", "type", "meaning"), answers) + "</section>")
    return HTMLResponse("".join(parts) + "</main></body></html>")


def _field(field: dict[str, Any]) -> str:
    choices = f" One of {', '.join(field['enum'])}." if "enum" in field else ""
    default = f" Default: {field['default']}." if "default" in field else ""
    return f"{field.get('description', '')}{choices}{default}".strip()


def _table(heading: tuple[str, ...], rows: list[tuple[str, str, str]]) -> str:
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in heading)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
