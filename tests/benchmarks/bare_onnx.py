"""A whole language model as ONNX, as people serve sentence embeddings: no neurons, no head.

sentence-transformers has backends for this, which need optimum. It pins older releases of
transformers, so here torch's own exporter writes the graph, and ONNX Runtime or OpenVINO runs it.
"""

from __future__ import annotations

import logging
import warnings

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModel

from skspin.datasets import demo_model

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class _LastLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = AutoModel.from_pretrained(demo_model(), dtype=torch.float32).eval()

    def forward(self, input_ids, attention_mask, token_type_ids):
        inputs = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return self.model(input_ids, **inputs).last_hidden_state


def write_graphs(folder):
    """Write the demo model in float32, and with onnxruntime's dynamic quantisation to int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    paths = {name: folder / f"{name}.onnx" for name in ("float32", "int8")}
    sample = {name: torch.ones(3, 7, dtype=torch.long) for name in INPUTS}
    axes = {0: "n_texts", 1: "n_tokens"}
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _LastLayer(),
            kwargs=sample,
            dynamo=True,
            dynamic_shapes={name: axes for name in INPUTS},
            input_names=list(INPUTS),
            output_names=["last_hidden_state"],
            verbose=False,
        )
        program.save(paths["float32"])
        # The same settings as export_onnx has.
        quantize_dynamic(
            *paths.values(), weight_type=QuantType.QInt8, per_channel=True, reduce_range=True
        )
    logging.disable(logging.NOTSET)
    return paths


def session(path, n_threads):
    """Open a graph in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_with_onnxruntime(path, n_threads):
    """Make a function from arrays to hidden states."""
    opened = session(path, n_threads)
    return lambda arrays: opened.run(None, arrays)[0]


def run_with_openvino(path, n_threads):
    """Make a function from arrays to hidden states; an ImportError if OpenVINO is missing."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": n_threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda arrays: compiled(arrays)[0]


def embedder(run, max_length):
    """Make a function from texts to averaged last states, of length 1 as the model's card says."""
    tokenizer = Tokenizer.from_file(str(demo_model() / "tokenizer.json"))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding()

    def embed(texts):
        found = tokenizer.encode_batch(texts)
        rows = ([t.ids for t in found], [t.attention_mask for t in found])
        ids, mask = (np.array(values, dtype=np.int64) for values in rows)  # (n_texts, n_tokens)
        states = run({"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids})
        sums = (states * mask[:, :, None]).sum(axis=1)  # the mean's direction is that of the sum
        return sums / np.linalg.norm(sums, axis=1, keepdims=True)

    return embed
