"""`spmdeploy edit` as it is mostly written, read without typer, whose import takes as long as the edit's network.

What is taken here typer takes too, and gives the same options for it; a test compares the two. Everything else, help
and mistakes above all, is left to typer, and so are the words of its messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spmdeploy.cli.choices import Backend, PrecisionChoice, TilingChoice
from spmdeploy.cli.one_edit import EditOptions

_FLAGS = {"--match-surroundings": "match_surroundings", "--overwrite": "overwrite", "--json": "as_json"}


def _number(word: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", word):
        raise ValueError(word)
    return int(word)


_VALUES: dict[str, tuple[str, Callable[[str], object]]] = {
    "--output": ("output", Path),
    "-o": ("output", Path),
    "--labels": ("labels", Path),
    "--fill": ("fill", str),
    "--mask": ("mask", Path),
    "--edited-from": ("edited_from", Path),
    "--extend": ("extend", str),
    "--instances": ("instances", Path),
    "--grow": ("grow", _number),
    "--sheet": ("sheet", Path),
    "--explain": ("explain", Path),
    "--model": ("model", Path),
    "--backend": ("backend", Backend),
    "--device": ("device", str),
    "--precision": ("precision", PrecisionChoice),
    "--tiling": ("tiling", TilingChoice),
    "--require-signature": ("require_signature", str),
}
"""Options that have a value, and what reads it; ValueError for what typer shall judge."""


def plain_edit(words: Sequence[str]) -> EditOptions | None:
    """The options, where `words` are `edit`, a photo and options in full with their values; else None."""
    if not words or words[0] != "edit":
        return None
    given: dict[str, Any] = {}
    rest = iter(words[1:])
    for word in rest:
        value: object = True
        if word in _FLAGS:
            name = _FLAGS[word]
        elif word in _VALUES:
            name, read = _VALUES[word]
            text = next(rest, "")
            if not _is_plain(text):
                return None
            try:
                value = read(text)
            except ValueError:
                return None
        elif _is_plain(word):
            name, value = "image", Path(word)
        else:
            return None
        if name in given:
            return None
        given[name] = value
    return EditOptions(**given) if {"image", "output"} <= given.keys() else None


def _is_plain(word: str) -> bool:
    """Whether a word cannot be an option, and is text. (Names of files may be none, where a byte is no UTF-8.)"""
    return bool(word) and not word.startswith("-") and word.isprintable()
