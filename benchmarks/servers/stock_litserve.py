"""LitServe as its documentation shows: a LitAPI behind its own server and queue."""

import sys
from typing import Any

import litserve as ls
import numpy as np

from benchmarks.servers.shared import describe, open_session, read_labels


class Digits(ls.LitAPI):
    """One request, one call of the model."""

    def setup(self, device: str) -> None:
        """Open the model."""
        del device
        self.session = open_session()
        self.labels = read_labels()
        self.input_name = self.session.get_inputs()[0].name

    def decode_request(self, request: dict[str, Any]) -> Any:  # noqa: ANN401
        """Read the rows."""
        return np.array(request["instances"], dtype=np.float32)

    def predict(self, x: Any) -> Any:  # noqa: ANN401
        """Run the model."""
        return self.session.run(None, {self.input_name: x})[0]

    def encode_response(self, output: Any) -> dict[str, Any]:  # noqa: ANN401
        """Say it in this service's words."""
        return {"predictions": describe(output, self.labels)}


if __name__ == "__main__":
    ls.LitServer(Digits(), accelerator="cpu", workers_per_device=2).run(
        host="127.0.0.1", port=int(sys.argv[1]), log_level="error", generate_client_file=False
    )
