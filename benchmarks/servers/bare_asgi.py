"""A bare ASGI handler: orjson, numpy, onnxruntime, no validation and no batching."""

from typing import Any

import numpy as np
import orjson

from benchmarks.servers.shared import describe, open_session, read_labels

session = open_session()
labels = read_labels()
name = session.get_inputs()[0].name


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:  # noqa: ANN401
    """Answer every POST with a prediction."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    inputs = np.array(orjson.loads(body)["instances"], dtype=np.float32)
    answer = orjson.dumps({"predictions": describe(session.run(None, {name: inputs})[0], labels)})
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})
