"""Semantic image editing with SPM generators, from training to edge devices.

    import spmdeploy
    editor = spmdeploy.open_editor("street.spm")
    result = editor.edit(image, labels, mask)    # uint8 HxWx3 RGB, int HxW, bool HxW
    result.image, result.report

Importing this package imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spmdeploy.errors import SpmDeployError
from spmdeploy.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from spmdeploy.editing.editor import Editor
    from spmdeploy.editing.options import EditOptions
    from spmdeploy.labels import ClassTable

__all__ = ["EditOptions", "Editor", "SpmDeployError", "__version__", "default_model", "open_editor"]


def default_model() -> Path:
    """Path of the built-in bundle `street`, for photos of streets (see its card.md for data and license)."""
    return Path(__file__).parent / "assets" / "models" / "street.spm"


def open_editor(
    model: str | Path | None = None,
    backend: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    require_signature: str | Path | None = None,
    on_loading: Callable[[ClassTable], None] = lambda classes: None,
) -> Editor:
    """Open a bundle and return an `Editor` for it; use it as a context manager or call its `close`.

    An explicit backend, device or precision is used or refused, never replaced by a fallback. The choices of `auto`,
    with reasons, are in `editor.choices`.

    Args:
        model: A bundle (folder or zip); None: the built-in model.
        backend: auto, onnxruntime, openvino, tensorrt, tensorrt-rtx, torch or triton.
        device: auto, cpu or cuda:N; for triton the server: HOST:PORT[,...][/MODEL].
        precision: auto, fp32, fp16 or bf16.
        require_signature: A minisign public key, as a file or its base64 line. A bundle that is not signed with it is
            refused before anything else in it is read.
        on_loading: Called with the model's classes just before ONNX Runtime loads the graph, which takes long and
            releases the GIL, so that a thread can read photos. Not called for other backends; called twice if a GPU
            fails and the CPU replaces it.

    Raises:
        BundleError: The bundle is corrupt, or not signed as required.
        UnavailableError: This machine lacks a library, driver or device.
        UsageError: There is no such backend, device or precision.
    """
    from spmdeploy.bundle.bundle import open_bundle

    key = None
    if require_signature is not None:
        from spmdeploy.bundle.signature import read_public_key

        key = read_public_key(require_signature)
    bundle = open_bundle(default_model() if model is None else model, key)
    from spmdeploy.backends.registry import open_backend

    opened = open_backend(bundle, backend, device, precision, lambda: on_loading(bundle.manifest.classes))
    from spmdeploy.editing.editor import Editor  # late: a thread started by `on_loading` may have imported it by now

    signer = (f"signature by the key {bundle.signature.key}: {bundle.signature.comment}",) if bundle.signature else ()
    return Editor(opened.session, bundle.manifest.classes, (*signer, *opened.choices), (*signer, *opened.notices))


def __getattr__(name: str) -> Any:
    if name == "Editor":
        from spmdeploy.editing.editor import Editor

        return Editor
    if name == "EditOptions":
        from spmdeploy.editing.options import EditOptions

        return EditOptions
    raise AttributeError(f"module 'spmdeploy' has no attribute {name!r}")
