"""Nothing in the tests may reach for a network; and how many examples a night has time for."""

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"

# pytest --hypothesis-profile=nightly
settings.register_profile("nightly", max_examples=1200, deadline=None)
