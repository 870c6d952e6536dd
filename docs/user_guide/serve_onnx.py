"""Serve what export_onnx wrote: SPIN=folder uvicorn serve_onnx:app"""

import json
import os
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
from fastapi import FastAPI
from pydantic import Field
from tokenizers import Tokenizer

folder = Path(os.environ["SPIN"])
settings = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
# It truncates and pads.
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
session = onnxruntime.InferenceSession(folder / "model.onnx")
app = FastAPI()


@app.post("/labels")
def labels(texts: Annotated[list[str], Field(min_length=1, max_length=64)]):
    found = tokenizer.encode_batch(texts)
    inputs = {
        "input_ids": [text.ids for text in found],
        "attention_mask": [text.attention_mask for text in found],
        "token_type_ids": [text.type_ids for text in found],
    }
    inputs = {
        name: np.array(inputs[name], np.int64) for name in settings["inputs"]
    }
    (values,) = session.run(None, inputs)
    several = values.ndim == 2  # one value for each of more than two labels
    chosen = values.argmax(axis=1) if several else (values > 0).astype(int)
    return [settings["classes"][number] for number in chosen]
