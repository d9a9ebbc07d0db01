"""Error messages contain no control characters for terminals."""

from __future__ import annotations

import pytest

from spmdeploy.errors import InputError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é, 日本, one\ntwo\tthree", "plain, é, 日本, one\ntwo\tthree"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("a\u202eb", r"a\u202eb"),
        ("name \udcff", "name \udcff"),
        ("\r", r"\r"),
    ],
)
def test_printable_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    error = InputError(text, text)
    assert error.problem == error.hint == str(error) == shown
