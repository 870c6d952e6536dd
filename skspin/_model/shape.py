"""What a model has to offer, in numbers, and the layout of what is chosen from it.

A `ModelShape` is all that `fit` needs to know of a model. It is plain data, so it can be kept on a
card in the store, and a transformer whose texts are all stored never opens the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from skspin._layout import SITES, Layout, Segment


@dataclass(frozen=True)
class StackShape:
    """The widths of one stack of blocks.

    Parameters
    ----------
    name : {"encoder", "decoder"} or None
        None for the only stack of a model.
    widths : dict of str to list
        For each site the number of neurons of each layer from 0 up, or the reason (a str) why a
        layer has none there.
    """

    name: str | None
    widths: dict[str, list[int | str]]

    @property
    def n_layers(self) -> int:
        """Number of blocks; layers are 0 (the embeddings) to ``n_layers``."""
        return len(self.widths["hidden"]) - 1

    def resolve_layers(self, layers: int | Sequence[int] | None) -> list[int]:
        """Turn None, negative and unordered layers into ascending ones; refuse unknown ones."""
        if layers is None:
            return list(range(self.n_layers + 1))
        chosen = [layers] if isinstance(layers, int) else list(layers)
        for layer in chosen:
            if not -self.n_layers - 1 <= layer <= self.n_layers:
                raise ValueError(
                    f"layers={layers!r} asks for layer {layer}, but the model has layers 0 "
                    f"(embeddings) to {self.n_layers}, or counted from the end -1 to "
                    f"{-self.n_layers - 1}."
                )
        return sorted({layer % (self.n_layers + 1) for layer in chosen})

    def segments(
        self, sites: Sequence[str], layers: int | Sequence[int] | None, poolings: Sequence[str]
    ) -> list[Segment]:
        """List the segments of this stack by layer, then site, then pooling."""
        segments = []
        for layer in self.resolve_layers(layers):
            # Asking for all layers asks for the embeddings only at sites that embeddings have.
            offered = [site for site in sites if layer > 0 or site == "hidden"]
            if not offered and layers is not None:
                raise ValueError(
                    f"layers={layers!r} asks for layer 0, the embeddings, which have hidden states "
                    f"only, but site={tuple(sites)!r}. Leave out layer 0 or add 'hidden'."
                )
            for site in offered:
                width = self.widths[site][layer]
                if isinstance(width, str):
                    raise ValueError(width)
                segments += [Segment(self.name, layer, site, pool, width) for pool in poolings]
        return segments


@dataclass(frozen=True)
class ModelShape:
    """The widths of all stacks of a model."""

    stacks: tuple[StackShape, ...]

    @property
    def n_layers(self) -> int:
        """Number of blocks of the (deepest) stack."""
        return max(stack.n_layers for stack in self.stacks)

    def layout(
        self,
        *,
        stacks: Sequence[str],
        sites: Sequence[str],
        layers: int | Sequence[int] | None,
        poolings: Sequence[str],
    ) -> Layout:
        """Lay out the columns for what is asked; a model of one stack has no choice of stacks."""
        segments = []
        for stack in self.stacks:
            if stack.name is None or stack.name in stacks:
                segments += stack.segments(sites, layers, poolings)
        return Layout(tuple(segments))

    def to_card(self) -> dict[str, Any]:
        """Turn into plain JSON data."""
        return {"stacks": [[stack.name, stack.widths] for stack in self.stacks]}

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> ModelShape:
        """Turn back from plain JSON data."""
        return cls(tuple(StackShape(name, widths) for name, widths in card["stacks"]))

    @classmethod
    def from_anatomy(cls, anatomy: Any) -> ModelShape:
        """Measure every layer and site of an anatomy."""
        return cls(tuple(_measure(stack) for stack in anatomy.stacks.values()))


def _measure(stack: Any) -> StackShape:
    def width(layer: int, site: str) -> int | str:
        try:
            return int(stack.width(layer, site))
        except ValueError as reason:  # e.g. a mixture of experts has no single "mlp"
            return str(reason)

    layers = range(len(stack.blocks) + 1)
    return StackShape(stack.name, {site: [width(i, site) for i in layers] for site in SITES})
