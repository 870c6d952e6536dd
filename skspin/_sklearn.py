"""Private names of scikit-learn, with which its own estimators are written.

Only this file imports them, so if a release moves one, only this file changes.
"""

from collections.abc import Iterable
from typing import Any

from sklearn.base import _fit_context
from sklearn.linear_model._base import LinearClassifierMixin
from sklearn.multiclass import _ConstantPredictor
from sklearn.utils import _safe_indexing
from sklearn.utils._array_api import get_namespace
from sklearn.utils._param_validation import HasMethods, Hidden, Interval, StrOptions
from sklearn.utils._repr_html.estimator import _VisualBlock
from sklearn.utils._set_output import _wrap_data_with_container
from sklearn.utils.validation import _check_feature_names_in

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """An empty stand-in: scikit-learn has callbacks from version 1.9 on."""


__all__ = [
    "CallbackSupportMixin",
    "HasMethods",
    "Hidden",
    "Interval",
    "LinearClassifierMixin",
    "StrOptions",
    "_ConstantPredictor",
    "_check_feature_names_in",
    "_fit_context",
    "_safe_indexing",
    "_wrap_data_with_container",
    "diagram_block",
    "get_namespace",
]


def diagram_block(estimator: Any, facts: Iterable[str]) -> _VisualBlock:
    """Make an estimator's box in scikit-learn's HTML diagrams, with facts under its name."""
    return _VisualBlock(
        "single",
        estimator,
        names=type(estimator).__name__,
        name_caption=" · ".join(facts),
        name_details=type(estimator).__name__,  # not str(estimator), which writes out a model
    )
