"""Unix sockets between simulated processes: for event loops, and blocking ones. Messages arrive in pieces, and late."""

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from tests.simulation.disk import Disk
from tests.simulation.world import Condition, Loop, Process, World

DELAY = 0.0005  # seconds at most that a piece is under way
PIECES = 0.1  # of all writes arrive in two pieces


class End:
    """One end of a connection. What a process has written arrives even if it dies meanwhile, but for the last part."""

    def __init__(self, process: Process) -> None:
        self.world, self.process = process.world, process
        self.peer: End
        self.received: deque[bytes] = deque()  # and b"" at the end
        self.is_open = True
        self.on_receive: Callable[[], None] = lambda: None
        self._arrives_at = 0.0
        process.at_end.append(self._break)

    def send(self, data: bytes) -> None:
        """Send bytes, or the end."""
        if not self.is_open:
            return
        self.world.step(f"sends {len(data)} bytes to {self.peer.process.name}")
        cut = self.world.random.randrange(len(data) + 1) if self.world.chance(PIECES) else 0
        for piece in filter(None, (data[:cut], data[cut:])):
            self._deliver(piece)

    def _deliver(self, piece: bytes) -> None:
        earliest = self._arrives_at + 1e-9  # after the piece before
        self._arrives_at = max(earliest, self.world.now + self.world.random.random() * DELAY)
        self.world.at(self._arrives_at - self.world.now, self.peer.arrive, piece)

    def arrive(self, piece: bytes) -> None:
        """Take what the other end has sent."""
        if self.process.alive:
            self.received.append(piece)
            self.on_receive()

    def _break(self) -> None:
        if self.is_open:
            self.is_open = False
            self._deliver(b"")

    def close(self) -> None:
        """Send the end, and no more."""
        if self.is_open and self.process.alive:
            self._break()


class Transport(asyncio.Transport):
    """One end, for a protocol of an event loop."""

    def __init__(self, loop: Loop, end: End, protocol: Any) -> None:
        super().__init__()
        self._loop, self._end, self._protocol = loop, end, protocol
        self._is_closing = self._is_reading = False
        end.on_receive = lambda: loop.call_soon(self._read) and None
        loop.call_soon(self._start)

    def _start(self) -> None:
        self._protocol.connection_made(self)
        self._is_reading = True
        self._read()

    def _read(self) -> None:
        while self._end.received and self._is_reading and not self._is_closing:
            piece = self._end.received.popleft()
            if piece:
                self._protocol.data_received(piece)
            elif not self._protocol.eof_received():
                self.close()

    def write(self, data: Any) -> None:
        """Send bytes."""
        if not self._is_closing:
            self._end.send(bytes(data))

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """Send bytes."""
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        """Close this end."""
        if not self._is_closing:
            self._is_closing = True
            self._end.close()
            self._loop.call_soon(self._protocol.connection_lost, None)

    abort = close

    def is_closing(self) -> bool:
        """Tell whether it is closed."""
        return self._is_closing or not self._loop.process.alive

    def pause_reading(self) -> None:
        """Read no more."""
        self._is_reading = False

    def resume_reading(self) -> None:
        """Read on."""
        self._is_reading = True
        self._loop.call_soon(self._read)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Know nothing."""
        return default

    def get_write_buffer_size(self) -> int:
        """Return 0: the other end's buffer takes all."""
        return 0


class Server:
    """A listening socket."""

    def __init__(self, network: "Network", path: str, loop: Loop, factory: Callable[[], Any]) -> None:
        self._network, self._path, self._loop, self._factory = network, path, loop, factory
        network.servers[path] = self
        loop.process.at_end.append(self.close)

    def accept(self, end: End) -> None:
        """Take a new connection's end."""
        Transport(self._loop, end, self._factory())

    @property
    def process(self) -> Process:
        """Whose it is."""
        return self._loop.process

    def close(self) -> None:
        """Accept no more."""
        if self._network.servers.get(self._path) is self:
            del self._network.servers[self._path]


class Network:
    """All sockets of a world, by path."""

    def __init__(self, world: World, disk: Disk) -> None:
        world.network = self
        self.world, self.disk = world, disk
        self.servers: dict[str, Server] = {}
        self.socket = SimpleNamespace(
            AF_UNIX=socket.AF_UNIX, SOCK_STREAM=socket.SOCK_STREAM, socket=lambda *_: BlockingSocket(self)
        )

    def connect(self, process: Process, path: str) -> End:
        """Connect a process with whoever listens.

        Raises:
            ConnectionRefusedError: nobody does.
        """
        self.world.step(f"connects to {path}")
        server = self.servers.get(path)
        if server is None or path not in self.disk.files:
            raise ConnectionRefusedError(f"nobody listens on {path}")
        here, there = End(process), End(server.process)
        here.peer, there.peer = there, here
        server.accept(there)
        return here

    async def create_connection(self, loop: Loop, factory: Callable[[], Any], path: Any) -> tuple[Transport, Any]:
        """Connect an event loop; see `Loop.create_unix_connection`."""
        protocol = factory()
        transport = Transport(loop, self.connect(loop.process, str(path)), protocol)
        await asyncio.sleep(0)  # until the protocol knows its transport
        return transport, protocol

    def listen(self, loop: Loop, factory: Callable[[], Any], path: Any) -> Server:
        """Have an event loop listen; see `Loop.create_unix_server`."""
        self.world.step(f"listens on {path}")
        self.disk.files[str(path)] = b""
        return Server(self, str(path), loop, factory)


class BlockingSocket:
    """In place of `socket.socket`, in a simulated thread."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._end: End | None = None
        self._arrived = Condition(network.world)

    def connect(self, path: str) -> None:
        """Connect."""
        thread = self._network.world.current
        assert thread is not None
        self._end = self._network.connect(thread.process, path)
        self._end.on_receive = self._arrived.notify_all

    def sendall(self, data: bytes) -> None:
        """Send bytes.

        Raises:
            BrokenPipeError: the other end has gone.
        """
        assert self._end is not None
        if not self._end.peer.is_open:
            raise BrokenPipeError("the other end has gone")
        self._end.send(data)

    def recv(self, count: int) -> bytes:
        """Wait for bytes, and return some."""
        assert self._end is not None
        while not self._end.received:
            self._arrived.wait()
        piece = self._end.received.popleft()
        if len(piece) > count or not piece:
            self._end.received.appendleft(piece[count:])
        return piece[:count]

    def settimeout(self, seconds: float | None) -> None:
        """Wait for ever all the same."""

    def close(self) -> None:
        """Close."""
        if self._end is not None:
            self._end.close()

    def __enter__(self) -> "BlockingSocket":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
