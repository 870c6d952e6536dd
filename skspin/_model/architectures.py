"""The architectures that their module tree does not explain, one line each."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Oddity:
    """What the structure of an architecture does not tell.

    Parameters
    ----------
    paths : dict of str to str
        By site, the path inside a block of the module or parameter that its activations go into.
    time_major : bool
        Inside the stack, activations are of shape (n_tokens, n_texts, n_neurons).
    shared_groups : str or None
        The list holds groups of blocks, each of which is run several times in a row, all equally
        often; the name of a group's own list.
    parallel_lists : tuple of str
        Lists of the parts of blocks; the first ones take the hidden states.
    early_norm : str or None
        The hidden states that the model returns begin after block 1, and end with one before and
        one after the norm of this name.
    rounds_up : bool
        Inside the stack, there may be more tokens, added at the end.
    mixes_padding : bool
        Padding changes the activations of real tokens, whatever the attention mask says.
    """

    paths: dict[str, str] = field(default_factory=dict)
    time_major: bool = False
    shared_groups: str | None = None
    parallel_lists: tuple[str, ...] = ()
    early_norm: str | None = None
    rounds_up: bool = False
    mixes_padding: bool = False


PLAIN = Oddity()

# By a configuration's model_type.
ODDITIES = {
    "albert": Oddity(shared_groups="albert_layers"),
    "big_bird": Oddity(rounds_up=True),
    "bigbird_pegasus": Oddity(rounds_up=True),
    "convbert": Oddity(mixes_padding=True),
    "falcon_mamba": Oddity(early_norm="norm_f"),
    "flaubert": Oddity(parallel_lists=("attentions", "ffns")),
    "fnet": Oddity(mixes_padding=True),
    "fsmt": Oddity(time_major=True),
    "led": Oddity(rounds_up=True),
    "longformer": Oddity(rounds_up=True),
    "mega": Oddity(time_major=True),
    "mamba": Oddity(early_norm="norm_f"),
    "mamba2": Oddity(early_norm="norm_f"),
    # A block has bottlenecks and small feed-forward parts around the main one.
    "mobilebert": Oddity(paths={"mlp": "output.dense", "attention": "attention.output.dense"}),
    "nystromformer": Oddity(mixes_padding=True),
    "pegasus_x": Oddity(rounds_up=True),
    # Several streams of tokens, the text itself first.
    "prophetnet": Oddity(rounds_up=True),
    "rwkv": Oddity(early_norm="ln_out"),
    "xlm": Oddity(parallel_lists=("attentions", "ffns")),
    # The attention's output projection is a parameter of its own, used in an einsum.
    "xlnet": Oddity(paths={"attention": "rel_attn.o"}, time_major=True),
    "yoso": Oddity(mixes_padding=True),
}
