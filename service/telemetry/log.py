"""Log lines on standard error: readable text, or one JSON object a line.

Access lines, one a request, are gathered and written together a few times a second. That costs a microsecond a line,
where a log record costs twenty.
"""

import contextlib
import json
import logging
import os
import select
import sys
import time
from typing import Any, TextIO

_LONGEST = 200


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class _TextFormatter(logging.Formatter):
    """Writes one line a record. Only a traceback takes more, which are indented, so that no text can forge a line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        return _escape(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: ANN401, N802 - as the base class has it
        return "\n".join(f"  {_escape(line)}" for line in super().formatException(ei).splitlines())


class _Handler(logging.StreamHandler[TextIO]):
    """Writes records to standard error; drops them when the reader has stalled, rather than wait for it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            target = self.stream.fileno()
        except (OSError, ValueError):  # a stream in memory, as in tests
            super().emit(record)
            return
        line = (self.format(record) + self.terminator).encode(errors="backslashreplace")  # file names need not be text
        with contextlib.suppress(OSError):  # nobody reads the log any more
            _write_now(target, _split(line))


def configure(log_format: str) -> None:
    """Send this service's log lines, and warnings of the libraries below it, to standard error.

    Args:
        log_format: "text" or "json".
    """
    handler = _Handler(sys.stderr)
    text = _TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("service").setLevel(logging.INFO)


def timestamp(seconds: float) -> str:
    """Return a time since the epoch in UTC, RFC 3339 with milliseconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"


class AccessLog:
    """Gathers access lines; `flush` writes them to standard error. Not for several threads.

    Args:
        log_format: "text" or "json".
        enabled: when not, lines are dropped.
    """

    def __init__(self, log_format: str, enabled: bool) -> None:
        self._enabled = enabled
        self._json = log_format == "json"
        self._lines: list[str] = []

    def add(
        self, request_id: bytes, what: str, status: int, rows: int, seconds: float, model: str = "", error: str = ""
    ) -> None:
        """Add a line.

        Args:
            request_id: the answer's `X-Request-ID`.
            what: method and path.
            status: of the answer.
            rows: instances in the request, 0 where there are none.
            seconds: from the request's head to its answer.
            model: which model and version answered, where one did.
            error: message of a failed response.
        """
        if not self._enabled:
            return
        what = what if what.isprintable() and len(what) <= _LONGEST else _shorten(what)
        error = error and _shorten(error)
        name = request_id.decode("latin-1")
        if self._json:
            line = (
                f'"level": "info", "logger": "access", "id": "{name}", "request": {json.dumps(what)}, '
                f'"status": {status}, "rows": {rows}, "ms": {seconds * 1000:.2f}'
            )
            line += f', "model": "{model}"' if model else ""
            line += f', "error": {json.dumps(error)}}}\n' if error else "}\n"
        else:
            line = f" INFO access: {name} {what} {status} rows={rows} ms={seconds * 1000:.2f}"
            line += f" model={model}" if model else ""
            line += f" error={error}\n" if error else "\n"
        self._lines.append(line)

    def flush(self) -> None:
        """Write the gathered lines, with the time of writing: at most a tenth of a second after the response."""
        if not self._lines:
            return
        lines, self._lines = self._lines, []
        now = time.time()
        if self._json:
            start = f'{{"time": "{timestamp(now)}", '
        else:
            start = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)) + f",{int(now % 1 * 1000):03d}"
        with contextlib.suppress(OSError, ValueError):  # nobody reads the log any more, or it is not a file
            _write_now(sys.stderr.fileno(), [(start + line).encode() for line in lines])


def _shorten(text: str) -> str:
    """Return text from a caller, short and printable, so that no caller can forge a log line."""
    return text if text.isprintable() and len(text) <= _LONGEST else ascii(text[:_LONGEST])


def _escape(text: str) -> str:
    """Return text with line breaks and other characters that are not printable as escapes."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _split(text: bytes) -> list[bytes]:
    return [text[start : start + select.PIPE_BUF] for start in range(0, len(text), select.PIPE_BUF)]


def _write_now(target: int, lines: list[bytes]) -> None:
    """Write lines in pieces that other processes cannot split; drop them when the reader has stalled."""
    piece = b""
    for line in [*lines, b""]:
        if piece and (not line or len(piece) + len(line) > select.PIPE_BUF):
            if not select.select([], [target], [], 0)[1]:
                return
            os.write(target, piece)
            piece = b""
        piece += line
