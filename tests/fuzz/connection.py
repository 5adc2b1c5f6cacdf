"""A connection without a socket: bytes go into the HTTP protocol in pieces, and what it writes comes out."""

import asyncio
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from service.app import Application, create_app
from service.http.connection import State
from service.http.protocol import HttpProtocol
from service.settings import Settings
from tests import fakes

_SPINS = 12  # turns of the event loop after each piece
_PATIENCE = 2000  # turns until a request must be answered
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_MAX_PIECES = 64


class FakeTransport(asyncio.Transport):
    """Keeps what is written, and says when nothing is to be read."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.ended = ""
        self.is_misused = False  # an exception would be taken for one of the parser
        self.is_paused = self._is_closing = self._has_ended = False

    def write(self, data: Any) -> None:
        """Take bytes; after `close` or `write_eof` there may be none."""
        self.is_misused |= self._is_closing or self._has_ended
        self.written += bytes(data)

    def writelines(self, list_of_data: Any) -> None:
        """Take bytes in pieces."""
        self.write(b"".join(list_of_data))

    def get_write_buffer_size(self) -> int:
        """Return 0: the client reads at once."""
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return an address for both ends."""
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def pause_reading(self) -> None:
        """Deliver nothing more."""
        self.is_paused = True

    def resume_reading(self) -> None:
        """Deliver again."""
        self.is_paused = False

    def is_reading(self) -> bool:
        """Tell whether bytes are delivered."""
        return not self.is_paused

    def is_closing(self) -> bool:
        """Tell whether the connection is closed."""
        return self._is_closing

    def close(self) -> None:
        """Close it."""
        self._is_closing = True

    abort = close

    def can_write_eof(self) -> bool:
        """Tell that one direction can be closed."""
        return True

    def write_eof(self) -> None:
        """Close one direction."""
        self._has_ended = True

    def note_end(self, otherwise: str) -> None:
        """Keep how it ended."""
        self.ended = "closed" if self._is_closing or self._has_ended else otherwise


def check_connection(data: bytes) -> None:
    """Send bytes at once and in pieces; both must be answered alike, and nothing may be held after.

    The first byte chooses the pieces.
    """
    if len(data) < 2:
        return
    loop, app = _open()
    seed, sent = data[0], data[1:]
    whole, transport = loop.run_until_complete(_converse(app, [sent]))
    if seed == 0 or len(sent) > _MAX_PIECES:
        cuts = [len(sent) * (seed + 1) // 257]
    else:
        cuts = list(range(1, len(sent), 1 + seed % 7))
    pieces = [sent[start:end] for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
    cut, _ = loop.run_until_complete(_converse(app, pieces))
    # Who says that the body may never come is answered, and let go, before it has.
    if b"expect" in sent.lower():
        return
    if transport.ended == "waiting":  # for the rest of a body: the application may have answered already, or not yet
        whole, cut = whole[: len(cut)], cut[: len(whole)]
    assert _agree(whole, cut), f"answered {whole} at once, and {cut} in pieces"


def _agree(whole: list[bytes], cut: list[bytes]) -> bool:
    """Tell whether the same was answered; where a body is broken, the application may have answered before."""
    if whole == cut:
        return True
    return len(whole) == len(cut) and whole[:-1] == cut[:-1] and max(whole[-1], cut[-1]) >= b"4"


@cache
def _open() -> tuple[asyncio.AbstractEventLoop, Application]:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    root = Path(tempfile.mkdtemp()) / "models"
    fakes.write_version(root, fakes.doubler().only("onnx"))
    return loop, create_app(Settings(models_dir=root, max_request_bytes=2**16, access_log=False))


def converse(pieces: list[bytes], half_closes: bool = False) -> tuple[bytes, str]:
    """Return what is written when pieces are sent, and then: "closed", "waiting" for more, or "usable".

    Args:
        pieces: what is sent, each once the one before has been read.
        half_closes: whether the client says then that it sends no more.
    """
    loop, app = _open()
    _, transport = loop.run_until_complete(_converse(app, pieces, half_closes))
    return transport.written, transport.ended


async def _converse(
    app: Application, pieces: list[bytes], half_closes: bool = False
) -> tuple[list[bytes], FakeTransport]:
    """Return the statuses of the responses to what is sent, without interim ones, and the transport."""
    protocol, transport = HttpProtocol(app, set()), FakeTransport()
    protocol.connection_made(transport)
    for piece in pieces:
        if transport.is_closing():
            break
        await _wait(lambda: not transport.is_paused or transport.is_closing(), "reading is paused for ever")
        if not transport.is_closing():
            protocol.data_received(piece)
        for _ in range(_SPINS):
            await asyncio.sleep(0)
    if half_closes and not transport.is_closing() and not protocol.eof_received():
        transport.close()
    await _wait(lambda: protocol.state is not State.WAITING, "a request is not answered")
    for _ in range(_SPINS):
        await asyncio.sleep(0)
    statuses = [status for status in _STATUS.findall(transport.written) if status >= b"2"]
    assert all(status < b"500" or status in (b"501", b"505") for status in statuses), transport.written
    assert not transport.is_misused, "written to a closed connection"
    transport.note_end("usable" if protocol.state is State.IDLE else "waiting")
    transport.close()
    protocol.connection_lost(None)
    await _wait(lambda: app.context.in_flight == 0, "a request stays in flight")
    app.recorder.answered.clear()
    return statuses, transport


async def _wait(is_so: Any, otherwise: str) -> None:
    for turn in range(_PATIENCE):
        if is_so():
            return
        await asyncio.sleep(0 if turn < _PATIENCE // 2 else 0.002)
    raise AssertionError(otherwise)
