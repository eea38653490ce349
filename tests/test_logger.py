"""logger.py: what is said of a phase: that it begins, how much GPU memory it took, what to do where that ran out."""

import re

import tiny
import torch

import config as configuration
from checkpoint import FREE_TO_CHANGE
from logger import OOM_HINTS, PhaseTimer


def test_every_phase_has_a_hint_that_names_options():
    phases = re.findall(r'timer\("(\w+)"\)', (tiny.ROOT / "train_rl.py").read_text())
    assert len(phases) > 5 and {*phases, "sleep"} <= set(OOM_HINTS)
    options = {key for key, _, _ in configuration.options(configuration.Config())}
    for hint in OOM_HINTS.values():
        named = set(re.findall(r"\w+\.\w+", hint))
        assert named and named <= options and named <= FREE_TO_CHANGE  # a run that died of it goes on with the cure


def test_peak_memory_is_without_the_engines_pools(monkeypatch):
    """Torch counts what vLLM's allocator has given to its sleeping engine."""
    segments = [((0, 0), 5), ((1, 0), 2), ((0, 7), 1)]
    found = [{"segment_pool_id": pool, "allocated_size": gib * 2**30} for pool, gib in segments]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda include_traces: found)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 9 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    timer = PhaseTimer()
    with timer("collect"):
        pass
    assert timer.metrics([])["mem/peak_gib"] == 6


def test_a_first_iteration_says_what_begins(capsys):
    tiny.join()
    for aloud in (True, False):
        with PhaseTimer(aloud)("collect"):
            said = capsys.readouterr().err  # before the phase is over: one that hangs is named
        assert tiny.announced(said) == ["collect"] if aloud else said == ""
