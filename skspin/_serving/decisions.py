"""From token ids to decision values: the module that `to_torch` makes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from skspin._explain import LinearForm


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
