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
# It cuts texts off at max_length.
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.encode_special_tokens = settings["split_special_tokens"]
session = onnxruntime.InferenceSession(folder / "model.onnx")
app = FastAPI()


@app.post("/labels")
def labels(texts: Annotated[list[str], Field(min_length=1, max_length=64)]):
    found = tokenizer.encode_batch(texts)
    rows = {
        "input_ids": [text.ids or settings["empty_text"] for text in found],
        "attention_mask": [text.attention_mask or [1] for text in found],
        "token_type_ids": [text.type_ids or [0] for text in found],
    }
    n_tokens = max(map(len, rows["input_ids"]))
    inputs = {
        name: np.array(
            [row + [0] * (n_tokens - len(row)) for row in rows[name]], np.int64
        )
        for name in settings["inputs"]
    }
    (values,) = session.run(None, inputs)
    several = values.ndim == 2  # one value for each of more than two labels
    chosen = values.argmax(axis=1) if several else (values > 0).astype(int)
    return [settings["classes"][number] for number in chosen]
