"""How long a connection may take for a head, a body, its next request, and to read its responses; and who has gone.

Looked at ten times a second for all connections of a worker: a timer for every request would cost more.
"""

import select
from collections.abc import Iterable

from service.errors import DeadlineExceededError
from service.http.connection import Connection, State
from service.request import PredictRequest
from service.telemetry import metrics

KEEP_ALIVE_SECONDS = 75.0  # longer than proxies keep their end, so that they close first
LINGER_SECONDS = 2.0  # for a client that is still sending to read why it was refused; TCP drops the response otherwise
PRESSED_SECONDS = 1.0  # for a client that reads nothing, once the worker holds much of what it may
_HAS_GONE = select.POLLERR | select.POLLHUP
_SENDS_NO_MORE = getattr(select, "POLLRDHUP", 0)  # only Linux tells


def check_timeouts(connections: Iterable[Connection], now: float, keep_alive: float = KEEP_ALIVE_SECONDS) -> None:
    """Give up on connections that take too long.

    Args:
        connections: of a worker.
        now: on the event loop's clock.
        keep_alive: seconds that a connection may be idle.
    """
    unread: dict[int, Connection] = {}
    for connection in list(connections):
        if connection.stalled_since is not None:
            _check_reader(connection, now)
        else:
            connection.count_unsent()
            _check_state(connection, now, keep_alive)
        if connection.state is State.WAITING and not connection.transport.is_reading():
            unread[connection.transport.get_extra_info("socket").fileno()] = connection
    if unread:
        _drop_gone(unread)


def _drop_gone(unread: dict[int, Connection]) -> None:
    """End the connections, by their sockets, whose client has gone; the event loop tells only of those it reads."""
    poll = select.poll()
    for number in unread:
        poll.register(number, _SENDS_NO_MORE)
    for number, event in poll.poll(0):
        if event & _HAS_GONE:
            unread[number].transport.abort()
        else:
            unread[number].probe()


def _check_state(connection: Connection, now: float, keep_alive: float) -> None:
    settings, age = connection.app.settings, now - connection.since
    match connection.state:
        case State.IDLE:
            if age > keep_alive:
                connection.transport.close()
        case State.READING_HEAD:
            if age > settings.header_timeout:
                _give_up(connection)
        case State.READING_BODY:
            request = connection.current
            if isinstance(request, PredictRequest) and not request.answered:
                if request.deadline < now:
                    request.cancel(DeadlineExceededError("the body did not arrive by the request's deadline"))
            elif age > settings.request_timeout + LINGER_SECONDS:
                _give_up(connection)
        case State.DRAINING:
            if age > LINGER_SECONDS:
                connection.transport.abort()
        case State.CLOSING:
            if age > settings.request_timeout:  # its client does not read the last response
                connection.transport.abort()


def _check_reader(connection: Connection, now: float) -> None:
    """Cut off a client that reads none of its responses; one that reads slowly has all the time it takes."""
    assert connection.stalled_since is not None
    before = connection.unsent
    connection.count_unsent()
    if connection.unsent < before:
        connection.stalled_since = now
    app = connection.app
    seconds = PRESSED_SECONDS if app.context.is_pressed else app.settings.request_timeout
    if now - connection.stalled_since > seconds:
        _give_up(connection)
        connection.transport.abort()
    connection.since = now  # nothing is read of it meanwhile, so its other clock stands still


def _give_up(connection: Connection) -> None:
    metrics.record_dropped("slow")
    connection.transport.close()
