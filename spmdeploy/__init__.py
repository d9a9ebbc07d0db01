"""spmdeploy: semantic image editing from training to the edge.

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
    """The bundle inside the package: `street`, for photos of streets (see its card.md for data and licence)."""
    return Path(__file__).parent / "assets" / "models" / "street.spm"


def open_editor(
    model: str | Path | None = None,
    backend: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    require_signature: str | Path | None = None,
    on_loading: Callable[[ClassTable], None] = lambda classes: None,
) -> Editor:
    """An `Editor` on a bundle, ready to edit; use it as a context manager or call its `close`.

    model: a bundle (folder or zip); None for the default model. backend: auto, onnxruntime, tensorrt, tensorrt-rtx or
    torch. device: auto, cpu or cuda:N. precision: auto, fp32 or fp16. What is asked for by name is done or refused,
    never replaced; what `auto` chose and why is in `editor.choices`. require_signature: a minisign public key, as a
    file or its line; without a signature made with it the bundle is refused before anything in it is looked at.
    on_loading: called with the model's classes before ONNX Runtime loads the graph, which takes long and leaves Python
    to other threads: the time to start one that reads photos, say. Not called for other backends; twice where a GPU
    fails and the CPU takes its place.

    Raises BundleError (not a sound bundle, not signed as required), UnavailableError (this machine cannot), UsageError
    (no such option).
    """
    from spmdeploy.bundle.bundle import open_bundle
    from spmdeploy.bundle.signature import read_public_key

    key = None if require_signature is None else read_public_key(require_signature)
    bundle = open_bundle(default_model() if model is None else model, key)
    from spmdeploy.backends.registry import open_backend

    opened = open_backend(bundle, backend, device, precision, lambda: on_loading(bundle.manifest.classes))
    from spmdeploy.editing.editor import Editor  # not before: what `on_loading` started may have imported it by now

    signer = (f"signature by the key {bundle.signature.key}: {bundle.signature.comment}",) if bundle.signature else ()
    return Editor(opened.session, bundle.manifest.classes, (*signer, *opened.choices))


def __getattr__(name: str) -> Any:
    if name == "Editor":
        from spmdeploy.editing.editor import Editor

        return Editor
    if name == "EditOptions":
        from spmdeploy.editing.options import EditOptions

        return EditOptions
    raise AttributeError(f"module 'spmdeploy' has no attribute {name!r}")
