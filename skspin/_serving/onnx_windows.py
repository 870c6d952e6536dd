"""Run what `export_onnx` wrote where the tokenizer alone can't say what the model is given."""

import numpy as np

from skspin._serving.onnx_classifier import Classifier, clean


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
        head, *parts = (self.settings["prompt"] or "{text}").split("{text}")
        filled, spans = head, []
        for part in parts:
            spans.append((len(filled), len(filled) + len(text)))
            filled += text + part
        found = self.tokenizer.encode(filled)
        ids = np.array(found.ids or self.settings["empty_text"])
        types = np.array(found.type_ids or [0] * len(ids))
        own = np.zeros(len(ids), dtype=bool)  # which tokens are the text's, not the prompt's
        for number, (begin, end) in enumerate(found.offsets):
            inside = any(end > start and begin < stop for start, stop in spans)
            own[number] = inside and not found.special_tokens_mask[number]
        over_text = self.settings["pool_over"] == "text" and own.any()
        for chosen, counts in self.stretches(own):
            pooled = (own[chosen] if over_text else True) & counts
            if pooled.any():
                yield {
                    "input_ids": ids[chosen],
                    "token_type_ids": types[chosen],
                    "attention_mask": 1,
                    "pooled": pooled,
                }

    def stretches(self, own):
        """Say which tokens each window has, and which of them count there."""
        settings, everything = self.settings, np.arange(len(own))
        text, around = everything[own], everything[~own]
        room = settings["max_length"] - len(around)  # for the text's own tokens
        if len(text) <= room:
            yield everything, np.ones(len(own), dtype=bool)
        elif settings["long_texts"] == "truncate":
            left = settings["truncation_side"] == "left"
            kept = np.union1d(around, text[-room:] if left else text[:room])
            yield kept, np.ones(len(kept), dtype=bool)
        else:
            # Of the tokens that two windows share, each counts where it has the longer context.
            overlap = settings["overlap"]
            earlier = overlap if settings["is_causal"] else (overlap + 1) // 2
            for start in range(0, len(text) - overlap, room - overlap):
                stretch = text[start : start + room]
                first = earlier if start else 0
                last = len(stretch) - (overlap - earlier) * (start + room < len(text))
                chosen = np.union1d(around, stretch)
                yield chosen, np.isin(chosen, around) | np.isin(chosen, stretch[first:last])
