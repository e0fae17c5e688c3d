"""Settings of all tests, and what takes long to make."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A run of a tiny judge (see ``tiny_judges``), trained once."""
    from tests.tiny_judges import trained_run  # imports torch and transformers, which many tests do without

    return trained_run(tmp_path_factory.mktemp("trained"))
