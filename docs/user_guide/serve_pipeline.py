"""Serve a pipeline: SPIN=spin.skops uvicorn serve_pipeline:app"""

import os
from typing import Annotated

import skops.io
from fastapi import FastAPI
from pydantic import Field

import skspin

pipeline = skops.io.load(os.environ["SPIN"], trusted=skspin.TRUSTED_TYPES)
# Nothing is kept of what people send.
pipeline.set_params(activations__cache=None)
pipeline.predict(["Weights are loaded now, and not by the first request."])
app = FastAPI()


@app.post("/labels")
def labels(texts: Annotated[list[str], Field(min_length=1, max_length=64)]):
    return pipeline.predict(texts).tolist()
