from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skspin._layout import POOLINGS
from skspin._model.pooling import FUNCTIONS, group_texts, pool

# A fake model whose activations are the tokens' positions, so that each answer is known by hand.
N_TEXTS, N_TOKENS, N_NEURONS = 3, 5, 2
POSITIONS = torch.arange(N_TOKENS).float().expand(N_TEXTS, N_TOKENS)
HIDDEN = torch.stack([POSITIONS, -POSITIONS], dim=-1)  # (n_texts, n_tokens, n_neurons)
RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
LEFT = RIGHT.flip(1)

ANSWERS = {
    ("mean", "right"): [[2, -2], [1, -1], [0, 0]],
    ("mean", "left"): [[2, -2], [3, -3], [4, -4]],
    ("max", "right"): [[4, 0], [2, 0], [0, 0]],
    ("max", "left"): [[4, 0], [4, -2], [4, -4]],
    ("first", "right"): [[0, 0], [0, 0], [0, 0]],
    ("first", "left"): [[0, 0], [2, -2], [4, -4]],
    ("last", "right"): [[4, -4], [2, -2], [0, 0]],
    ("last", "left"): [[4, -4], [4, -4], [4, -4]],
}
MASKS = {"right": RIGHT, "left": LEFT}


@pytest.mark.parametrize(("pooling", "side"), ANSWERS)
@pytest.mark.parametrize("padding", [None, torch.nan, torch.inf, -torch.inf, 1e30])
def test_padding_never_counts_whatever_it_holds(pooling, side, padding):
    mask = MASKS[side]
    hidden = HIDDEN if padding is None else HIDDEN.masked_fill(~mask[..., None], padding)
    pooled = FUNCTIONS[pooling](hidden, mask)
    assert pooled.dtype == torch.float32
    assert pooled.tolist() == ANSWERS[pooling, side]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_no_mask_means_no_padding(pooling):
    everything = torch.ones(N_TEXTS, N_TOKENS, dtype=torch.bool)
    assert torch.equal(FUNCTIONS[pooling](HIDDEN), FUNCTIONS[pooling](HIDDEN, everything))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_float32(dtype):
    # In bfloat16, 256 + 1 is 256; in float16, the largest number is 65,504.
    hidden = torch.full((1, 2000, 1), 100.0, dtype=dtype)
    hidden[0, ::2] = 1.0
    for mask in (None, torch.ones(1, 2000, dtype=torch.bool)):
        assert FUNCTIONS["mean"](hidden, mask).item() == 50.5


@given(
    rows=st.lists(
        st.lists(st.booleans(), min_size=6, max_size=6).filter(any), min_size=1, max_size=8
    ),
    pooling=st.sampled_from(POOLINGS),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_pooling_by_groups_equals_pooling_with_the_mask(rows, pooling, seed):
    hidden = torch.randn(len(rows), 6, 3, generator=torch.Generator().manual_seed(seed))
    before = hidden.clone()
    for mask in (torch.tensor(rows), torch.arange(6) < torch.tensor(rows).sum(1, keepdim=True)):
        expected = FUNCTIONS[pooling](hidden, mask)
        torch.testing.assert_close(pool(hidden, group_texts(mask), pooling), expected)
    assert torch.equal(hidden, before)  # the model goes on with it


def test_neighbours_of_one_length_are_one_group():
    mask = torch.arange(4) < torch.tensor([4, 4, 2, 2, 2, 3])[:, None]
    groups = [(g.rows, g.tokens.stop, g.mask) for g in group_texts(mask)]
    assert groups == [(slice(0, 2), 4, None), (slice(2, 5), 2, None), (slice(5, 6), 3, None)]
