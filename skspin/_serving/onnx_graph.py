"""Writing a module as an ONNX graph, and in 8 bits: torch's exporter and onnxruntime's tools."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

# An example for the axes n_texts, n_windows and n_tokens: lengths that no part of a model has.
_LENGTHS = {"n_texts": 3, "n_windows": 2, "n_tokens": 7}


def write_graph(module: Any, inputs: Mapping[str, list[str]], path: Path) -> None:
    """Write a `PipelineModule` as ONNX; ``inputs`` names each input's axes, all of any length.

    The module may use another implementation of attention afterwards.
    """
    import torch

    _need_float32(module)
    model = module.columns.model
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


def _export(module: Any, inputs: Mapping[str, list[str]]) -> Any:
    import torch

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


def _need_float32(module: Any) -> None:
    import torch

    formats = {w.dtype for w in module.parameters() if w.is_floating_point()}
    if formats != {torch.float32}:
        names = ", ".join(sorted(str(name).removeprefix("torch.") for name in formats))
        raise ValueError(
            f"The model in memory is in {names}, but what is written computes in float32. Pass "
            "model.float() and fit again."
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the exporters' output and warnings, but not their errors."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
