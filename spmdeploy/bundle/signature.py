"""Signatures in the format of minisign (jedisct1.github.io/minisign): Ed25519 over the BLAKE2b of what is signed.

Keys and signatures are text files that `minisign` writes and reads too:

    NAME.pub        a comment; base64 of "Ed", key id (8), public key (32)
    NAME.key        a comment; base64 of "Ed", "Sc" or two zeros, "B2", salt (32), scrypt limits (2 x 8, little endian),
                    and, with "Sc" encrypted by what scrypt makes of the password: key id (8), seed (32), public key
                    (32), BLAKE2b of "Ed" and the three (32; zeros in unencrypted keys of minisign's own)
    FILE.minisig    a comment; base64 of "ED", key id (8), signature (64); a trusted comment; base64 of the signature
                    over signature and trusted comment

Older signatures ("Ed": without the hash) are refused. The arithmetic is that of the package cryptography.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from spmdeploy.errors import BundleError, InputError, OutOfMemoryError, UnavailableError

if TYPE_CHECKING:
    from types import ModuleType

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_KEY, _HASHED, _SCRYPT, _PLAIN, _BLAKE2B = b"Ed", b"ED", b"Sc", b"\0\0", b"B2"
_OPERATIONS, _MEMORY = 1 << 25, 1 << 30  # minisign's own limits: guessing a password costs 1 GiB and about 3 seconds
_MAX_KEY_BYTES = 4096  # of a key file; they have about 250
_UNTRUSTED, _TRUSTED = "untrusted comment: ", "trusted comment: "
_SIGN_AGAIN = "get the signature again from whoever signed the bundle"


@dataclass(frozen=True)
class PublicKey:
    """What signatures are checked with."""

    key_id: bytes
    """8 random bytes that tell keys apart; they prove nothing."""
    key: bytes
    """32 bytes."""

    @property
    def name(self) -> str:
        """The key id as minisign shows it."""
        return f"{int.from_bytes(self.key_id, 'little'):016X}"

    @property
    def line(self) -> str:
        """The key in one line of base64, as `minisign -P` takes it."""
        return _base64(_KEY + self.key_id + self.key)


@dataclass(frozen=True)
class SecretKey:
    """What signatures are made with. Never shown: its repr has the key id alone."""

    key_id: bytes
    seed: bytes = field(repr=False)
    """32 bytes."""

    @property
    def public(self) -> PublicKey:
        return PublicKey(self.key_id, _signer(self.seed).public_key().public_bytes_raw())


@dataclass(frozen=True)
class Signature:
    """A signature that was checked and fits."""

    key: str
    """The name of the key."""
    comment: str
    """What the signer said, covered by the signature."""


# ------------------------------------------------------------------------------------------------------ sign and check


def sign(content: bytes, key: SecretKey, comment: str) -> bytes:
    """A signature file over `content`: the same for the same three. comment: one line, covered by the signature."""
    signer = _signer(key.seed)
    signature = signer.sign(hashlib.blake2b(content).digest())
    whole = signer.sign(signature + comment.encode())
    lines = (
        f"{_UNTRUSTED}signature by spmdeploy, key {key.public.name}",
        _base64(_HASHED + key.key_id + signature),
        _TRUSTED + comment,
        _base64(whole),
    )
    return "".join(f"{line}\n" for line in lines).encode()


def check_signature(content: bytes, signature: bytes, key: PublicKey, shown: Path) -> Signature:
    """What a signature file over `content` says. shown: the signature's path, for messages.

    Raises BundleError where the file is no signature, another key's, or one over something else.
    """
    ed25519 = _import_ed25519()
    from cryptography.exceptions import InvalidSignature

    key_id, signed, comment, whole = _parse_signature(signature, shown)
    if key_id != key.key_id:
        made_by = PublicKey(key_id, b"").name
        raise BundleError(f"{shown}: made with the key {made_by}, not with {key.name}", _SIGN_AGAIN)
    verifier = ed25519.Ed25519PublicKey.from_public_bytes(key.key)
    try:
        verifier.verify(signed, hashlib.blake2b(content).digest())
        verifier.verify(whole, signed + comment.encode())
    except InvalidSignature as error:
        raise BundleError(
            f"{shown}: does not fit: this is not what the key {key.name} signed",
            "the bundle was altered, or this is the signature of another one; get both again",
        ) from error
    return Signature(key.name, comment)


def _parse_signature(content: bytes, shown: Path) -> tuple[bytes, bytes, str, bytes]:
    """Key id, signature, trusted comment and the signature over both."""
    lines = content.decode("utf-8", "replace").removesuffix("\n").split("\n")
    if len(lines) != 4 or not lines[0].startswith(_UNTRUSTED) or not lines[2].startswith(_TRUSTED):
        raise BundleError(f"{shown}: no signature in minisign's format", _SIGN_AGAIN)
    packed, whole, comment = _decoded(lines[1]), _decoded(lines[3]), lines[2].removeprefix(_TRUSTED)
    if len(packed) != 74 or packed[:2] != _HASHED or len(whole) != 64 or not comment.isprintable():
        raise BundleError(f"{shown}: no signature of a hash in minisign's format", _SIGN_AGAIN)
    return packed[2:10], packed[10:], comment, whole


# ---------------------------------------------------------------------------------------------------------------- keys


def new_key() -> SecretKey:
    """A key from the system's source of randomness."""
    return SecretKey(os.urandom(8), os.urandom(32))


def read_public_key(given: str | Path) -> PublicKey:
    """A public key file, or the base64 line in one, as `minisign -P` takes it. Raises InputError."""
    path = Path(given)
    line = str(given) if len(_decoded(str(given))) == 42 and not path.exists() else _key_line(path)
    packed = _decoded(line)
    if len(packed) != 42 or packed[:2] != _KEY:
        raise InputError(
            f"{given}: no public key in minisign's format",
            "give the .pub file or the line in it that starts with RW",
        )
    return PublicKey(packed[2:10], packed[10:])


def read_secret_key(path: Path, ask_password: Callable[[], str]) -> SecretKey:
    """A secret key file. The password is asked for only where the key is encrypted. Raises InputError."""
    packed = _decoded(_key_line(path))
    if len(packed) != 158 or packed[:2] != _KEY or packed[2:4] not in (_SCRYPT, _PLAIN) or packed[4:6] != _BLAKE2B:
        raise InputError(f"{path}: no secret key in minisign's format", "make one: spmdeploy bundle keygen NAME")
    encrypted = packed[2:4] == _SCRYPT
    secret = packed[54:]
    if encrypted:
        operations, memory = (int.from_bytes(packed[start : start + 8], "little") for start in (38, 46))
        secret = _xor(secret, _derive_key(ask_password(), packed[6:38], operations, memory, path))
    key = SecretKey(secret[:8], secret[8:40])
    if encrypted and secret[72:] != _checksum(secret[:72]):
        raise InputError(f"{path}: the password is wrong", "try again")
    if secret[40:72] != key.public.key:
        raise InputError(f"{path}: damaged: its two halves do not belong together", "take it from its backup")
    return key


def write_key_pair(path: Path, key: SecretKey, password: str | None, memory: int = _MEMORY) -> tuple[Path, Path]:
    """Writes PATH.key, readable by its owner alone, and PATH.pub; returns both. Never replaces either.

    password: None writes the secret key as it is. memory: what guessing a password costs, in bytes.
    Raises InputError.
    """
    if path.name in ("", ".."):
        raise InputError(f"{str(path)!r} is no name for a key", "give one, such as fleet")
    secret_path, public_path = path.with_name(f"{path.name}.key"), path.with_name(f"{path.name}.pub")
    for taken in (secret_path, public_path):
        if os.path.lexists(taken):
            raise InputError(f"{taken}: exists already, and keys are never replaced", "choose another name")
    content = _secret_text(key, password, memory, secret_path)
    _write_new(secret_path, content, 0o600)
    _write_new(public_path, f"{_UNTRUSTED}minisign public key {key.public.name}\n{key.public.line}\n", 0o644)
    return secret_path, public_path


def _secret_text(key: SecretKey, password: str | None, memory: int, path: Path) -> str:
    secret = key.key_id + key.seed + key.public.key
    secret += _checksum(secret)
    if password is None:
        return _key_text("minisign secret key", _PLAIN, bytes(48), secret)
    salt, operations = os.urandom(32), memory // (_MEMORY // _OPERATIONS)
    secret = _xor(secret, _derive_key(password, salt, operations, memory, path))
    settings = salt + operations.to_bytes(8, "little") + memory.to_bytes(8, "little")
    return _key_text("minisign encrypted secret key", _SCRYPT, settings, secret)


def _key_text(comment: str, kind: bytes, settings: bytes, secret: bytes) -> str:
    return f"{_UNTRUSTED}{comment}\n{_base64(_KEY + kind + _BLAKE2B + settings + secret)}\n"


def _checksum(key: bytes) -> bytes:
    """key: key id, seed and public key, one after the other."""
    return hashlib.blake2b(_KEY + key, digest_size=32).digest()


def _derive_key(password: str, salt: bytes, operations: int, memory: int, path: Path) -> bytes:
    """104 bytes from a password by scrypt, whose parameters follow from libsodium's two limits as libsodium has it."""
    operations = max(operations, 1 << 15)
    by_operations = operations < memory // 32
    largest = operations // 32 if by_operations else memory // 1024
    cost = 2
    while cost <= largest // 2:
        cost *= 2
    parallel = 1 if by_operations else min(operations // 4 // cost, (1 << 30) - 1) // 8
    needed = 1024 * cost + 1024 * parallel + (1 << 20)
    if parallel < 1 or needed >= 1 << 31:
        raise InputError(
            f"{path}: asks for {needed >> 20} MiB to decrypt it, no key of minisign does", "make a new one"
        )
    secret = password.encode("utf-8", "surrogateescape")  # as the environment has it
    try:
        return hashlib.scrypt(secret, salt=salt, n=cost, r=8, p=parallel, maxmem=needed, dklen=104)
    except (MemoryError, ValueError) as error:
        words = f"{path}: decrypting it takes {needed >> 20} MiB of memory"
        raise OutOfMemoryError(
            words, "sign on a larger machine: devices that only check signatures need none"
        ) from error


def _key_line(path: Path) -> str:
    """The second line of a key file, without whatever follows it."""
    try:
        with open(path, "rb") as stream:
            lines = stream.read(_MAX_KEY_BYTES).decode("utf-8", "replace").splitlines()
    except OSError as error:
        raise InputError(f"{path}: the key cannot be read: {error.strerror}", "is that the right path?") from error
    return lines[1] if len(lines) > 1 and lines[0].startswith(_UNTRUSTED) else ""


def _write_new(path: Path, content: str, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}", "may you write there?") from error


# --------------------------------------------------------------------------------------------------------------- bytes


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _decoded(line: str) -> bytes:
    """The bytes of a base64 line; none where it is something else, or not the one way to write them."""
    line = line.removesuffix("\r")
    try:
        content = base64.b64decode(line, validate=True)
    except (binascii.Error, ValueError):
        return b""
    return content if _base64(content) == line else b""


def _xor(first: bytes, second: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(first, second, strict=True))


def _signer(seed: bytes) -> Ed25519PrivateKey:
    signer: Ed25519PrivateKey = _import_ed25519().Ed25519PrivateKey.from_private_bytes(seed)
    return signer


def _import_ed25519() -> ModuleType:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UnavailableError(
            f"signatures need the package cryptography: {error}", 'pip install "spmdeploy[sign]"'
        ) from error
    return ed25519
