"""Who a peer is: an RSA key in a file, and the peer id that is the hash of its public half.

The file is libp2p's own (a protobuf of key type and DER), as hivemind and Petals write it, so that their identities can be
used here. The same key signs what a server announces, so a record belongs to the peer whose id it names. Knows no network.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slowllm.errors import InputError
from slowllm.files import lock, sync, system_errors

KEY_BITS = 2048
MAX_IDENTITY_BYTES = 16 << 10
ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
SHA256_CODE = b"\x12\x20"
_RSA = 0


@dataclass(frozen=True)
class Identity:
    """A peer's key.

    Attributes:
        der: the private key, PKCS #1 in DER.
        peer: the peer's id in base58.
    """

    der: bytes
    peer: str

    def file_bytes(self) -> bytes:
        """Return the content of an identity file."""
        return b"\x08\x00" + b"\x12" + _varint(len(self.der)) + self.der


def new_identity() -> Identity:
    """Return a new RSA key of `KEY_BITS`; takes a tenth of a second or a few."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=KEY_BITS)
    der = key.private_bytes(
        encoding=serialization.Encoding.DER,
        format=serialization.PrivateFormat.TraditionalOpenSSL,
        encryption_algorithm=serialization.NoEncryption(),
    )
    return _identity_of(der)


def read_identity(data: bytes, where: object) -> Identity:
    """Return the identity that an identity file holds.

    Args:
        data: the file's content.
        where: the file's name for the message of an error.
    Raises:
        InputError: it is no identity file, or holds a key of another kind than RSA.
    """
    advice = "name a file that `slowllm dht --identity` made, or one that is not there yet"
    fields = _fields_of(data)
    if fields is None or set(fields) != {1, 2} or not isinstance(der := fields[2], bytes):
        raise InputError(f"{where}: is no identity file; {advice}")
    if fields[1] != _RSA:
        raise InputError(f"{where}: holds a key of another kind than RSA; {advice}")
    try:
        return _identity_of(der)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: holds a damaged key; {advice}") from error


@contextmanager
def holding_identity(path: Path | None) -> Iterator[Identity]:
    """Yield the identity of a file, which is made if it is not there, and keep it from other processes meanwhile.

    Args:
        path: the file; None for an identity that is forgotten afterwards.
    Raises:
        InputError: the file cannot be read or made, is no identity file, or another process of this machine uses it.
    """
    if path is None:
        yield new_identity()
        return
    with system_errors(InputError, path):
        if not path.exists():
            # Only its owner may read it: whoever has the file can speak as this peer.
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with open(file, "wb") as made:
                    made.write(new_identity().file_bytes())
                    sync(made)
            except BaseException:  # a full disk: the next start would take a part of a key for a damaged one
                path.unlink(missing_ok=True)
                raise
        held = path.open("rb")
    with held:
        with system_errors(InputError, path):
            in_use = "is used by another process; every process needs an identity file of its own"
            lock(held.fileno(), InputError(f"{path}: {in_use}"))
            data = held.read(MAX_IDENTITY_BYTES + 1)
        yield read_identity(data, path)


def peer_of_public_key(ssh_key: bytes) -> str:
    """Return the id of the peer whose public key this is.

    Args:
        ssh_key: as OpenSSH writes it: ``ssh-rsa AAAA...``.
    Raises:
        ValueError: it is no such key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    try:
        key = serialization.load_ssh_public_key(ssh_key)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from error
    if not isinstance(key, rsa.RSAPublicKey):
        raise ValueError("is no RSA key")
    return _peer_of(key)


def _identity_of(der: bytes) -> Identity:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = serialization.load_der_private_key(der, password=None)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise ValueError("is no RSA key")
    return Identity(der, _peer_of(key.public_key()))


def _peer_of(key: object) -> str:
    """Return the multihash of a public key as libp2p writes it."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    assert isinstance(key, rsa.RSAPublicKey)
    der = key.public_bytes(
        encoding=serialization.Encoding.DER, format=serialization.PublicFormat.SubjectPublicKeyInfo
    )
    message = b"\x08\x00" + b"\x12" + _varint(len(der)) + der
    return _base58(SHA256_CODE + hashlib.sha256(message).digest())


def _base58(data: bytes) -> str:
    number, letters = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, len(ALPHABET))
        letters = ALPHABET[digit] + letters
    assert data[0], "a multihash begins with its code"
    return letters


def _varint(number: int) -> bytes:
    data = b""
    while number >= 0x80:
        data += bytes([number & 0x7F | 0x80])
        number >>= 7
    return data + bytes([number])


def _fields_of(data: bytes) -> dict[int, int | bytes] | None:
    """Return the fields of a protobuf message of numbers and bytes, by their numbers; None for anything else."""
    fields: dict[int, int | bytes] = {}
    place = 0

    def number() -> int:
        nonlocal place
        value = 0
        for shift in range(0, 35, 7):
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise IndexError

    try:
        while place < len(data):
            tag = number()
            if tag & 7 == 0:
                fields[tag >> 3] = number()
            elif tag & 7 == 2:
                length = number()
                if place + length > len(data):
                    return None
                fields[tag >> 3] = data[place : place + length]
                place += length
            else:
                return None
    except IndexError:
        return None
    return fields
