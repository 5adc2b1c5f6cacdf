"""BentoML's service class as its documentation shows, two workers."""

from typing import Any

import bentoml
import numpy as np

from benchmarks.servers.shared import describe, open_session, read_labels


@bentoml.service(workers=2)
class Digits:
    """One request, one call of the model."""

    def __init__(self) -> None:
        self.session = open_session()
        self.labels = read_labels()
        self.input_name = self.session.get_inputs()[0].name

    @bentoml.api  # type: ignore[untyped-decorator]
    def predict(self, instances: list[list[float]]) -> dict[str, Any]:
        """Run the model on the request's rows."""
        outputs = self.session.run(None, {self.input_name: np.array(instances, dtype=np.float32)})[0]
        return {"predictions": describe(outputs, self.labels)}
