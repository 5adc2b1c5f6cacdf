"""FastAPI + onnxruntime on all cores for a model that takes milliseconds: tensors as plain bytes, or a picture."""

import io
from typing import Annotated

import numpy as np
import onnxruntime as ort
from fastapi import Depends, FastAPI, Request, Response
from PIL import Image

from benchmarks.servers.shared import MODEL

app = FastAPI()
session = ort.InferenceSession(str(MODEL / "model.onnx"))
tensor = session.get_inputs()[0]
DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


async def read_body(request: Request) -> bytes:
    """Return the body; the endpoints themselves run in a thread."""
    return await request.body()


@app.get("/ready")
def ready() -> bool:
    """Tell that the model is loaded."""
    return True


@app.post("/tensor")
def predict_tensor(body: Annotated[bytes, Depends(read_body)]) -> Response:
    """Run the model on the rows of the body, and return the bytes of its output."""
    inputs = np.frombuffer(body, DTYPES[tensor.type]).reshape(-1, *tensor.shape[1:])
    return Response(session.run(None, {tensor.name: inputs})[0].tobytes(), media_type="application/octet-stream")


@app.post("/picture")
def predict_picture(body: Annotated[bytes, Depends(read_body)]) -> dict[str, float]:
    """Run an image model on a picture file."""
    size = (tensor.shape[3], tensor.shape[2])
    picture = Image.open(io.BytesIO(body)).convert("RGB").resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1)[None] / np.float32(255)
    outputs = session.run(None, {tensor.name: pixels})[0][0]
    shifted = np.exp(outputs - outputs.max())
    return {"prediction": int(outputs.argmax()), "probability": float(shifted.max() / shifted.sum())}
