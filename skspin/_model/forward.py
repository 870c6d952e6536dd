"""One batch through the model: pooled by hooks, stopped at the deepest layer asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from skspin._layout import Segment
from skspin._model.anatomy import Anatomy, Tap, bare_model
from skspin._model.evaluation import evaluating
from skspin._model.hooks import as_texts, listen
from skspin._model.inputs import arguments_for, pad_right
from skspin._model.pooling import TextGroup, group_texts, pool


class _Enough(BaseException):
    """Everything has been read. Not an Exception, which a model's own code might catch."""


# Not inference mode: whatever a model keeps from a pass (a table of positions, say) would then be
# unusable in its owner's training.
@torch.no_grad()
def pooled_forward(
    model: Any, anatomy: Anatomy, inputs: dict[str, Tensor], segments: Sequence[Segment]
) -> Tensor:
    """Read the pooled activations of a batch of texts in one forward pass.

    The pass ends when everything has been read, so later layers and the head cost nothing. The
    model is left as it was, also when the pass fails. Threads may share a model; a pass that its
    owner runs meanwhile is neither read nor stopped.

    Parameters
    ----------
    model : PreTrainedModel
        The model that ``anatomy`` is of.
    anatomy : Anatomy
        Where to read; see `find_anatomy`.
    inputs : dict of str to Tensor of shape (n_texts, n_tokens)
        "input_ids", "attention_mask", and whatever else the model takes by token. Padding may be
        on either side; it does not change the result. Each text has at least one token.
    segments : sequence of Segment
        What to read, in the order of the columns.

    Returns
    -------
    Tensor of shape (n_texts, n_columns), float32
        On the inputs' device.

    Raises
    ------
    ValueError
        If the model does not have a site that is asked for.
    RuntimeError
        If the model's pass is not what ``anatomy`` says.
    """
    model = bare_model(model)
    inputs = pad_right(inputs)
    if not anatomy.mixes_padding:
        return _forward(model, anatomy, inputs, segments)
    # Only texts of one length can be in a batch together where padding leaks into real tokens.
    lengths = inputs["attention_mask"].sum(1)  # (n_texts,)
    columns = torch.empty(len(lengths), sum(s.n_columns for s in segments), device=lengths.device)
    for length in lengths.unique().tolist():
        rows = lengths == length
        alike = {name: values[rows, :length] for name, values in inputs.items()}
        columns[rows] = _forward(model, anatomy, alike, segments)
    return columns


def _forward(
    model: Any, anatomy: Anatomy, inputs: dict[str, Tensor], segments: Sequence[Segment]
) -> Tensor:
    mask = inputs["attention_mask"].bool()

    @cache  # blocks may be on several devices
    def groups_on(device: torch.device) -> list[TextGroup]:
        return group_texts(mask.to(device))

    def pooled(activations: Tensor, segment: Segment) -> Tensor:
        values = pool(activations, groups_on(activations.device), segment.pooling)
        return keep_neurons(values, segment)  # (n_texts, n_neurons)

    return torch.cat(read_forward(model, anatomy, inputs, segments, pooled), dim=1)


@torch.no_grad()
def read_forward(
    model: Any,
    anatomy: Anatomy,
    inputs: dict[str, Tensor],
    segments: Sequence[Segment],
    take: Callable[[Tensor, Segment], Tensor],
) -> list[Tensor]:
    """Run a batch of texts, padded on the right, and take something from each segment's site.

    Parameters
    ----------
    model, anatomy, inputs, segments
        See `pooled_forward`.
    take : callable
        Gets the activations of shape (n_texts, n_tokens, n_neurons), padding included, and the
        segment. Its answer is moved to the inputs' device.

    Returns
    -------
    list of Tensor
        What was taken, one per segment.
    """
    model = bare_model(model)
    wanted: dict[Tap, list[int]] = {}
    for position, segment in enumerate(segments):
        tap = anatomy.stacks[segment.stack].tap(segment.layer, segment.site)
        wanted.setdefault(tap, []).append(position)
    mask = inputs["attention_mask"].bool()
    taken = [mask.new_empty(0)] * len(segments)

    def read(tap: Tap, activations: Tensor) -> None:
        activations = as_texts(activations, mask, tap)  # (n_texts, n_tokens, n_neurons)
        for position in wanted.pop(tap):
            taken[position] = take(activations, segments[position]).to(mask.device)
        if not wanted:
            raise _Enough

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        listen(stack, list(wanted), read)
        stack.enter_context(suppress(_Enough))
        model(**arguments_for(model, inputs))
    if wanted:
        names = sorted({f"{segments[p].key}" for positions in wanted.values() for p in positions})
        raise RuntimeError(
            f"{type(model).__name__} ended its forward pass without these layers: {names}. Were its"
            " modules replaced after loading?"
        )
    return taken


def keep_neurons(values: Tensor, segment: Segment) -> Tensor:
    """Choose a segment's neurons among those of its site, in the last dimension."""
    if segment.neurons is None:
        return values
    return values[..., _on_device(segment.neurons, values.device)]


@lru_cache(maxsize=256)  # a pruned pipeline asks for the same neurons in every batch
def _on_device(neurons: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(neurons, device=device)
