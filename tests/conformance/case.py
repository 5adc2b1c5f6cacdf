"""What a case is: a name, its rule, the best outcomes, the other outcomes that the rule allows, and what is sent.

An outcome is written as the statuses of the responses, and `+` if the connection stays usable: `200+`, `200,200+`,
`400` (answered and closed), `-` (closed without an answer), `~` (the server waits for more). Patterns are fnmatch's.
A 400 of the application, which got another body than `BODY`, leaves the connection open, so it differs from a 400 of
the protocol. Rules are sections of RFC 9112, or of RFC 9110 where they begin with `S` (semantics).

`framing` has the cases about where a request ends, which could smuggle one; `exchanges` has the rest. Sources: the two
RFCs; the descriptions of Http11Probe's tests (https://github.com/MDA2AV/Http11Probe); PortSwigger's "HTTP desync
attacks" (2019 to 2025); the chunk-extension attacks of Jeppe Bonde Weikop (2025); llhttp's leniency flags.
"""

from typing import NamedTuple

PREDICT = "/v1/models/doubler:predict"
BODY = '{"instances":[[1]]}'  # 19 bytes, 13 in hexadecimal
POST = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\n"
GET = "GET /health/live HTTP/1.1\r\nHost: x\r\n"
NEXT = f"{GET}\r\n"
CHUNKS = f"13\r\n{BODY}\r\n0\r\n\r\n"
TE = "Transfer-Encoding: chunked\r\n"
HALF_CLOSE = ""  # as a segment: the client sends no more

REFUSED = "400 -"
UNKNOWN_CODING = "400 501 -"
TOO_LONG = "400 413 414 431 -"
INCOMPLETE = "~ 400 408 504 -"


class Case(NamedTuple):
    """One row. `sent` is one segment, or several, each sent once the one before has been answered or has not."""

    name: str
    rule: str
    best: str
    sent: str | tuple[str, ...]
    allowed: str = ""
    wanted: str = ""  # a pattern that the responses must have
    unwanted: str = ""  # and one that they must not have


def length(value: str, body: str = BODY, more: str = "") -> str:
    """Return a POST with a Content-Length as given."""
    return f"{POST}{more}Content-Length: {value}\r\n\r\n{body}"


def coding(line: str, body: str = BODY) -> str:
    """Return a POST with a line that a lenient server may take for `Transfer-Encoding`, and a right Content-Length."""
    return f"{POST}{line}\r\nContent-Length: {len(body)}\r\n\r\n{body}"


def chunks(body: str) -> str:
    """Return a POST with a body that is said to be chunked."""
    return f"{POST}{TE}\r\n{body}"


def field(line: str) -> str:
    """Return a GET with one more line in its head."""
    return f"{GET}{line}\r\n\r\n"


def line(request_line: str) -> str:
    """Return a request of a request line and a Host."""
    return f"{request_line}\r\nHost: x\r\n\r\n"
