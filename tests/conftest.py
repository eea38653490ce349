"""Fixtures that several test files share, and the order of the files."""

from pathlib import Path

import pytest

from tools.make_games import make_games

SLOW = "golden train_rl runs processes toy_environment teacher distributed figures".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow files: no worker is left with one of them when the others are done."""
    rank = {f"test_{name}": number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def small_games(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of generated ALFWorld games in small rooms."""
    folder = tmp_path_factory.mktemp("data") / "small_games"
    make_games(folder, train=24, seen=12, unseen=12, seed=0, receptacles=6, objects=12)
    return folder
