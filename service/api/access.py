"""Who may call the service, by API key, and from which web pages, and who may change what it serves."""

import hmac
import re
from collections.abc import Sequence

from service.api.headers import RequestHeaders
from service.errors import ForbiddenError, NotFoundError, ServiceError, UnauthorizedError, UnavailableError
from service.settings import Settings

HIDDEN_PROBLEM = "not ready; send a key to see why"
HIDDEN_NOT_FOUND = "there is no such model or version; send a key to see which there are"
_NAMES = re.compile(rb"(?<=/models/)[^/]+|(?<=/versions/)[^/]+")
_LOOPBACK = "localhost,127.0.0.1,[::1]"
_MOST_HOSTS = 1024  # kept with their ports
_PORT = re.compile(rb":\d*$")
_PREFLIGHT = (
    b"access-control-allow-methods: GET, POST\r\naccess-control-allow-headers: *, authorization\r\n"
    b"access-control-max-age: 600\r\n"
)
_SLASH = re.compile(rb"%2F", re.IGNORECASE)
_NEEDLESS = re.compile(rb"%(2[D-F]|3\d|[46][1-9A-F]|[57][\dA]|5F|7E)", re.IGNORECASE)


class WebRules:
    """Which web pages may call the service: those of its own origin, and of the origins that `--cors-origin` allows.

    Any page can send requests to a service on its reader's machine. It cannot hide its origin. With a host name that it
    makes resolve to that machine (DNS rebinding) it would be of the same origin, so host names are checked as well.

    `hosts` are values of the Host field that are allowed, with each that `check` has allowed; empty if all are.
    """

    def __init__(self, settings: Settings) -> None:
        names = _split_list(settings.allowed_hosts)
        self._names = frozenset() if b"*" in names else names
        self._origins = _split_list(settings.cors_origin)
        self.hosts = {b"", *self._names} if self._names else set[bytes]()  # only HTTP/1.0 has no Host, and no browser

    def check(self, method: str, headers: RequestHeaders) -> None:
        """Refuse what another site's web page could send on its own.

        Raises:
            ForbiddenError: the origin or the host is not allowed.
        """
        host, origin = headers.host.lower(), headers.origin
        if self.hosts and host not in self.hosts:
            if _PORT.sub(b"", host) not in self._names:
                shown = host[:60].decode("latin-1")
                raise ForbiddenError(f"the host {shown} is not allowed here; add it to --allowed-hosts if it is yours")
            if len(self.hosts) < _MOST_HOSTS:
                self.hosts.add(headers.host)
        is_own = origin.partition(b"://")[2].lower() == host
        if origin and method not in ("GET", "HEAD") and not is_own and not self._allows(origin):
            shown = origin[:60].decode("latin-1")
            raise ForbiddenError(f"web pages of {shown} may not call this service; to allow it, set --cors-origin")

    def build_fields(self, method: str, origin: bytes) -> bytes:
        """Return the header lines by which a browser lets a page of an allowed origin read the response."""
        if not self._allows(origin):
            return b""
        return b"access-control-allow-origin: %b\r\nvary: origin\r\n%b" % (origin, _PREFLIGHT * (method == "OPTIONS"))

    def is_preflight(self, method: str, origin: bytes) -> bool:
        """Tell whether a browser asks if a page of an allowed origin may send a request."""
        return method == "OPTIONS" and self._allows(origin)

    def _allows(self, origin: bytes) -> bool:
        return bool(origin) and (origin.lower() in self._origins or b"*" in self._origins)


def restrict_hosts(settings: Settings) -> Settings:
    """Allow only a loopback address's own names as hosts, if nothing else is set."""
    return settings.model_copy(update={"allowed_hosts": settings.allowed_hosts or f"{_LOOPBACK},{settings.host}"})


def _split_list(value: str) -> frozenset[bytes]:
    return frozenset(part.strip().lower().rstrip("/").encode() for part in value.split(",") if part.strip())


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
