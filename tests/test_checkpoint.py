"""checkpoint.py: folders that load everywhere, saved whole or not at all, with room for them on the disk."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from chat import ChatFormat
from checkpoint import check_disk, point_latest, save_model
from config import Config, ConfigError
from model import LanguageModel, load_model
from tools import tiny_base_model


@pytest.fixture(scope="module")
def policy(small_games) -> LanguageModel:
    built = tiny_base_model.build(tiny.corpus(small_games), 0, hidden=64, layers=2, heads=2, vocab=800)
    return LanguageModel(built[0], ChatFormat(built[1]), torch.device("cpu"))


def test_saved_folder_loads_everywhere(policy, tmp_path, small_games):
    folder = tmp_path / "000007"
    leftover = tmp_path / "000007.partial"
    leftover.mkdir()
    (leftover / "junk.safetensors").write_text("from a save that was interrupted")
    save_model(policy, folder, {"guidelines.json": ["Look — närmare."]}, {"iteration": 7})
    assert not leftover.exists() and not (folder / "junk.safetensors").exists()
    assert json.loads((folder / "guidelines.json").read_text()) == ["Look — närmare."]
    assert torch.load(folder / "trainer" / "state.pt", weights_only=True) == {"iteration": 7}
    ids = torch.tensor([policy.chat.encode("look")])
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ours = load_model(tiny.sft_config(small_games), path=str(folder))
    assert not ours.model.training
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, policy.model(ids).logits)
        assert torch.equal(ours.model(ids).logits, policy.model(ids).logits)


def test_an_interrupted_save_leaves_the_old_checkpoint(policy, tmp_path, monkeypatch):
    folder = tmp_path / "000001"
    save_model(policy, folder, {"guidelines.json": ["old"]})
    point_latest(folder, keep=1)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    for name in ("000001", "000002"):
        with pytest.raises(OSError, match="disk full"):
            save_model(policy, tmp_path / name, {"guidelines.json": ["new"]}, {"iteration": 2})
    assert not (tmp_path / "000002").exists()
    assert json.loads((tmp_path / "latest" / "guidelines.json").read_text()) == ["old"]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_latest_moves_and_old_checkpoints_go(tmp_path):
    for number in range(1, 6):
        folder = tmp_path / f"{number:06d}"
        folder.mkdir()
        point_latest(folder, keep=2)
        assert (tmp_path / "latest").resolve() == folder
    (tmp_path / "000006.partial").mkdir()
    point_latest(folder, keep=2)
    assert names(tmp_path) == ["000004", "000005", "000006.partial", "latest"]
    point_latest(folder, keep=0)  # the last one is always kept
    assert names(tmp_path) == ["000005", "000006.partial", "latest"]


def test_a_checkpoint_is_replaced_whole(policy, tmp_path):
    """Saved twice under one name, as a cold start is, also after a crash between the two renames."""
    folder = tmp_path / "final"
    save_model(policy, folder, {"guidelines.json": ["old"]})
    folder.rename(tmp_path / "final.replaced")
    for guidelines in (["middle"], ["new"]):
        save_model(policy, folder, {"guidelines.json": guidelines})
        assert json.loads((folder / "guidelines.json").read_text()) == guidelines and names(tmp_path) == ["final"]


@pytest.mark.parametrize("keep", [1, 2])
def test_the_new_checkpoint_outlives_those_of_an_earlier_longer_run(tmp_path, keep):
    for name in ("000010", "000090", "000100"):
        (tmp_path / name).mkdir()
    new = tmp_path / "000020"
    new.mkdir()
    point_latest(new, keep)
    assert (tmp_path / "latest").resolve() == new and new.is_dir()
    assert names(tmp_path) == [*["000010"][: keep - 1], "000020", "latest"]


def test_what_will_not_fit_on_the_disk(tmp_path, monkeypatch):
    """Weights and both moments of all that is trained, for each checkpoint that is kept and the one being written."""
    monkeypatch.chdir(tmp_path)
    trained = torch.nn.Parameter(torch.empty(1_543_714_304, device="meta"))  # as many as Qwen2.5 1.5B has
    frozen = torch.nn.Parameter(torch.empty(10**12, device="meta"), requires_grad=False)
    policy = LanguageModel(torch.nn.ParameterList([trained, frozen]), None, torch.device("meta"))
    disk = SimpleNamespace(free=52 * 2**30)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: disk)
    check_disk(Config(), [policy])
    with pytest.raises(ConfigError, match="will take 103.5 GiB"):  # with a critic
        check_disk(Config(), [policy, policy])
    disk.free = 10 * 2**30
    with pytest.raises(ConfigError, match=r"checkpoints will take 51.8 GiB, .* has 10.0 GiB free.*keep_checkpoints=2"):
        check_disk(Config(), [policy])
    with pytest.raises(ConfigError, match="will take 25.9 GiB"):
        check_disk(tiny.changed(Config(), "train.optimizer=adamw8bit"), [policy])
    old = tmp_path / "runs" / "run" / "checkpoints" / "000020" / "model.safetensors"
    old.parent.mkdir(parents=True)
    with old.open("wb") as file:  # a resumed run's checkpoints make room for its new ones
        file.truncate(42 * 2**30)
    check_disk(Config(), [policy])
