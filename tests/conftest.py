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
