"""Nothing in the tests may reach for a network; and how many examples a night has time for."""

import os

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"

# pytest --hypothesis-profile=nightly
settings.register_profile("nightly", max_examples=1200, deadline=None)


@pytest.fixture(scope="module")
def tokenizer():
    """The demo model's tokenizer, which knows 30,522 tokens."""
    from transformers import AutoTokenizer

    from skspin.datasets import demo_model

    return AutoTokenizer.from_pretrained(demo_model())
