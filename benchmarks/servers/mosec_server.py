"""mosec (Rust front, Python workers) with orjson and its dynamic batching."""

from typing import Any

import numpy as np
import orjson
from mosec import Server, Worker

from benchmarks.servers.shared import describe, open_session, read_labels


class Inference(Worker):
    """Parse, run and encode a batch of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.session = open_session()
        self.labels = read_labels()
        self.input_name = self.session.get_inputs()[0].name

    def deserialize(self, data: bytes) -> Any:  # noqa: ANN401
        """Read the rows."""
        return np.array(orjson.loads(data)["instances"], dtype=np.float32)

    def serialize(self, data: Any) -> bytes:  # noqa: ANN401
        """Write the answer."""
        return orjson.dumps({"predictions": describe(data, self.labels)})

    def forward(self, data: list[Any]) -> list[Any]:
        """Run the model on all rows of the batch at once."""
        outputs = self.session.run(None, {self.input_name: np.concatenate(data)})[0]
        return np.split(outputs, np.cumsum([len(rows) for rows in data])[:-1])


if __name__ == "__main__":
    server = Server()
    server.append_worker(Inference, num=2, max_batch_size=64, max_wait_time=1)
    server.run()
