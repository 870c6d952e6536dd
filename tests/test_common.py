"""scikit-learn's own checks on the selector; their like on the transformer, whose input is text."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from skspin import SalientNeuronSelector


@pytest.mark.filterwarnings("ignore:X carries no layers:UserWarning")
@pytest.mark.filterwarnings("ignore:No probe puts weight:UserWarning")
@parametrize_with_checks([SalientNeuronSelector()])
def test_selector_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)
