"""Fixtures that several test files share."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and recordings that are kept beside the repository, not in it."""
    if not SHARED.is_dir():
        pytest.skip(f"real data is not at hand: {SHARED} does not exist")
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model's folder, from the user's cache or made as the demo makes it; an error where it cannot be."""
    from chatlora.model.demo import embedded_model

    return embedded_model("embedded:smollm2-135m-instruct")
