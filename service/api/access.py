"""Who may call the service, by API key, and who may change what it serves."""

import hmac
import re
from collections.abc import Sequence

from service.errors import NotFoundError, ServiceError, UnauthorizedError, UnavailableError
from service.settings import Settings

HIDDEN_PROBLEM = "not ready; send a key to see why"
HIDDEN_NOT_FOUND = "there is no such model or version; send a key to see which there are"
_NAMES = re.compile(rb"(?<=/models/)[^/]+|(?<=/versions/)[^/]+")
_SLASH = re.compile(rb"%2F", re.IGNORECASE)
_NEEDLESS = re.compile(rb"%(2[D-F]|3\d|[46][1-9A-F]|[57][\dA]|5F|7E)", re.IGNORECASE)


def read_keys(settings: Settings) -> list[bytes]:
    """Return the keys that callers may send, including the admin key; none where no key is needed."""
    keys = [*settings.api_key.split(","), settings.admin_key] if settings.api_key else []
    return [key.strip().encode() for key in keys if key.strip()]  # an empty key would let everybody in


def is_known(sent: bytes, keys: Sequence[bytes]) -> bool:
    """Tell whether a caller sent one of the keys, in constant time; everybody is known where none is set."""
    return not keys or bool(sum(hmac.compare_digest(sent, key) for key in keys))  # all compared, always


def hide_reason(error: ServiceError) -> ServiceError:
    """Return what a caller without a key may know of a failure: its status."""
    hidden = HIDDEN_NOT_FOUND if isinstance(error, NotFoundError) else HIDDEN_PROBLEM
    return type(error)(hidden) if isinstance(error, NotFoundError | UnavailableError) else error


def check_key(sent: bytes, keys: Sequence[bytes]) -> None:
    """Refuse a request without one of the keys, where keys are set.

    Raises:
        UnauthorizedError: the key is missing or wrong.
    """
    if not is_known(sent, keys):
        problem = "this key is not valid" if sent else "a key is needed"
        raise UnauthorizedError(f"{problem}; send it as X-API-Key, or as Authorization: Bearer")


def check_admin(sent: bytes, admin_key: bytes, token: bytes) -> None:
    """Refuse callers who may not change what is served.

    An address proves nothing: a proxy on the same machine passes on the requests of others.

    Args:
        sent: what the caller sent as a key.
        admin_key: the operator's; empty where none is set.
        token: the command line's, valid where no admin key is set; empty where there is none.

    Raises:
        UnauthorizedError: neither was sent.
    """
    expected = admin_key or token
    if expected and hmac.compare_digest(sent, expected):
        return
    if admin_key:
        raise UnauthorizedError("this needs the admin key; send it as X-API-Key, or as Authorization: Bearer")
    how = "run `python -m service models` as the service's user on its machine, or set --admin-key"
    raise UnauthorizedError(f"only the command line may change what is served, as no admin key is set; {how}")


def check_path(raw: bytes) -> None:
    """Refuse an encoded path that a proxy, whose rules may not decode it, would take for another.

    Raises:
        NotFoundError: more is percent-encoded in it than names, as in `/v2/repositor%79/index`.
    """
    if b"%" in raw and (_SLASH.search(raw) or _NEEDLESS.search(_NAMES.sub(b"", raw))):
        raise NotFoundError("only names may be percent-encoded in a path; write everything else in it as it is")
