"""What a row of the table says: the steps of a client, and the statuses that must come of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Write:
    """Send bytes on a connection, opened where it is not yet."""

    data: bytes
    wire: int = 0


@dataclass(frozen=True)
class Read:
    """Read one answer, or the end of the connection as an answer of status 0."""

    wire: int = 0


@dataclass(frozen=True)
class Pause:
    """Wait for some seconds."""

    seconds: float


@dataclass(frozen=True)
class Leave:
    """Close a connection, or reset it."""

    wire: int = 0
    reset: bool = False


Step = Write | Read | Pause | Leave


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: what is sent.
        steps: what a client does.
        statuses: of the answers it reads, in order.
        logged: statuses of the access lines, in order where there is one connection; None for those of the answers.
        dropped: reasons in service_dropped_total beside "gone", which is one for every line of status 499.
        early: it is answered before its body has been read; whether its connection then stays open is the server's.
    """

    name: str
    steps: tuple[Step, ...]
    statuses: tuple[int, ...]
    logged: tuple[int, ...] | None = None
    dropped: tuple[tuple[str, str, str], ...] = ()
    early: bool = False

    @property
    def expected_lines(self) -> list[int]:
        """Statuses of the access lines."""
        return [status for status in self.statuses if status >= 200] if self.logged is None else list(self.logged)

    @property
    def wires(self) -> int:
        """How many connections it uses."""
        return 1 + max(step.wire for step in self.steps if not isinstance(step, Pause))
