"""config.py: what is accepted, what each error says, that every option is described, every file in configs/ loads."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

import config
from config import AlgoConfig, Config, ConfigError, check_world, load, save, to_dict

ROOT = Path(__file__).parent.parent
OPTIONS = [(key, field) for key, field, _ in config.options(Config())]


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def empty(write):
    return write("")


def error(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_an_empty_file_gives_the_defaults(empty):
    assert load(empty) == Config()


def test_file_then_overrides(write):
    path = write("name: a\ntrain: {lr: 2e-6, iterations: 7}\n")
    loaded = load(path, ["train.lr=3e-6", "train.iterations=8", "train.iterations=9"])
    assert (loaded.name, loaded.train.lr, loaded.train.iterations) == ("a", 3e-6, 9)
    assert loaded.train.warmup == Config().train.warmup
    assert loaded.run_dir == Path("runs/a")


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=1e-6", 1e-6),  # YAML 1.1 reads this as a string
        ("train.lr=1.0e-6", 1e-6),
        ("train.lr=1", 1.0),
        ("train.max_grad_norm=inf", math.inf),
        ("train.iterations=1e3", 1000),
        ("train.iterations=256.0", 256),
        ("seed=9007199254740993", 9007199254740993),  # 2**53 + 1 is no float
        ("seed=010", 10),  # not octal
        ("judge.enabled=true", True),
        ("judge.enabled=False", False),
        ("algo.dual_clip=3", 3.0),
        ("algo.dual_clip=null", None),
        ("env.task_types=[boil, 7]", ("boil", "7")),
        ("eval.levels=[L2]", ("L2",)),
        ("eval.levels=[]", ()),
        ("name=007", "007"),
        ("name=yes", "yes"),
        ("name=2026-11-22", "2026-11-22"),
        ("name='quoted'", "quoted"),
        ("model.path=a=b: c", "a=b: c"),
        ("env.data=", ""),
        ("algo.advantage=gigpo", "gigpo"),
    ],
)
def test_override_is_parsed_to_the_fields_type(empty, override, expected):
    value = load(empty, [override])
    for part in override.partition("=")[0].split("."):
        value = getattr(value, part)
    assert value == expected and type(value) is type(expected)


def test_file_values_are_parsed_to_the_fields_type(write):
    loaded = load(
        write("name: 007\ntrain: {lr: 1e-6}\neval: {levels: [L0]}\nalgo: {dual_clip: null}\nenv: {data: ''}\n")
    )
    assert (loaded.name, loaded.train.lr, loaded.eval.levels) == ("007", 1e-6, ("L0",))
    assert loaded.algo.dual_clip is None and loaded.env.data == ""


def test_a_whole_section_can_be_overridden(write):
    loaded = load(write("train: {lr: 1e-3}\n"), ["train={warmup: 5}"])
    assert (loaded.train.lr, loaded.train.warmup) == (1e-3, 5)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.learning_rat=1", ["train.learning_rat", "valid: ", "lr"]),
        ("train.warmpu=1", ["unknown key train.warmpu", "'warmup'"]),
        ("trian.lr=1", ["unknown key trian", "'train'"]),
        ("base=other.yaml", ["unknown key base"]),
        ("train.lr=fast", ["train.lr='fast'", "expected float"]),
        ("train.lr=true", ["train.lr", "expected float"]),
        ("train.lr=nan", ["train.lr", "expected float"]),
        ("train.lr=", ["train.lr", "expected float"]),
        ("train.lr=[1]", ["train.lr", "expected one value"]),
        ("train.lr.x=1", ["train.lr", "expected one value"]),
        ("train.iterations=1.5", ["train.iterations", "expected int"]),
        ("train.iterations=inf", ["train.iterations", "expected int"]),
        ("judge.enabled=1", ["judge.enabled", "expected bool"]),
        ("algo.dual_clip=x", ["algo.dual_clip", "expected float"]),
        ("eval.levels=L0", ["eval.levels", "expected a list"]),
        ("name=[a", ["--set name=[a", "not valid YAML"]),
        ("name=../mine", ["name='../mine'", "runs/<name>"]),
        ("name=/tmp/mine", ["name='/tmp/mine'", "runs/<name>"]),
        ("name=./", ["name='./'", "runs/<name>"]),
        ("train=3", ["train", "key: value"]),
        ("train.lr", ["--set train.lr", "key=value"]),
        ("algo.aggregate=tokens", ["algo.aggregate='tokens'", "token, sequence, dr"]),
    ],
)
def test_errors_name_the_key_and_the_cure(empty, override, parts):
    message = error(empty, override)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["eval.levels=[L3]"], "L0, L1, L2"),
        (["model.tune=qlora", "model.shard=always"], "leave model.shard=auto"),
        (["rollout.tensor_parallel=2", "rollout.engine=transformers"], "one rank per engine"),
        (["rollout.group_size=1"], "at least 2 episodes"),
        (["algo.advantage=ppo", "rollout.group_size=1", "rollout.dynamic_sampling=1"], "rollout.group_size=2 or more"),
        (["algo.advantage=rlvmr"], "prompt_style=rlvmr"),
        (["algo.advantage=ppo", "algo.nthr=true"], "algo.advantage=ppo has none"),
        (["algo.importance=mask", "train.old_logprobs=engine"], "train.old_logprobs=trainer"),
        (["judge.enabled=true", "judge.group_size=1"], "at least 2 critiques"),
        (["judge.teacher=openai", "judge.votes=5"], "judge.teacher_temperature=0; raise it"),
        (["guidelines.writer=teacher"], "guidelines.writer=teacher needs judge.teacher=openai"),
        (["judge.teacher=expert", "sft.writer=teacher"], "sft.writer=teacher needs judge.teacher=openai"),
        (["guidelines.every=5"], "judge.enabled=true"),
        (["guidelines.file=nowhere.txt"], "guidelines.file=nowhere.txt does not exist"),
    ],
)
def test_constraints_between_fields(empty, overrides, part):
    assert part in error(empty, *overrides)


@pytest.mark.parametrize(
    ("key", "limit", "field"),
    [
        (key, limit, field)
        for key, field in OPTIONS
        for limit in ("above", "at_least", "at_most")
        if limit in field.metadata["limits"]
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_just_out_of_range_is_an_error(empty, key, limit, field):
    """And one at the limit is not, unless it says "above"."""
    bound, whole = field.metadata["limits"][limit], field.type == "int"
    step = {"above": 0, "at_least": -1, "at_most": 1}[limit] * (1 if whole else 1e-6)
    outside = bound + step if whole else float(bound + step)
    allowed = f"{limit.replace('_', ' ')} {bound:g}"
    message = error(empty, f"{key}={outside!r}")
    assert message.startswith(f"{key} is {outside}; it must be ") and allowed in message, message
    inside = bound if limit != "above" else bound + 1 if whole else bound + 1e-6
    try:
        load(empty, [f"{key}={inside!r}"])
    except ConfigError as other:  # a constraint between options
        assert "it must be" not in str(other)


def test_a_choice_of_a_table_names_the_nearest(empty):
    """At the start of a run: config.py itself does not know the tables of losses.py."""
    import train_rl

    for key, value, meant in (("algo.advantage", "gropo", "grpo"), ("algo.policy_loss", "ppo_clop", "ppo_clip")):
        loaded = load(empty, ["env.name=alfworld", f"{key}={value}"])
        for check in (train_rl.dry_run, lambda loaded: train_rl.preflight(loaded, 1)):
            with pytest.raises(ConfigError, match=f"^{key}='{value}' is not one of .*; did you mean '{meant}'"):
                check(loaded)
    config.check_choice("algo.advantage", "mine", {"grpo": 1, "mine": 2})


def test_file_errors(write, tmp_path):
    assert "nowhere.yaml does not exist" in error(tmp_path / "nowhere.yaml")
    assert "not valid YAML" in error(write("train: {lr"))
    assert "key: value lines" in error(write("- a\n- b\n"))
    assert "key: value lines" in error(write("train:\n"))


def test_a_repeated_key_is_an_error_since_yaml_would_drop_the_first(write):
    message = error(write("train: {lr: 1}\nseed: 1\ntrain: {warmup: 2}\n"))
    assert "'train' occurs twice" in message and "run.yaml" in message and "line 3" in message


# ---------------------------------------------------------------------------------------------------------------- base


def test_base_is_merged_key_by_key(write):
    write("seed: 3\neval: {seeds: 5, levels: [L0, L1]}\n", "parent.yaml")
    loaded = load(write("base: parent.yaml\neval: {levels: [L2]}\n"))  # found beside the file that names it
    assert (loaded.seed, loaded.eval.seeds, loaded.eval.levels) == (3, 5, ("L2",))


def test_base_of_a_base_and_other_broken_bases_are_rejected(write):
    write("seed: 1\n", "grandparent.yaml")
    write("base: grandparent.yaml\n", "parent.yaml")
    assert "only one level" in error(write("base: parent.yaml\n"))
    assert "missing.yaml does not exist" in error(write("base: missing.yaml\n"))
    assert "base=" in error(write("base: [parent.yaml]\n"))


# ---------------------------------------------------------------------------------------------------- round trip, world


def test_save_then_load_gives_the_same_tree(empty, tmp_path):
    odd = ["name=007", "train.lr=1e-7", "train.max_grad_norm=inf", "algo.dual_clip=3", "judge.enabled=true"]
    for overrides in ([], odd, ["name=null", 'guidelines.themes=["a: b", "é, # no comment", "on"]', "eval.levels=[]"]):
        original = load(empty, overrides)
        path = tmp_path / "deep" / "er" / "config.yaml"
        save(original, path)
        assert load(path) == original


def test_to_dict_is_plain_and_complete():
    plain = to_dict(Config())
    assert list(plain) == [field.name for field in dataclasses.fields(Config)]
    assert plain["eval"]["levels"] == ["L0", "L1", "L2"] and plain["algo"]["dual_clip"] is None


def test_check_world_names_the_nearest_sizes(empty):
    check_world(load(empty), 8)
    with pytest.raises(ConfigError, match="rollout.groups=16 does not divide over 3 ranks; set it to 15 or 18"):
        check_world(load(empty), 3)
    check_world(load(empty, ["judge.questions=5"]), 16)  # nobody is asked
    judged = load(empty, ["judge.enabled=true", "judge.questions=4"])
    with pytest.raises(ConfigError, match="judge.questions=4 .* 16 ranks, each asking .* flawed ones; set it to 32"):
        check_world(judged, 16)
    check_world(judged, 2)
    with pytest.raises(ConfigError, match="judge.questions=4 .* 4 ranks.*; set it to 8"):  # 1 each has no halves
        check_world(judged, 4)
    with pytest.raises(ConfigError, match="judge.questions=7 .* 1 rank, .*; set it to 6 or 8"):
        check_world(load(empty, ["judge.enabled=true", "judge.questions=7"]), 1)
    with pytest.raises(ConfigError, match="judge.teacher_steps=20 .* 8 ranks; set it to 16 or 24"):
        check_world(load(empty, ["judge.enabled=true", "judge.teacher=expert", "judge.teacher_steps=20"]), 8)


def test_defaults_of_the_algorithm_are_the_published_ones():
    cfg = AlgoConfig()
    assert (cfg.gamma, cfg.step_weight, cfg.invalid_penalty) == (0.95, 1.0, 0.1)
    assert (cfg.clip_low, cfg.clip_high, cfg.kl, cfg.stats_over) == (0.2, 0.2, 0.01, "steps")


# --------------------------------------------------------------------------------------------------- scripts and files


def run(*arguments):
    command = [sys.executable, str(ROOT / "config.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_command_line_prints_the_tree_or_one_line_of_error(write):
    path = write("seed: 3\n")
    good = run(path, "--set", "train.lr=1e-4", "name=x")
    assert good.returncode == 0 and load(write(good.stdout, "out.yaml")) == load(path, ["train.lr=1e-4", "name=x"])
    bad = run(path, "--set", "sed=4")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: unknown key sed; did you mean 'seed'?\n"


def test_every_option_has_one_line_that_says_what_it_does():
    for key, field in OPTIONS:
        what = field.metadata["what"]
        assert 10 < len(what) <= 120 and what == what.strip() and "\n" not in what and not what.endswith("."), key


def test_without_a_file_the_manual_of_all_options_is_printed():
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert [head.partition(" = ")[0] for head in heads] == [key for key, _ in OPTIONS]
    assert max(map(len, lines)) <= 160
    text = " ".join(done.stdout.split())
    assert all(" ".join(field.metadata["what"].split()) in text for _, field in OPTIONS)
    assert "rollout.groups = 16 (above 0) GRPO groups an iteration" in text
    assert "algo.clip_low = 0.2 (at least 0, at most 1) the ratio" in text
    assert "algo.dual_clip = null (above 1)" in text and "[token | sequence | dr]" in text


def test_an_error_does_not_lose_what_was_printed_before():
    main = "def main():\n    print('before')\n    raise config.ConfigError('why')\n"
    command = [sys.executable, "-c", f"import config\n{main}config.fail_clearly(main)"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, "before\n", "error: why\n")


def test_a_failing_script_does_not_wait_for_its_threads():
    """Or torchrun would wait for a rank whose environment hangs."""
    main = "def main():\n    threading.Thread(target=time.sleep, args=[300]).start()\n    raise ValueError('why')\n"
    command = [sys.executable, "-c", f"import config, threading, time\n{main}config.fail_clearly(main)"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1 and "in main" in done.stderr and done.stderr.endswith("ValueError: why\n")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda path: path.stem)
def test_every_config_of_the_project_loads(path):
    assert load(path).name


def test_every_field_is_of_a_kind_that_overrides_can_parse(empty):
    """Writing each default as --set gives it back, so that no field has a type that `_parse` does not know."""
    for section, values in to_dict(Config()).items():
        for key, value in values.items() if isinstance(values, dict) else [(None, values)]:
            text = "null" if value is None else str(value)
            assert load(empty, [f"{section}.{key}={text}" if key else f"{section}={text}"]) == Config()


def test_nearest_lists_what_is_valid_when_nothing_is_close():
    assert config.nearest("zzz", ["alpha", "beta"]) == "; valid: alpha, beta"
