"""Fixtures that more than one test file uses."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real photos and weights beside the project; a clone alone does not have them."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (real photos and weights), which is not beside this clone")
    return SHARED


@pytest.fixture(scope="session")
def reference(shared: Path) -> Path:
    """Files and numbers computed by the original neuraltalk2."""
    return shared / "reference" / "neuraltalk2"
