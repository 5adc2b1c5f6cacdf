"""FastAPI + onnxruntime, typed by pydantic: what most people write."""

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.servers.shared import describe, open_session, read_labels

app = FastAPI()
session = open_session()
labels = read_labels()
name = session.get_inputs()[0].name


class PredictRequest(BaseModel):
    """Rows of numbers."""

    instances: list[list[float]]


class Prediction(BaseModel):
    """One answer."""

    prediction: int
    label: str
    probability: float
    probabilities: list[float]


class PredictResponse(BaseModel):
    """All answers."""

    predictions: list[Prediction]


@app.post("/predict")
def predict(request: PredictRequest) -> PredictResponse:
    """Run the model on the request's rows."""
    outputs = session.run(None, {name: np.array(request.instances, dtype=np.float32)})[0]
    return PredictResponse.model_validate({"predictions": describe(outputs, labels)})
