"""Run what `export_onnx` wrote, with numpy, onnxruntime and tokenizers alone.

The model card shows this code, and the check after an export runs it.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def clean(text):
    """Replace lone surrogates, which no tokenizer reads."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Classifier:
    """The pipeline in a folder: its tokenizer.json cuts texts off."""

    def __init__(self, folder, model="model.onnx"):
        folder = Path(folder)
        self.settings = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = self.settings["split_special_tokens"]
        self.session = onnxruntime.InferenceSession(
            str(folder / model), providers=["CPUExecutionProvider"]
        )

    def encode(self, texts):
        """Turn texts into arrays (n_texts, n_tokens)."""
        found = self.tokenizer.encode_batch([clean(text) for text in texts])
        rows = {
            "input_ids": [encoding.ids or self.settings["empty_text"] for encoding in found],
            "token_type_ids": [encoding.type_ids or [0] for encoding in found],
            "attention_mask": [encoding.attention_mask or [1] for encoding in found],
        }
        n_tokens = max(map(len, rows["input_ids"]))
        return {
            name: np.array([row + [0] * (n_tokens - len(row)) for row in rows[name]], np.int64)
            for name in self.settings["inputs"]
        }

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


class WindowClassifier(Classifier):
    """A pipeline that puts texts into a prompt, reads them in windows, or pools some tokens."""

    def encode(self, texts):
        """Turn texts into arrays (n_texts, n_windows, n_tokens), or without windows."""
        found = [list(self.windows(clean(text))) for text in texts]
        n_tokens = max(len(window["input_ids"]) for windows in found for window in windows)
        shape = len(texts), max(map(len, found)), n_tokens
        inputs = {name: np.zeros(shape, np.int64) for name in self.settings["inputs"]}
        for row, windows in enumerate(found):
            for number, window in enumerate(windows):
                for name, values in inputs.items():
                    values[row, number, : len(window["input_ids"])] = window[name]
        if self.settings["long_texts"] == "windows":
            return inputs
        return {name: values[:, 0] for name, values in inputs.items()}

    def windows(self, text):
        """Tokenize a text in its prompt, and give what the model is given at a time."""
        settings = self.settings
        head, *parts = (settings["prompt"] or "{text}").split("{text}")
        filled, spans = head, []
        for part in parts:
            spans.append((len(filled), len(filled) + len(text)))
            filled += text + part
        found = self.tokenizer.encode(filled)
        ids = np.array(found.ids or settings["empty_text"])
        types = np.array(found.type_ids or [0] * len(ids))
        own = np.zeros(len(ids), dtype=bool)  # which tokens are the text's, not the prompt's
        for number, (begin, end) in enumerate(found.offsets):
            begin -= begin == end  # some tokenizers give a token of blanks only its end
            # An empty text may lie within a token, which is not the text's then.
            inside = any(max(begin, start) < min(end, stop) for start, stop in spans)
            own[number] = inside and not found.special_tokens_mask[number]
        pooled = own if settings["pool_over"] == "text" and own.any() else np.ones_like(own)
        tokens, around = np.flatnonzero(own), np.flatnonzero(~own)
        room = settings["max_length"] - len(around)  # for the text's own tokens
        overlap = settings["overlap"]
        starts = [0]
        if len(tokens) > room and settings["long_texts"] == "windows":
            starts = [*range(0, len(tokens) - overlap, room - overlap)]
        elif len(tokens) > room and settings["truncation_side"] == "left":
            starts = [len(tokens) - room]
        # Of the tokens that two windows share, each counts where it has the longer context.
        earlier = overlap if settings["is_causal"] else (overlap + 1) // 2
        for start in starts:
            stretch = tokens[start : start + room]
            first = earlier if start else 0
            last = len(stretch) - (overlap - earlier) * (start + room < len(tokens))
            chosen = np.union1d(around, stretch)
            counts = pooled[chosen] & ~np.isin(chosen, np.delete(stretch, slice(first, last)))
            if counts.any():
                yield {
                    "input_ids": ids[chosen],
                    "token_type_ids": types[chosen],
                    "attention_mask": 1,
                    "pooled": counts,
                }
