"""Every file in configs/, and every command that a file's head or a README documents."""

import re
from types import SimpleNamespace

import pytest
import tiny

import config as configuration
import envs
import train_rl
import train_sft
from config import ConfigError
from paper import value_sft

FILES = sorted((tiny.ROOT / "configs").glob("*.yaml"))
READMES = [tiny.ROOT / "README.md", tiny.ROOT / "configs" / "README.md"]
COMMAND = re.compile(
    r"(?:torchrun --nproc_per_node=(\d)|python) (train_\w+|paper/value_sft)\.py (configs/\S+\.yaml)"
    r"(?: --set ([^\n`#]+))?"
)
ROWS = [file for file in FILES if re.search(r"qwen(1\.5|7)b_(?!instruct)", file.name)]


def commands() -> list[tuple[str, str, str, str]]:
    """(ranks, script, config, overrides) of every documented training command; those of 1.5B also for 7B."""
    found = {match for path in [*FILES, *READMES] for match in COMMAND.findall(path.read_text())}
    found |= {(ranks, script, file.replace("qwen1.5b", "qwen7b"), sets) for ranks, script, file, sets in found}
    return sorted(found)


@pytest.mark.parametrize("ranks, script, file, overrides", commands())
def test_documented_commands_resolve(ranks, script, file, overrides, monkeypatch):
    """As --dry-run does, for the ranks that the command names."""
    monkeypatch.chdir(tiny.ROOT)
    monkeypatch.setenv("WORLD_SIZE", ranks or "1")
    # earlier commands of a head make models and games
    monkeypatch.setattr(train_sft, "check_model_folder", lambda config, **_: None)
    monkeypatch.setattr(train_sft, "load_chat", lambda *_: SimpleNamespace(check_reply=lambda text: None))
    monkeypatch.setattr(envs, "tasks", lambda *_: [])
    monkeypatch.setattr(envs, "check_reset", lambda *_: None)
    config = configuration.load(file, overrides.split())
    if script == "train_rl":
        assert f"name: {config.name}" in train_rl.dry_run(config)
        return
    preflight = {"train_sft": train_sft.preflight, "paper/value_sft": value_sft.preflight}[script]
    if config.sft.data:  # the rows of `make base`, which an earlier command of the same head makes
        with pytest.raises(ConfigError, match=f"sft.data={config.sft.data} does not exist"):
            preflight(config, int(ranks or 1))
    else:
        preflight(config, int(ranks or 1))


def test_every_row_of_the_tables_has_its_file_and_figures():
    methods = ["gcd", "gigpo", "gigpo_gcd", "grpo", "nthr", "ppo", "rlvmr", "rlvmr_gcd"]
    methods += ["sft", "sft_rlvmr", "sft_value", "sft_vanilla", "sft_vanilla_rlvmr", "judge_sft", "cotrain"]
    assert {file.stem for file in ROWS} == {f"qwen{size}_{method}" for size in ("1.5b", "7b") for method in methods}
    for file in FILES:
        head = [line for line in file.read_text().splitlines() if line.startswith("#")]
        named = [match for line in head for match in COMMAND.findall(line)]
        assert [(match[2], match[3]) for match in named] == [(f"configs/{file.name}", "")], file
        if "qwen" in file.name:
            assert any("Paper" in line for line in head) and any("hardware" in line for line in head), file


@pytest.mark.parametrize(
    "sets", [(), ("env.level=L2",), ("env.name=scienceworld",), ("env.name=scienceworld", "env.level=L2")]
)
@pytest.mark.parametrize("file", ROWS, ids=lambda file: file.stem)
def test_rows_start_from_the_cold_start_of_their_environment_and_level(file, sets):
    config = configuration.load(file, sets)
    ending = f"_{config.env.name}_{config.env.level}"
    assert config.name.endswith(ending)
    if config.model.path.startswith("runs/"):
        cold = configuration.run_folder(config.model.path).name.removesuffix(ending)
        start = configuration.load(tiny.ROOT / "configs" / f"{cold}.yaml", sets)
        assert str(start.run_dir / "checkpoints" / "latest") == config.model.path
        assert start.prompt_style == config.prompt_style and start.env == config.env
        assert (start.sft.variant == "generative") == (config.judge.enabled or "judge_sft" in config.name)


def test_names_can_hold_options(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text('name: "a_{env.level}_{seed}"\nmodel: {path: "runs/{prompt_style}/checkpoints/latest"}\n')
    config = configuration.load(path, ["env.level=L2"])
    assert (config.name, config.model.path) == ("a_L2_0", "runs/think/checkpoints/latest")
    config = configuration.load(path, ["name=b_{env.level}", "model.path=runs/{name}/checkpoints/latest"])
    assert config.model.path == "runs/b_L0/checkpoints/latest"
    for wrong in ("{env.nosuch}", "{env}", "{nosuch}", "{env.name.upper}"):
        with pytest.raises(ConfigError, match=re.escape(wrong)):
            configuration.load(path, [f"name=a_{wrong}"])
