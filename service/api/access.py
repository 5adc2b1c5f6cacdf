"""Who may call the service, by API key, and who may change what it serves."""

import hmac
import ipaddress
from collections.abc import Sequence

from starlette.requests import Request

from service.errors import UnauthorizedError
from service.settings import Settings


def read_keys(settings: Settings) -> list[bytes]:
    """Return the keys that callers may send, including the admin key; none where no key is needed."""
    keys = [*settings.api_key.split(","), settings.admin_key] if settings.api_key else []
    return [key.strip().encode() for key in keys if key.strip()]  # an empty key would let everybody in


def check_key(sent: bytes, keys: Sequence[bytes]) -> None:
    """Refuse a request without one of the keys, where keys are set, in constant time.

    Raises:
        UnauthorizedError: the key is missing or wrong.
    """
    if keys and not sum(hmac.compare_digest(sent, key) for key in keys):  # all compared, always
        problem = "this key is not valid" if sent else "a key is needed"
        raise UnauthorizedError(f"{problem}; send it as X-API-Key, or as Authorization: Bearer")


def check_admin(request: Request, admin_key: bytes, sent: bytes) -> None:
    """Refuse callers who may not change what is served: without an admin key, all but those on this machine.

    Raises:
        UnauthorizedError: the admin key is missing or wrong, or the request may come from elsewhere.
    """
    if admin_key:
        if not hmac.compare_digest(sent, admin_key):
            raise UnauthorizedError("this needs the admin key; send it as X-API-Key, or as Authorization: Bearer")
        return
    # Requests of other machines can arrive through a proxy here, or through a page in a browser here.
    foreign = ("forwarded", "x-forwarded-for", "x-real-ip", "origin", "sec-fetch-site")
    forwarded = any(name in request.headers for name in foreign)
    if forwarded or request.client is None or not _is_loopback(request.client.host):
        raise UnauthorizedError("what is served can be changed from this machine only; set --admin-key to allow others")


def _is_loopback(host: str) -> bool:
    """Tell whether a peer's address is a loopback one; a dual-stack socket shows IPv4 as ::ffff:127.0.0.1."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
