"""Stores the kernels that TensorRT-RTX compiles on the device, for later processes.

They are GPU code that no hash in a bundle covers, so they are stored only in the user's own cache.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from spmdeploy.engines.record import EngineRecord
from spmdeploy.errors import InputError, UnavailableError
from spmdeploy.files import atomic_write, user_cache

MAX_BYTES = 1 << 30


class KernelCache:
    """The library's runtime cache (`cache`) and its file. The library itself rejects a cache that does not fit."""

    def __init__(self, cache: Any, record: EngineRecord) -> None:
        """Load the file into `cache`.

        Args:
            cache: An empty IRuntimeCache. A CUDA context must be current: the library checks the cache against it.
            record: The engine's record, whose key names the file.
        """
        self.cache = cache
        self._content = b""
        self._path: Path | None = None
        with suppress(UnavailableError, OSError):
            self._path = user_cache() / "kernels" / record.key
            if self._path.stat().st_size <= MAX_BYTES:
                content = self._path.read_bytes()
                self._content = content if cache.deserialize(content) else b""

    def save(self) -> list[str]:
        """Writes the kernels if there are new ones. Returns notes on why that failed."""
        if self._path is None:
            return ["compiled kernels are lost: no cache folder is known, SPMDEPLOY_CACHE names one"]
        serialized = self.cache.serialize()
        content = b"" if serialized is None else bytes(serialized)
        if content in (b"", self._content):
            return []
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(self._path) as stream:
                stream.write(content)
        except (OSError, InputError) as exc:
            return [f"compiled kernels are lost: {exc}"]
        self._content = content
        return []
