"""The table of exceptions: what the modules of some architectures do not tell, one line each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """What the structure of a model does not tell."""

    # By site, the path inside a block of the module or parameter that its activations go into.
    paths: dict[str, str] = field(default_factory=dict)
    # Inside the stack, activations are of shape (n_tokens, n_texts, n_neurons).
    time_major: bool = False
    # If the stack's list holds groups of blocks, and each group runs several times in a row, all
    # equally often: the name of the list of blocks in a group.
    shared_groups: str | None = None
    # If parts of blocks are in separate lists: their names; the first parts take hidden states.
    parallel_lists: tuple[str, ...] = ()
    # The hidden states that the model returns begin after block 1, and end with one before and
    # one after the norm of this name.
    early_norm: str | None = None
    # Inside the stack, the model may add tokens at the end.
    rounds_up: bool = False
    # Padding changes the activations of real tokens, but a trial's texts are too short to show it.
    mixes_padding: bool = False
    # The number of positions that a pass needs beyond its tokens.
    n_ahead: int = 0


_PLAIN = Architecture()
# By a configuration's model_type.
_EXCEPTIONS = {
    "albert": Architecture(shared_groups="albert_layers"),
    # The length of a batch decides how its tokens attend to each other, if it is long enough.
    "big_bird": Architecture(rounds_up=True, mixes_padding=True),
    "bigbird_pegasus": Architecture(rounds_up=True, mixes_padding=True),
    "falcon_mamba": Architecture(early_norm="norm_f"),
    "flaubert": Architecture(parallel_lists=("attentions", "ffns")),
    "fsmt": Architecture(time_major=True),
    "led": Architecture(rounds_up=True),
    "longformer": Architecture(rounds_up=True),
    "mega": Architecture(time_major=True),
    "mamba": Architecture(early_norm="norm_f"),
    "mamba2": Architecture(early_norm="norm_f"),
    # A block has bottlenecks and small feed-forward parts around the main one.
    "mobilebert": Architecture(
        paths={"mlp": "output.dense", "attention": "attention.output.dense"}
    ),
    "pegasus_x": Architecture(rounds_up=True),
    # Several streams of tokens, the text itself first; the others are ahead of it.
    "prophetnet": Architecture(rounds_up=True, n_ahead=1),
    "rwkv": Architecture(early_norm="ln_out"),
    "xlm": Architecture(parallel_lists=("attentions", "ffns")),
    # The attention's output projection is a parameter, used in an einsum.
    "xlnet": Architecture(paths={"attention": "rel_attn.o"}, time_major=True),
}


def architecture_of(config: Any) -> Architecture:
    """Look up what is special about a configuration's architecture; most often nothing is."""
    return _EXCEPTIONS.get(config.model_type, _PLAIN)
