"""Keys to sign versions with."""

from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


class Keys(NamedTuple):
    """The files of a pair of keys."""

    private: Path
    public: Path


def make_keys(folder: Path) -> Keys:
    """Write a new pair of keys on the curve P-256 into a folder."""
    keys = Keys(folder / "key.pem", folder / "key.pub.pem")
    private = ec.generate_private_key(ec.SECP256R1())
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    keys.private.write_bytes(private.private_bytes(pem, form, serialization.NoEncryption()))
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    keys.public.write_bytes(public)
    return keys
