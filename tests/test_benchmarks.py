"""The benchmarks that train, in small."""

import re

import tiny


def test_gcd_overhead_prints_a_ratio(small_games, tmp_path):
    settings = "rollout.engine=transformers rollout.groups=2".split()
    arguments = [tiny.rl_yaml(small_games, tmp_path), "--iterations", "1", "--repeats", "1", "--set", *settings]
    printed = tiny.run("benchmarks/gcd_overhead.py", *arguments, cwd=tmp_path)
    assert re.search(r"with GCD / without: \d\.\d+ \[.* update on \d+ critiques beside \d+ actions", printed)
    assert not list((tmp_path / "runs").iterdir())


def test_update_compares_its_sides(tmp_path):
    arguments = ["--group-size", "2", "--repeats", "1", "--sides", "reply", "padded", "ours"]
    printed = tiny.run("benchmarks/update.py", *arguments, cwd=tmp_path)
    ratios = re.findall(r"(time|peak memory) of (reply|padded) / ours: (\d+\.\d+)", printed)
    assert [side for _, side, _ in ratios] == ["reply", "reply", "padded", "padded"]
    assert all(float(ratio) > 0 for *_, ratio in ratios)
    assert float(re.search(r"tokens of the samples / distinct ones: (\S+)", printed)[1]) > 1.5
