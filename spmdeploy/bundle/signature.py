"""Signs bundles and checks their signatures, in the format of minisign (jedisct1.github.io/minisign).

The package py-minisign does the work. Only signatures over the BLAKE2b hash of the content are made and accepted, not
the older ones over the content itself.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spmdeploy.errors import BundleError, InputError, UnavailableError
from spmdeploy.files import atomic_write, os_errors
from spmdeploy.inputs import regular_file

if TYPE_CHECKING:
    from types import ModuleType

_OPERATIONS, _MEMORY = 1 << 25, 1 << 30
"""minisign's limits for scrypt: guessing a password costs 1 GiB and about 3 seconds."""
_MAX_KEY_BYTES = 4096  # of a key file; they have about 250
_SIGN_AGAIN = "get the signature again from the signer of the bundle"
_MAKE_KEY = "make one: spmdeploy bundle keygen NAME"


@dataclass(frozen=True)
class PublicKey:
    """Public key, which checks signatures."""

    line: str
    """The key in one line of base64, as `minisign -P` takes it."""

    @property
    def name(self) -> str:
        """The key id as minisign shows it; it identifies a key but proves nothing."""
        return _key_name(base64.b64decode(self.line))


@dataclass(frozen=True)
class SecretKey:
    """Decrypted secret key, which makes signatures."""

    line: str = field(repr=False)
    """The key in one line of base64, as in a key file without a password."""

    @property
    def public(self) -> PublicKey:
        """The key that checks what this one signs."""
        return PublicKey(self._load().get_public_key().to_base64().decode())

    def _load(self) -> Any:
        return _minisign().SecretKey.from_base64(self.line)


@dataclass(frozen=True)
class Signature:
    """A signature that was verified."""

    key: str
    """The name of the key."""
    comment: str
    """Trusted comment of the signer, covered by the signature."""


def sign(content: bytes, key: SecretKey, comment: str) -> bytes:
    """Returns the content of a signature file. The result is deterministic.

    Args:
        content: The bytes to sign.
        key: The secret key.
        comment: One line that the signature covers; characters outside ASCII, which minisign refuses, are escaped.
    """
    signature = key._load().sign(
        content,
        prehash=True,
        untrusted_comment=f"signature by spmdeploy, key {key.public.name}",
        trusted_comment=comment.encode("ascii", "backslashreplace").decode(),
    )
    return bytes(signature) + b"\n"


def check_signature(content: bytes, signature: bytes, key: PublicKey, shown: Path) -> Signature:
    """Checks a signature file over `content`.

    Args:
        content: The signed bytes.
        signature: Content of the signature file.
        key: The key that must have signed.
        shown: The signature's path, for messages.

    Returns:
        Key name and trusted comment.

    Raises:
        BundleError: The file is no signature, or one by another key or over something else.
    """
    minisign = _minisign()
    try:
        parsed = minisign.Signature.from_bytes(signature)
        canonical = bytes(parsed)
    except minisign.ParseError as exc:
        raise BundleError(f"{shown}: no signature in minisign's format: {exc}", _SIGN_AGAIN) from exc
    comment: str = parsed.trusted_comment
    if not parsed.is_prehashed():
        raise BundleError(f"{shown}: no signature of a hash, but one of minisign's older format", _SIGN_AGAIN)
    if canonical != signature.removesuffix(b"\n") or not comment.isprintable():
        raise BundleError(f"{shown}: no signature in minisign's format: not written as minisign does", _SIGN_AGAIN)
    made_by = _key_name(base64.b64decode(canonical.split(b"\n")[1]))
    if made_by != key.name:
        raise BundleError(f"{shown}: made with the key {made_by}, not with {key.name}", _SIGN_AGAIN)
    try:
        minisign.PublicKey.from_base64(key.line).verify(content, parsed)
    except minisign.VerifyError as exc:
        raise BundleError(
            f"{shown}: does not fit: this is not what the key {key.name} signed",
            "the bundle was altered, or this is the signature of another one; get both again",
        ) from exc
    return Signature(key.name, comment)


def new_key() -> SecretKey:
    """Generates a key pair from the system's random source."""
    return SecretKey(_minisign().KeyPair.generate().secret_key.to_base64().decode())


def read_public_key(given: str | Path) -> PublicKey:
    """Reads a public key file, or takes the base64 line in one, as `minisign -P` does.

    Raises:
        InputError: It is no public key of minisign.
    """
    minisign = _minisign()
    try:
        if not os.path.lexists(given) and str(given).startswith("RW"):
            key = minisign.PublicKey.from_base64(str(given))
        else:
            key = minisign.PublicKey.from_bytes(_read_key(Path(given)))
    except (minisign.ParseError, UnicodeError) as exc:
        hint = "give the .pub file or the line in it that starts with RW"
        raise InputError(f"{given}: no public key in minisign's format: {exc}", hint) from exc
    return PublicKey(key.to_base64().decode())


def read_secret_key(path: Path, ask_password: Callable[[], str]) -> SecretKey:
    """Reads a secret key file.

    Args:
        path: Of the file.
        ask_password: Called only where the key is encrypted.

    Raises:
        InputError: It is no secret key of minisign, or the password is wrong.
    """
    minisign = _minisign()
    try:
        key = minisign.SecretKey.from_bytes(_read_key(path))
    except minisign.ParseError as exc:
        raise InputError(f"{path}: no secret key in minisign's format: {exc}", _MAKE_KEY) from exc
    packed = base64.b64decode(key.to_base64())
    operations, memory = int.from_bytes(packed[38:46], "little"), int.from_bytes(packed[46:54], "little")
    if operations > _OPERATIONS or memory > _MEMORY:
        asked = f"{memory >> 20} MiB and {operations} operations"
        raise InputError(f"{path}: asks for {asked} to decrypt it, more than any key of minisign", _MAKE_KEY)
    if key.is_encrypted():
        _decrypt(key, ask_password(), path)
    try:
        key.get_public_key().verify(b"", key.sign(b""))
    except minisign.VerifyError as exc:
        problem = f"{path}: corrupt: its two halves do not belong together"
        raise InputError(problem, "take it from its backup") from exc
    return SecretKey(key.to_base64().decode())


def _decrypt(key: Any, password: str, path: Path) -> None:
    minisign = _minisign()
    try:
        with os_errors(path, "decrypt"):
            key.remove_password(_as_text(password, path))
    except minisign.Error as exc:
        raise InputError(f"{path}: the password is wrong", "try again") from exc


def _as_text(password: str, path: Path) -> str:
    """Returns the password after checking that it is valid UTF-8."""
    try:
        password.encode()
    except UnicodeError as exc:
        raise InputError(f"{path}: the password is not valid text", "passwords must be in UTF-8") from exc
    return password


def write_key_pair(path: Path, key: SecretKey, password: str | None, memory: int = _MEMORY) -> tuple[Path, Path]:
    """Writes PATH.key, readable by its owner alone, and PATH.pub; never replaces either.

    Args:
        path: PATH, without a suffix.
        key: The key to write.
        password: None writes the secret key unencrypted.
        memory: Memory that one guess of the password costs, in bytes (scrypt).

    Returns:
        The paths of both.

    Raises:
        InputError: One exists already, or cannot be written.
    """
    if path.name in ("", ".."):
        raise InputError(f"{str(path)!r} is no name for a key", "give one, such as fleet")
    secret_path, public_path = path.with_name(f"{path.name}.key"), path.with_name(f"{path.name}.pub")
    for taken in (secret_path, public_path):
        if os.path.lexists(taken):
            raise InputError(f"{taken}: exists already, and keys are never replaced", "choose another name")
    secret, public = key._load(), _minisign().PublicKey.from_base64(key.public.line)
    public.untrusted_comment = f"minisign public key {key.public.name}"
    if password is not None:
        operations = memory // (_MEMORY // _OPERATIONS)
        with os_errors(secret_path, "encrypt"):
            secret.encrypt(_as_text(password, secret_path), opslimit=operations, memlimit=memory)
    for target, written, mode in ((secret_path, secret, 0o600), (public_path, public, 0o644)):
        with atomic_write(target, overwrite=False, mode=mode) as stream:
            stream.write(bytes(written) + b"\n")
    return secret_path, public_path


def _key_name(packed: bytes) -> str:
    """The id in a key or signature: the 8 bytes after the name of the algorithm."""
    return f"{int.from_bytes(packed[2:10], 'little'):016X}"


def _read_key(path: Path) -> bytes:
    with os_errors(path, "read"), open(regular_file(path), "rb") as stream:
        return stream.read(_MAX_KEY_BYTES)


def _minisign() -> ModuleType:
    try:
        import minisign
    except ImportError as exc:
        problem = f"signatures need the package py-minisign: {exc}"
        raise UnavailableError(problem, 'pip install "spmdeploy[sign]"') from exc
    module: ModuleType = minisign
    return module
