"""The benchmarks that train, in small."""

import re

import tiny


def test_gcd_overhead_prints_a_ratio(small_games, tmp_path):
    settings = "rollout.engine=transformers rollout.groups=2".split()
    arguments = [tiny.rl_yaml(small_games, tmp_path), "--iterations", "1", "--repeats", "1", "--set", *settings]
    printed = tiny.run("benchmarks/gcd_overhead.py", *arguments, cwd=tmp_path)
    assert re.search(r"with GCD / without: \d\.\d+ \[.* update on \d+ critiques beside \d+ actions", printed)
    assert not list((tmp_path / "runs").iterdir())
