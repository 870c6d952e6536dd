"""Tell who wants to know how far a fit has come: a progress bar, scikit-learn's callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm

from skspin._layout import LayerColumns


def follow_layers(
    layers: list[LayerColumns], estimator: Any, X: Any, y: Any, verbose: int
) -> Iterator[LayerColumns]:
    """Go through layers, each one a task of the estimator's fit.

    Parameters
    ----------
    layers : list of LayerColumns
        What to go through.
    estimator : estimator
        Whose fit it is. Its callbacks are told where scikit-learn has them (from 1.9 on).
    X, y : array-like
        What it is fitted on; callbacks may ask for them.
    verbose : int
        1 or more shows a bar.
    """
    bar = tqdm(layers, desc="probes", unit="layer", disable=not verbose)
    if not hasattr(estimator, "_init_callback_context"):
        yield from bar
        return
    fit = estimator._init_callback_context(max_subtasks=len(layers))
    fit.call_on_fit_task_begin(estimator=estimator, X=X, y=y)
    for layer in bar:
        task = fit.subcontext(task_name=layer.name)
        task.call_on_fit_task_begin(estimator=estimator, X=X, y=y)
        yield layer
        task.call_on_fit_task_end(estimator=estimator, X=X, y=y)
    fit.call_on_fit_task_end(estimator=estimator, X=X, y=y)
