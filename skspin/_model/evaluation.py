"""A model in evaluation mode for as long as somebody uses it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn


@dataclass
class _Evaluation:
    """How many passes use a model in evaluation mode, and what was in training before them."""

    training: list[nn.Module]
    n_passes: int = 0


_evaluations: WeakKeyDictionary[nn.Module, _Evaluation] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch off dropout.

    Each module gets its own mode back when the last of the threads that share the model leaves: the
    first one's leaving must not switch dropout on for the others.
    """
    with _lock:
        evaluation = _evaluations.get(model)
        if evaluation is None:
            training = [module for module in model.modules() if module.training]
            evaluation = _evaluations[model] = _Evaluation(training)
            if training:
                model.eval()
        evaluation.n_passes += 1
    try:
        yield
    finally:
        with _lock:
            evaluation.n_passes -= 1
            if not evaluation.n_passes:
                del _evaluations[model]
                for module in evaluation.training:
                    module.training = True
