"""Run what `export_onnx` wrote, with numpy, onnxruntime and tokenizers alone.

The model card shows this code, and the check after an export runs it.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Classifier:
    """The pipeline in a folder: its tokenizer.json truncates and pads."""

    def __init__(self, folder, model="model.onnx"):
        folder = Path(folder)
        self.settings = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.session = onnxruntime.InferenceSession(
            str(folder / model), providers=["CPUExecutionProvider"]
        )

    def encode(self, texts):
        """Turn texts into arrays (n_texts, n_tokens)."""
        found = self.tokenizer.encode_batch([clean(text) for text in texts])
        arrays = {
            "input_ids": [encoding.ids for encoding in found],
            "token_type_ids": [encoding.type_ids for encoding in found],
            "attention_mask": [encoding.attention_mask for encoding in found],
        }
        return {name: np.array(arrays[name], np.int64) for name in self.settings["inputs"]}

    def decision_function(self, texts):
        """Compute decision values (n_texts,) or (n_texts, n_values), as the pipeline does."""
        return self.session.run(None, self.encode(texts))[0]

    def predict(self, texts):
        """Name the label of each text; a list of labels where there are several outputs."""
        several = self.settings["several_outputs"]
        values = self.decision_function(texts).reshape(len(texts), -1)  # (n_texts, n_values)
        labels, start = [], 0
        for classes in self.settings["classes"] if several else [self.settings["classes"]]:
            n_values = 1 if len(classes) == 2 else len(classes)
            own = values[:, start : start + n_values]
            chosen = own[:, 0] > 0 if n_values == 1 else own.argmax(axis=1)
            labels.append([classes[int(number)] for number in chosen])
            start += n_values
        return [list(row) for row in zip(*labels, strict=True)] if several else labels[0]


def clean(text):
    """Replace lone surrogates, which no tokenizer reads."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
