"""Processes that share a folder, that are asked to end, and disks that fill: nothing is lost, and each is one line."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import checkpoint
import config as configuration
import evaluate
from checkpoint import RunLock
from config import Config, ConfigError
from distributed import Optimizer, adamw

SFT = """
name: sft
model: {{path: {checkpoint}}}
env: {{name: alfworld, data: {games}, max_steps: 10}}
sft: {{episodes: 12, epochs: 3, samples_per_update: 16, lr: 1.0e-3}}
"""
# Runs a script, and sends itself a signal when it has made so many optimizer steps.
SIGNALLED = """
import os, signal, sys
import config, distributed
script, steps, kind = os.environ["SCRIPT"], int(os.environ["STEPS"]), getattr(signal, os.environ["KIND"])
plain, made = distributed.Optimizer.step, 0
def step(*arguments):
    global made
    norm = plain(*arguments)
    made += 1
    if made == steps:
        os.kill(os.getpid(), kind)
    return norm
distributed.Optimizer.step = step
config.fail_clearly(__import__(script).main)
"""


def signalled(folder: Path, script: str, steps: int, kind: str, *arguments: object) -> subprocess.CompletedProcess:
    (folder / "signalled.py").write_text(SIGNALLED)
    command = [sys.executable, str(folder / "signalled.py"), *map(str, arguments)]
    variables = tiny.environment(SCRIPT=script, STEPS=str(steps), KIND=kind)
    return subprocess.run(command, cwd=folder, env=variables, timeout=240, capture_output=True, text=True)


@pytest.fixture(scope="module")
def cold_start(small_games, tmp_path_factory) -> Path:
    """The config of a cold start of about 20 updates, in a folder where it has been run without a break."""
    folder = tmp_path_factory.mktemp("cold_start")
    (folder / "sft.yaml").write_text(SFT.format(checkpoint=tiny.checkpoint(small_games), games=small_games))
    tiny.run("train_sft.py", folder / "sft.yaml", cwd=folder)
    return folder / "sft.yaml"


def test_a_run_has_its_folder_to_itself(small_games, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.join()
    lock = RunLock(Path("runs/tiny_rl"))
    done = subprocess.run(tiny.command("train_rl.py", tiny.rl_yaml(small_games, tmp_path)), cwd=tmp_path,
                          env=tiny.environment(), timeout=240, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(rf"error: runs/tiny_rl is in use by another process \(process {os.getpid()} on ", done.stderr)
    lock.release()
    RunLock(Path("runs/tiny_rl")).release()


def test_where_there_are_no_locks_a_run_is_not_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.join()
    for kind in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        error = OSError(kind, os.strerror(kind))
        monkeypatch.setattr("fcntl.flock", lambda *_, error=error: (_ for _ in ()).throw(error))
        RunLock(Path("runs/one")).release()
        assert f"runs/one cannot be locked ({os.strerror(kind)}): take care" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.join()
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match="cannot write to runs/one"):
        RunLock(Path("runs/one"))


def same_ends(one: Path, other: Path) -> None:
    """The weights of two cold starts, and what they recorded but for times."""
    ends = [tiny.weights_of(run / "checkpoints" / "latest") for run in (one, other)]
    assert tiny.distance(*ends) < 1e-6
    records = [tiny.metrics_of(run) for run in (one, other)]
    assert [record["update"] for record in records[0]] == [record["update"] for record in records[1]]
    assert records[0][-1]["train/nll_per_token"] == pytest.approx(records[1][-1]["train/nll_per_token"], rel=1e-5)


@pytest.mark.parametrize(("kind", "code"), [("SIGTERM", 0), ("SIGKILL", -9)])
def test_a_cold_start_goes_on_midway(cold_start, small_games, tmp_path, kind, code):
    """Asked to end it saves at once; killed it loses the epoch under way."""
    total = tiny.metrics_of(cold_start.parent / "runs/sft")[-1]["update"]
    steps = total // 2
    done = signalled(tmp_path, "train_sft", steps, kind, cold_start)
    assert done.returncode == code, done.stderr[-2000:]
    assert tiny.announced(done.stderr) == ["read or make the rows", f"load {tiny.checkpoint(small_games)}"]
    left = tmp_path / "runs/sft/checkpoints"
    reached = int(os.readlink(left / "latest"))
    assert reached == steps if kind != "SIGKILL" else total // 3 <= reached <= steps
    if kind != "SIGKILL":
        assert f"stopped after update {steps} of {total}" in done.stdout
    refused = subprocess.run(tiny.command("train_sft.py", cold_start, "--set", "sft.lr=2e-3"), cwd=tmp_path,
                             env=tiny.environment(), capture_output=True, text=True)  # fmt: skip
    assert refused.returncode == 2 and "was made with other settings (sft.lr)" in refused.stderr
    tiny.run("train_sft.py", cold_start, "--set", "sft.tokens_per_micro_batch=500", cwd=tmp_path)
    same_ends(cold_start.parent / "runs/sft", tmp_path / "runs/sft")
    assert sorted(path.name for path in left.iterdir()) == ["final", "latest"]
    assert "done already" in tiny.run("train_sft.py", cold_start, cwd=tmp_path)


def test_ctrl_c_saves_a_run(small_games, tmp_path):
    """The iteration under way is finished and saved, though no checkpoint was due."""
    settings = [tiny.rl_yaml(small_games, tmp_path), "--set", "train.checkpoint_every=100", "train.eval_every=0"]
    done = signalled(tmp_path, "train_rl", 1, "SIGINT", *settings, "rollout.engine=transformers")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Ctrl-C again ends at once" in done.stderr and "Traceback" not in done.stderr
    assert "stopped after 1 of 2 iterations: the same command goes on" in done.stdout
    assert os.readlink(tmp_path / "runs/tiny_rl/checkpoints/latest") == "000001"


def test_a_second_ctrl_c_ends_at_once():
    from distributed import PreemptionSignal

    tiny.join()
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    try:
        preemption = PreemptionSignal()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun sends after it
        assert preemption.received
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for kind, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(kind, handler)


# ---- Evaluations


def test_evaluations_are_named_by_checkpoint_and_never_replaced(small_games, tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs" / "one"
    tiny.copy(tiny.checkpoint(small_games), run / "checkpoints" / "000002")
    (run / "checkpoints" / "latest").symlink_to("000002")
    settings = tiny.rl_config(small_games, "name=one", "eval.levels=[L0]", "rollout.engine=transformers")
    configuration.save(settings, run / "config.yaml")
    monkeypatch.chdir(tmp_path)
    tiny.run("evaluate.py", "--ckpt", "runs/one/checkpoints/latest", cwd=tmp_path)
    first = run / "eval_000002.json"
    written = first.read_bytes()
    tiny.copy(run / "checkpoints" / "000002", run / "checkpoints" / "000001")
    tiny.run("evaluate.py", "--ckpt", "runs/one/checkpoints/000001", cwd=tmp_path)
    assert first.read_bytes() == written and (run / "eval_000001.json").is_file()
    assert configuration.newest_evaluation(run) == first
    with pytest.raises(ConfigError, match=r"eval_000002.json is there already: say --out FOLDER"):
        evaluate.preflight(settings, "runs/one/checkpoints/latest", run)
    with pytest.raises(ConfigError, match=r"cannot write to runs/one/config.yaml.*--out FOLDER"):
        evaluate.preflight(settings, "runs/one/checkpoints/000001", Path("runs/one/config.yaml"))
    with pytest.raises(ConfigError, match=r"did you mean runs/one/checkpoints/latest\?"):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--ckpt", "runs/one"])
        evaluate.main()


FULL = """
import errno, os, pathlib
import config, evaluate
def write_text(path, *_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
pathlib.Path.write_text = write_text
config.fail_clearly(evaluate.main)
"""


def test_what_was_found_is_printed_before_it_is_written(small_games, tmp_path):
    (tmp_path / "full.py").write_text(FULL)
    config = tiny.rl_yaml(small_games, tmp_path)
    command = [sys.executable, str(tmp_path / "full.py"), "--ckpt", str(tiny.checkpoint(small_games)), "--config",
               str(config), "--levels", "L0", "--set", "rollout.engine=transformers"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=tiny.environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"error: No space left on device: .*eval_000001.partial", done.stderr)
    assert tiny.announced(done.stderr) == [f"load {tiny.checkpoint(small_games)}", "start the engine", "play L0"]
    assert not list(tmp_path.rglob("eval_*.json"))  # nothing that says: this is evaluated
    assert re.search(r"\[\d+\.\d, \d+\.\d\] n=6", done.stdout)


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_disk_that_does_not_take_more_is_one_line(kind, monkeypatch, capsys):
    def main():
        raise OSError(kind, os.strerror(kind), "runs/one/metrics.jsonl")

    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit) as caught:
        configuration.fail_clearly(main)
    told = capsys.readouterr().err
    assert caught.value.code == 2 and told == f"error: {os.strerror(kind)}: runs/one/metrics.jsonl\n"


def test_records_of_episodes_are_counted_before_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Disk", (), {"free": 2**30}))
    checkpoint.check_disk(Config(), [], iterations=100)
    with pytest.raises(ConfigError, match=r"records of episodes up to 1\.\d GiB.*train.episodes_every=1"):
        checkpoint.check_disk(Config(), [], iterations=200)
    checkpoint.check_disk(tiny.changed(Config(), "train.episodes_every=10"), [], iterations=200)


# ---- Resume


def test_a_run_goes_on_where_things_have_other_names(small_games, tmp_path, monkeypatch):
    """Places are compared by what lies there; speed, memory, endpoints and records are free."""
    monkeypatch.chdir(tmp_path)
    tiny.join()
    games, model = tmp_path / "games", tmp_path / "model"
    games.symlink_to(small_games)
    model.symlink_to(tiny.checkpoint(small_games))
    config = tiny.rl_config(small_games)
    ids = {"games": ["a", "b"]}
    state = checkpoint.resume(config, **ids)
    state.iteration = 1
    from model import load_model

    policy = load_model(config)
    checkpoint.save_checkpoint(policy, {}, None, config, state)
    assert json.loads((config.run_dir / "checkpoints/latest/guidelines.json").read_text()) == []
    monkeypatch.setattr(
        checkpoint, "_load", lambda file, plain=checkpoint._load: {} if "opt" in file.name else plain(file)
    )
    (tmp_path / "moved.txt").write_text("Look.")
    for change in (
        f"env.data={games}", f"model.path={model}", "env.data=games", "model.path=model", "judge.base_url=http://x",
        "judge.timeout_s=5", "judge.retries=1", "judge.key_env=KEY", "judge.cache=elsewhere", "train.episodes_every=3",
        "device=cpu", "sft.lr=1", "train.optimizer=adamw8bit", "train.tokens_per_micro_batch=99",
        "model.gradient_checkpointing=true", "rollout.gpu_memory_utilization=0.3", "rollout.engine=transformers",
        "guidelines.file=moved.txt",
    ):  # fmt: skip
        assert checkpoint.resume(tiny.changed(config, change), **ids).iteration == 1, change
    other = tiny.copy(tiny.checkpoint(small_games), tmp_path / "other")
    data = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(data[:-5000] + bytes(5000))
    for change, games in ((f"model.path={other}", ids), ("judge.model=x", ids), ("env.data=x", {"games": ["a"]})):
        with pytest.raises(ConfigError, match=rf"made with other settings \({change.split('=')[0]}\)"):
            checkpoint.resume(tiny.changed(config, change), **games)
    with pytest.raises(ConfigError, match=r"other settings \(the rows"):  # a cold start of the same name
        checkpoint.resume(config, rows=["a", "b"])


@pytest.fixture
def begun(small_games, tmp_path, monkeypatch) -> tuple[Config, dict]:
    """A run with one checkpoint, and what it is resumed with; its template is a file."""
    from model import load_model

    monkeypatch.chdir(tmp_path)
    tiny.join()
    shutil.copy(tiny.ROOT / "assets" / "plain_chat.jinja", "mine.jinja")
    config, ids = tiny.rl_config(small_games, "model.chat_template=mine.jinja"), {"games": ["a"]}
    state = checkpoint.resume(config, **ids)
    state.iteration = 1
    policy = load_model(config)
    checkpoint.save_checkpoint(policy, {"policy": Optimizer(policy.model, 0.0, adamw)}, None, config, state)
    return config, ids


def test_a_template_is_compared_by_its_text(begun):
    config, ids = begun
    shutil.copy("mine.jinja", "moved.jinja")
    assert checkpoint.resume(tiny.changed(config, "model.chat_template=moved.jinja"), **ids).iteration == 1
    Path("mine.jinja").write_text(Path("mine.jinja").read_text() + "changed")
    with pytest.raises(ConfigError, match=r"other settings \(model.chat_template\)"):
        checkpoint.resume(config, **ids)


def test_the_base_of_an_adapter_is_compared_by_content(small_games, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tiny.copy(tiny.checkpoint(small_games), tmp_path / "base")
    adapter = tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig()).save_pretrained(adapter)
    config = tiny.rl_config(small_games, f"model.path={adapter}", f"model.base={base}", "model.tune=lora")
    tree, origin = configuration.to_dict(config), checkpoint._model_origin(config)
    moved = tiny.changed(config, f"model.base={base.rename(tmp_path / 'moved')}")
    assert checkpoint.changed_settings(moved, tree, origin, checkpoint._model_origin(moved)) == []
    data = (tmp_path / "moved" / "model.safetensors").read_bytes()
    (tmp_path / "moved" / "model.safetensors").write_bytes(data[:-5000] + bytes(5000))
    assert checkpoint.changed_settings(moved, tree, origin, checkpoint._model_origin(moved)) == ["model.base"]


def test_a_run_that_was_killed_before_its_first_link_goes_on(begun):
    config, ids = begun
    (config.run_dir / "checkpoints" / "latest").unlink()
    assert checkpoint.resume(config, **ids).iteration == 1


@pytest.mark.parametrize("how", ["links followed", "links followed, latest alone", "dangling"])
def test_a_run_whose_link_to_the_last_checkpoint_was_lost_says_how_to_mend_it(begun, how):
    """It neither begins anew, which would delete what is there, nor dies at its first save."""
    config, ids = begun
    link = config.run_dir / "checkpoints" / "latest"
    if how.startswith("links followed"):
        link.unlink()
        tiny.copy(link.with_name("000001"), link)
    if how in ("links followed, latest alone", "dangling"):
        shutil.rmtree(link.with_name("000001"))
    with pytest.raises(ConfigError, match="is not the link to the last checkpoint") as caught:
        checkpoint.resume(config, **ids)
    cure = str(caught.value).split("leaves there: ")[1]
    subprocess.run(cure.split(", and")[0], shell=True, check=True)
    assert checkpoint.resume(config, **ids).iteration == (0 if how == "dangling" else 1)
    assert how == "dangling" or os.readlink(link) == "000001"
