"""Writes bundles, each in a hidden folder that is renamed when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from spmdeploy.bundle.bundle import Bundle, open_bundle, open_store
from spmdeploy.bundle.manifest import Manifest
from spmdeploy.bundle.storage import ENGINES, MANIFEST, SUMS, FolderStore
from spmdeploy.errors import BundleError, InputError
from spmdeploy.files import (
    check_free,
    is_safe_relative_path,
    os_errors,
    put_in_place,
    resolve_target,
    sha256,
    staging_dir,
)


class BundleWriter:
    """Builds a bundle in a hidden folder next to `target`, which is created whole or not at all.

        with BundleWriter(target) as writer:
            onnx.save(model, writer.path("graphs/edit.fp32.onnx"))
            size, digest = writer.measure("graphs/edit.fp32.onnx")
            bundle = writer.finish(manifest)

    Without `finish` the block leaves nothing behind except files that `save_rejected` moved out.
    An existing target is refused; with `overwrite` it is replaced if it is an intact bundle and nothing else.

    Raises:
        InputError: The target cannot be written.
        BundleError: The manifest does not fit the files.
    """

    def __init__(self, target: str | Path, overwrite: bool = False) -> None:
        with os_errors(target, "write"):
            self.target = resolve_target(target)
        self.overwrite = overwrite
        self._stack = ExitStack()
        self._folder: Path

    def __enter__(self) -> BundleWriter:
        with os_errors(self.target, "write"):
            check_free(self.target, self.overwrite, check_replaceable)
            self._folder = self._stack.enter_context(staging_dir(self.target))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def path(self, name: str) -> Path:
        """The path to write the file `name` to; its parent folders are created."""
        if not is_safe_relative_path(name) or name in (MANIFEST, SUMS):
            raise BundleError(f"{self.target}: no file in it may be named {name!r}", "use a plain relative name")
        path = self._folder / name
        with os_errors(self.target, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add_bytes(self, name: str, content: bytes) -> None:
        """Writes a new file.

        Raises:
            BundleError: The name is taken.
        """
        with os_errors(self.target, "write"), open(self._vacant_path(name), "xb") as stream:
            stream.write(content)

    def add_file(self, name: str, source: str | Path) -> None:
        """Copies the content of `source` into a new file.

        Raises:
            BundleError: The name is taken.
        """
        path = self._vacant_path(name)
        with os_errors(self.target, "write"):
            shutil.copyfile(source, path)

    def measure(self, name: str) -> tuple[int, str]:
        """Size in bytes and SHA-256 of a file as it is now, for its record in the manifest."""
        with os_errors(self.target, "write"):
            return _measure(self.path(name))

    def save_rejected(self, name: str) -> Path:
        """Moves a file that must not ship to `TARGET.FILE.rejected` for inspection, replacing an earlier one."""
        kept = self.target.with_name(f"{self.target.name}.{PurePosixPath(name).name}.rejected")
        with os_errors(kept, "write"):
            os.replace(self.path(name), kept)
        return kept

    def finish(self, manifest: Manifest) -> Bundle:
        """Writes manifest and SHA256SUMS, opens the result as a reader would, and renames it to the target."""
        with os_errors(self.target, "write"):
            Manifest.from_json(manifest.to_json(), str(self.target / MANIFEST))  # ensures that it can be read again
            (self._folder / MANIFEST).write_bytes(manifest.to_bytes())
            self._write_sums()
            open_store(FolderStore(self._folder, shown=self.target))
            check_free(self.target, self.overwrite, check_replaceable)
            put_in_place(self._folder, self.target)
        return open_bundle(self.target)

    def _vacant_path(self, name: str) -> Path:
        path = self.path(name)
        if path.exists():
            raise BundleError(f"{self.target}: {name} is in it already", "add every file once")
        return path

    def _write_sums(self) -> None:
        digests = {}
        for name in FolderStore(self._folder, shown=self.target).sizes:
            if not name.startswith(ENGINES):
                digests[name] = _measure(self._folder / name)[1]
        (self._folder / SUMS).write_bytes(format_checksums(digests))


def check_replaceable(target: Path) -> None:
    """Raises InputError unless an intact bundle with nothing else in it is at `target`."""
    try:
        unlisted = open_bundle(target).unlisted_files
    except BundleError as exc:
        raise InputError(f"{target}: not replaced, no intact bundle: {exc.problem}", "remove it yourself") from exc
    if unlisted:
        raise InputError(f"{target}: not replaced, {unlisted[0]} is no part of the bundle in it", "move that file away")


def _measure(path: Path) -> tuple[int, str]:
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        return size, sha256(stream, size)


def format_checksums(digests: Mapping[str, str]) -> bytes:
    """SHA256SUMS for these digests by name."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()
