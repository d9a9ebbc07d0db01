"""Safe names and atomic writes of files."""

from __future__ import annotations

MAX_NAME_LENGTH = 240
"""Characters: unpacks below any folder on every file system."""


def is_safe_relative_path(name: str) -> bool:
    """Whether `name` is a plain relative path with / between its parts, safe to join to a folder on any system."""
    parts = name.split("/")
    # ":" covers drive letters and NTFS streams; isprintable covers NUL, newlines, lone surrogates, direction overrides.
    plain = name.isprintable() and "\\" not in name and ":" not in name
    return plain and len(name) <= MAX_NAME_LENGTH and not {"", ".", ".."} & set(parts)
