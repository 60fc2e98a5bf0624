"""Identities are libp2p's, and what is none is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slowllm.errors import InputError
from slowllm.swarm.identity import holding_identity, new_identity, peer_of_public_key, read_identity
from tests.support.properties import num_examples


def test_peer_and_file_are_those_of_hivemind(tmp_path: Path) -> None:
    from hivemind.p2p import P2P, PeerID
    from hivemind.utils.crypto import RSAPrivateKey

    ours = new_identity()
    assert PeerID.from_identity(ours.file_bytes()).to_base58() == ours.peer
    assert read_identity(ours.file_bytes(), "file") == ours
    P2P.generate_identity(str(tmp_path / "theirs"))
    data = (tmp_path / "theirs").read_bytes()
    theirs = read_identity(data, "file")
    assert theirs.peer == PeerID.from_identity(data).to_base58()
    assert theirs.file_bytes() == data
    key = RSAPrivateKey.__new__(RSAPrivateKey)
    key.__setstate__({"_private_key": theirs.der})
    assert peer_of_public_key(key.get_public_key().to_bytes()) == theirs.peer


def test_a_file_is_made_once_for_its_owner_and_held_by_one(tmp_path: Path) -> None:
    file = tmp_path / "identity"
    with holding_identity(file) as first:
        assert file.stat().st_mode & 0o777 == 0o600
        with pytest.raises(InputError, match=rf"{file}: is used by another process"), holding_identity(file):
            pass
    with holding_identity(file) as again:
        assert again == first
    with holding_identity(None) as other:
        assert other != first


ED25519 = b"\x08\x01\x12\x40" + bytes(range(64))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "is no identity file; name a file that `slowllm dht --identity` made, or one that is not there yet"),
        (b"hello world", "is no identity file"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\n", "is no identity file"),
        (b"\x08\x00\x12\xff\xff\x03x", "is no identity file"),
        (b"\x08\x00\x12", "is no identity file"),
        (b"\x08\xff\xff\xff\xff\xff\xff\xff", "is no identity file"),
        (b"\x08\x00\x10\x05", "is no identity file"),
        (ED25519, "holds a key of another kind than RSA"),
        (b"\x08\x00\x12\x05hello", "holds a damaged key"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, data: bytes, match: str) -> None:
    file = tmp_path / "identity"
    file.write_bytes(data)
    with pytest.raises(InputError, match=f"{file}: {match}"), holding_identity(file):
        pass


def test_a_key_of_another_kind_in_the_file_is_refused() -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    der = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    with pytest.raises(InputError, match="holds a damaged key"):
        read_identity(b"\x08\x00\x12" + bytes([len(der)]) + der, "file")


@given(st.binary(max_size=60))
@num_examples(200)
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="file: "):
        read_identity(data, "file")


def test_a_file_that_cannot_be_read_or_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Is a directory"), holding_identity(tmp_path):
        pass
    with (
        pytest.raises(InputError, match="No such file or directory"),
        holding_identity(tmp_path / "no" / "file"),
    ):
        pass


@pytest.mark.parametrize("key", [b"", b"ssh-rsa AAAA", b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGYZ", b"\xff"])
def test_what_is_no_public_key_has_no_peer(key: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        peer_of_public_key(key)


def test_a_public_key_of_another_kind_has_no_peer() -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = ed25519.Ed25519PrivateKey.generate().public_key()
    text = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    with pytest.raises(ValueError, match="is no RSA key"):
        peer_of_public_key(text)
