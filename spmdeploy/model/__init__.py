"""The SPM progressive generator in PyTorch (Luo et al., ECCV 2022, arXiv 2207.06252)."""

from __future__ import annotations

import re
from pathlib import Path

from spmdeploy.inputs import regular_file

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
"""Usual suffixes of the files that `checkpoint.load_checkpoint` reads."""
_LEGACY_PICKLE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch.save began before version 1.6."""


def is_checkpoint(path: Path) -> bool:
    """Whether a file is to be read as weights: by its content, or by its suffix where the content does not decide.

    Bundles and files of torch.save are both zip archives; only the latter contain a data.pkl. Does not import torch.
    """
    try:
        with regular_file(path).open("rb") as stream:
            start = stream.read(512)
    except OSError:
        return False
    if start.startswith(b"PK\x03\x04") and re.search(rb"[^/]{1,200}/(?:data\.pkl|\.format_version|byteorder)", start):
        return True
    if start.startswith(_LEGACY_PICKLE) or re.match(rb".{8}\{", start, re.DOTALL):  # the latter is safetensors
        return True
    return path.suffix.lower() in CHECKPOINT_SUFFIXES
