"""Recorded runs, replayed: the same numbers to the last digit (tests/golden.py has more of them)."""

import json

import golden
import pytest

REPLAYED = ("sft", "gigpo_gcd", "ppo_2", "sft_rlvmr", "rlvmr_gcd_2", "sft_scienceworld")
RECORDED = json.loads(golden.RECORD.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


@pytest.mark.skipif(
    golden.processor() != RECORDED["processor"], reason=f"the last digits are those of {RECORDED['processor']}"
)
@pytest.mark.parametrize("name", REPLAYED)
def test_a_recorded_run_gives_the_same_numbers(name, folder):
    assert golden.differences(golden.replay(name, folder), RECORDED["cases"][name]) == []


def test_every_case_is_recorded():
    assert set(RECORDED["cases"]) == set(golden.CASES) >= set(REPLAYED)
    for record in RECORDED["cases"].values():
        assert len(record["metrics"]) >= 1 and all(len(line) > 4 for line in record["metrics"])


def test_a_difference_is_told():
    found = {"weights": "a", "said": "b", "metrics": [{"x": 1.0, "y": 2.0}]}
    expected = {"weights": "a", "said": "c", "metrics": [{"x": 1.0, "y": 2.0000000001}]}
    assert golden.differences(found, found) == []
    assert golden.differences(found, expected) == ["said: b, not c", "line 0, y: 2.0, not 2.0000000001"]
