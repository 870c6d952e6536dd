"""The frozen language model: texts in, pooled activations out.

A `Recipe` says which numbers a text gets, and how they are computed. `model_shape` says what there
is to read, from the configuration alone; `extract` puts texts through the model;
`token_activations` reads chosen neurons at every token, also as they are in each prefix;
`open_growing_text` reads a text that arrives in pieces; `cut_model` copies the part of the model
that some columns need. These functions import torch, transformers and the files that need them when
they are called, so that nothing is loaded before it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from skspin._layout import POOLINGS, SITES, STACKS, Layout, Segment
from skspin._model.files import Source
from skspin._model.fingerprint import fingerprint
from skspin._model.recipe import (
    ModelMismatchError,
    Recipe,
    Rows,
    resolve_device,
    resolve_dtype,
    usable_device,
)
from skspin._store import Store
from skspin._texts import TextTokens

__all__ = [
    "ModelMismatchError",
    "ModelShape",
    "Recipe",
    "Rows",
    "Source",
    "cut_model",
    "extract",
    "fingerprint",
    "model_shape",
    "open_growing_text",
    "resolve_device",
    "resolve_dtype",
    "text_encoder",
    "token_activations",
    "usable_device",
]


def extract(recipe: Recipe, texts: Sequence[str], layout: Layout) -> Iterator[Rows]:
    """Put texts through the model, on as many workers as the recipe asks for.

    Rows come in any order, each once, and are final: a caller who is interrupted can keep them.
    """
    from skspin._model import batches, parallel

    if recipe.n_workers == 1:
        found = batches.extract(_load(recipe), recipe, texts, layout)
    else:
        found = parallel.extract(recipe, texts, layout)
    n_tokens = 0
    with tqdm(total=len(texts), unit=" texts", disable=not recipe.verbose) as bar:
        for rows in found:
            yield rows
            if recipe.verbose:
                n_tokens += rows.n_tokens
                rate = n_tokens / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                bar.update(len(rows.positions))


def token_activations(
    recipe: Recipe, texts: Sequence[str], layout: Layout, *, of_prefixes: bool = False
) -> Iterator[tuple[str, TextTokens, np.ndarray]]:
    """Read activations (n_tokens, n_columns) at the tokens of each text, in any order.

    With ``of_prefixes`` they are those of the prefix that ends with the token, or a ValueError says
    why the model can't do that, e.g. because it looks ahead.
    """
    from skspin._model import token_level

    return token_level.token_activations(_load(recipe), recipe, texts, layout, of_prefixes)


def cut_model(recipe: Recipe, layout: Layout) -> Any:
    """Copy the part of the model that a layout needs, from token ids to pooled activations."""
    from skspin._model import cut

    return cut.cut_model(_load(recipe), layout, recipe.max_length)


def text_encoder(recipe: Recipe) -> Any:
    """Make the encoder that turns texts into the model's inputs."""
    from skspin._model import tokens

    return tokens.TextEncoder(_load(recipe), recipe)


def open_growing_text(recipe: Recipe, layout: Layout) -> Any:
    """Make a `token_level.GrowingText`, which reads one text that arrives in pieces."""
    from skspin._model import token_level

    return token_level.GrowingText(_load(recipe), recipe, layout)


def _load(recipe: Recipe) -> Any:
    from skspin._model import registry

    device = recipe.devices[0]
    return registry.load_backbone(recipe.source, device, recipe.number_format, recipe.fingerprint)


# What there is to read: layers and widths, and the columns that parameters name


def model_shape(source: Source, fingerprint: str, store: Store) -> ModelShape:
    """Read a model's layers and widths from its configuration; the store keeps them."""
    stacks = store.get_metadata(fingerprint)
    if stacks is None:
        from skspin._model import registry

        anatomy = registry.read_anatomy(source)
        stacks = [
            [stack.name, {site: _widths(stack, site) for site in SITES}]
            for stack in anatomy.stacks.values()
        ]
        store.put_metadata(fingerprint, stacks)
    return ModelShape(dict(stacks))


def _widths(stack: Any, site: str) -> list[int | str]:
    """Count the neurons of each layer at a site, or say why there are none."""
    widths: list[int | str] = []
    for layer in range(len(stack.blocks) + 1):
        try:
            widths.append(int(stack.tap(layer, site).width))
        except ValueError as reason:  # e.g. a mixture of experts has no single "mlp"
            widths.append(str(reason))
    return widths


@dataclass(frozen=True)
class ModelShape:
    """For each stack and site the number of neurons of each layer, or why (a str) there are none.

    It is all that `fit` needs to know of a model, in plain JSON data: a transformer whose texts are
    all stored never opens the model.
    """

    stacks: dict[str | None, dict[str, list[int | str]]]

    @property
    def n_layers(self) -> int:
        """Number of blocks of the (deepest) stack; the embeddings, layer 0, do not count."""
        return max(len(widths["hidden"]) for widths in self.stacks.values()) - 1

    def layout(self, *, stack: Any, site: Any, layers: Any, pooling: Any) -> Layout:
        """Lay out the columns that the parameters of `LLMActivationTransformer` name."""
        stacks = _choose("stack", stack, STACKS)
        sites = _choose("site", site, SITES)
        poolings = _choose("pooling", pooling, POOLINGS)
        segments: list[Segment] = []
        for name, widths in self.stacks.items():
            if name is not None and name not in stacks:
                continue  # a model with one stack, named None, ignores `stack`
            for layer in _choose_layers(layers, len(widths["hidden"]) - 1):
                # The embeddings, layer 0, have hidden states only.
                offered = [site for site in sites if layer > 0 or site == "hidden"]
                if not offered and layers is not None:
                    raise ValueError(
                        f"layers={layers!r} asks for layer 0, the embeddings, which have hidden "
                        f"states only, but site={sites!r}. Leave out layer 0 or add 'hidden'."
                    )
                for at in offered:
                    width = widths[at][layer]
                    if isinstance(width, str):
                        raise ValueError(width)
                    segments += [Segment(name, layer, at, how, width) for how in poolings]
        return Layout(tuple(segments))


def _choose(name: str, value: str | Sequence[str], allowed: Sequence[str]) -> tuple[str, ...]:
    """Turn one choice or several into a tuple, in the order of ``allowed``."""
    chosen = (value,) if isinstance(value, str) else tuple(value)
    if not chosen or any(option not in allowed for option in chosen):
        raise ValueError(f"{name}={value!r} must be one of {list(allowed)} or a tuple of them.")
    return tuple(option for option in allowed if option in chosen)


def _choose_layers(layers: Any, n_layers: int) -> list[int]:
    """Turn None, negative and unordered layers into ascending ones."""
    if layers is None:
        return list(range(n_layers + 1))
    chosen: list[Any] = [layers] if isinstance(layers, Integral) else list(layers)
    if not chosen or not all(isinstance(layer, Integral) for layer in chosen):
        raise ValueError(
            f"layers={layers!r} must be None, an int or a sequence of at least one int."
        )
    for layer in chosen:
        if not -n_layers - 1 <= layer <= n_layers:
            raise ValueError(
                f"layers={layers!r} asks for layer {layer}, but the model has layers 0 "
                f"(embeddings) to {n_layers}, or counted from the end -1 to {-n_layers - 1}."
            )
    return sorted({int(layer) % (n_layers + 1) for layer in chosen})
