"""API keys: which ones a service takes, and whether a request has sent one of them."""

import hmac
from collections.abc import Sequence

from service.errors import UnauthorizedError
from service.settings import Settings


def read_keys(settings: Settings) -> list[bytes]:
    """Return the keys that callers may send, the admin's among them; none where no key is asked for."""
    keys = [*settings.api_key.split(","), settings.admin_key] if settings.api_key else []
    return [key.strip().encode() for key in keys if key.strip()]  # an empty one would let everybody in


def check_key(sent: bytes, keys: Sequence[bytes]) -> None:
    """Refuse a request without one of the keys, where keys are set, in time that tells nothing of the keys.

    Raises:
        UnauthorizedError: no key, or not one of ours.
    """
    if keys and not sum(hmac.compare_digest(sent, key) for key in keys):  # all compared, always
        problem = "this key is not valid" if sent else "a key is needed"
        raise UnauthorizedError(f"{problem}; send it as X-API-Key, or as Authorization: Bearer")
