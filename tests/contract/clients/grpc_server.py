"""A server with gRPC, for tests of its clients."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from tests.servers import Server

_ADDRESS = re.compile(r"serving gRPC on (\S+)")


class GrpcServer(Server):
    """`python -m service serve` with gRPC on a free port, whose address is `address`."""

    def __init__(self, models_dir: Path, *flags: str, environment: Mapping[str, str] | None = None) -> None:
        super().__init__(models_dir, "--grpc-port", "0", *flags, environment=environment)
        self.address = ""

    def __enter__(self) -> Self:
        """Wait until the server logs its addresses."""
        super().__enter__()
        found = _ADDRESS.search(self.log())
        assert found
        self.address = found[1]
        return self
