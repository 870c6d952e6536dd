"""From token ids to decision values: a torch module, and the same as an ONNX graph."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skspin._explain import LinearForm

# An example for the axes n_texts, n_windows and n_tokens: lengths that no part of a model has.
_LENGTHS = {"n_texts": 3, "n_windows": 2, "n_tokens": 7}


class PipelineModule(nn.Module):
    """A fitted pipeline with a linear head; see `to_torch`."""

    def __init__(self, columns: nn.Module, form: LinearForm, device: torch.device):
        super().__init__()
        self.columns = columns
        # Columns may be far from zero, and a sum of large terms that cancel is not exact in
        # float32. So each column is centred first, by the class that gives it the largest weight.
        weights, offsets = form.weights, form.offsets  # (n_decision_values, n_columns)
        heaviest = np.abs(weights).argmax(axis=0), np.arange(weights.shape[1])
        weighs = weights[heaviest] != 0
        center = -offsets[heaviest] / np.where(weighs, weights[heaviest], 1)  # (n_columns,)
        bias = form.intercept + (offsets + weights * center).sum(axis=1)  # (n_decision_values,)
        self.register_buffer("center", torch.tensor(center, dtype=torch.float32))
        self.head = nn.Linear(*weights.shape[::-1]).requires_grad_(False)
        self.head.weight.copy_(torch.tensor(weights))
        self.head.bias.copy_(torch.tensor(bias))
        self.eval().to(device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """Compute decision values, (n_texts,) where there is one for each text.

        All inputs are of shape (n_texts, n_tokens) or (n_texts, n_windows, n_tokens).
        """
        columns = self.columns(input_ids, attention_mask, token_type_ids, pooled)
        values = self.head(columns - self.center)  # (n_texts, n_decision_values)
        return values[:, 0] if values.shape[1] == 1 else values


def write_graph(module: PipelineModule, inputs: Mapping[str, list[str]], path: Path) -> None:
    """Write a module as ONNX; ``inputs`` names each input's axes, all of any length.

    The module may use another implementation of attention afterwards.
    """
    formats = {w.dtype for w in module.parameters() if w.is_floating_point()}
    if formats != {torch.float32}:
        names = ", ".join(sorted(str(name).removeprefix("torch.") for name in formats))
        raise ValueError(
            f"The model in memory is in {names}, but what is written computes in float32. Pass "
            "model.float() and fit again."
        )
    model: Any = module.columns.model
    attention = getattr(model.config, "_attn_implementation", None)
    try:
        with _quietly():
            try:  # The graph of eager attention is smaller than that of torch's own.
                model.set_attn_implementation("eager")
                program = _export(module.cpu(), inputs)
            except Exception:  # The model has no eager attention, or it can't be traced.
                model.config._attn_implementation = attention
                program = _export(module.cpu(), inputs)
            program.save(path)
    except Exception as error:  # Tracing runs a model's own code, which may do anything.
        import transformers

        reason = next(iter(str(error.__cause__ or error).strip().splitlines()), "")
        raise ValueError(
            f"torch {torch.__version__} can't export {type(model).__name__} of transformers "
            f"{transformers.__version__} as ONNX ({reason}). Try newer versions of these and of "
            "onnxscript; to_torch needs no export."
        ) from error


def _export(module: PipelineModule, inputs: Mapping[str, list[str]]) -> Any:
    return torch.onnx.export(
        module,
        kwargs={
            name: torch.ones([_LENGTHS[axis] for axis in axes], dtype=torch.long)
            for name, axes in inputs.items()
        },
        dynamo=True,
        dynamic_shapes={name: dict(enumerate(axes)) for name, axes in inputs.items()},
        input_names=list(inputs),
        output_names=["decision_values"],
        verbose=False,
    )


def write_int8(graph: Path, path: Path) -> None:
    """Write a copy of a graph with the language model in 8 bits, and the head as it was."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Some versions of the exporter write wrong shapes, which shape inference would refuse.
    without_shapes = path.with_name(f"{graph.name}.tmp")
    model = onnx.load(graph, load_external_data=False)
    del model.graph.value_info[:]
    onnx.save(model, without_shapes)
    # The head stays as it is: it costs little, and its columns differ too much for one scale.
    head = [node.name for node in model.graph.node if "head.weight" in node.input]
    head += [f"{name}_MatMul" for name in head]  # what onnxruntime makes of a Gemm
    with _quietly():
        # Without VNNI, sums of two 8-bit products may overflow; with 7-bit weights they can't.
        quantize_dynamic(
            without_shapes,
            path,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            nodes_to_exclude=head,
        )
    without_shapes.unlink()


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the exporters' output and warnings, but not their errors."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        nowhere = io.StringIO()
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
