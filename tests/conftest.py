"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from tools.make_games import make_games


@pytest.fixture(scope="session")
def small_games(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of generated ALFWorld games in small rooms."""
    folder = tmp_path_factory.mktemp("data") / "small_games"
    make_games(folder, train=24, seen=12, unseen=12, seed=0, receptacles=6, objects=12)
    return folder
