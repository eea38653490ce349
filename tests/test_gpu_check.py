"""tools/gpu_check.py on CPU: every check passes, and one that fails is told and stops no other."""

import argparse
import json
import os
import re
import sys

import pytest

from tools import gpu_check

FAKE = """
import os, sys
names = sys.argv[sys.argv.index("--worker") + 2 :]
if names[0] == "lora":  # fails on two ranks at once
    print('{"lora": ["FAILED", "ValueError: no"]}\\n{"lora": ["FAILED", "RuntimeError: connection lost"]}', flush=True)
    sys.exit("Traceback of lora")
if names[0] == "resume":  # leaves no process group behind
    print('{"resume": ["ok", "fine"]}', flush=True)
    sys.exit()
print('a word of a library\\n{"packing": ["ok", "fine"]}', flush=True)
os.abort()
"""


def printed(monkeypatch, capsys, *arguments: str) -> tuple[dict[str, tuple[str, str]], str]:
    """Verdict and text by check, as a user sees them; what follows at the end."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    rest = ""
    try:
        gpu_check.main()
    except SystemExit as end:
        rest = str(end.code)
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    return {name: (verdict, text) for name, verdict, text in lines}, rest


def test_all_checks_pass_on_cpu(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    verdicts, rest = printed(monkeypatch, capsys, "--peak-tflops", "0.1")
    assert list(verdicts) == list(gpu_check.CHECKS)
    skipped = {name for name, (verdict, _) in verdicts.items() if verdict == "skipped"}
    optional = {name for name in ("vllm", "qlora", "adamw8bit") if "not installed" in verdicts[name][1]}
    assert skipped == {"machine", "shards", "vllm-2-ranks"} | optional
    assert all(verdict == "ok" for name, (verdict, _) in verdicts.items() if name not in skipped), verdicts
    assert verdicts["machine"][1].startswith("no GPU: ")
    assert re.search(r"tokens/s, .* distinct\), .* GiB at the peak, \d+\.\d% of 0\.1 TFLOPs", verdicts["update"][1])
    assert rest == "" and not list(tmp_path.iterdir())


def test_checks_go_on_after_one_that_fails_or_whose_process_dies(monkeypatch, capsys, tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(gpu_check, "__file__", str(tmp_path / "fake.py"))
    verdicts, rest = printed(monkeypatch, capsys, "--only", "lora", "resume", "packing", "vllm")
    assert verdicts.pop("vllm")[1].startswith("exit status -6 without a word")
    assert verdicts == {"lora": ("FAILED", "ValueError: no"), "resume": ("ok", "fine"), "packing": ("ok", "fine")}
    assert "Traceback of lora" in rest  # a text: exit status 1


def test_a_process_ends_at_a_check_that_fails(monkeypatch, capsys):
    def fail(arguments: argparse.Namespace) -> str:
        raise ValueError("two\nlines")

    monkeypatch.setattr(gpu_check, "init_distributed", lambda config: (0, 1))
    monkeypatch.setattr(gpu_check.gc, "freeze", lambda: None)
    monkeypatch.setattr(gpu_check.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setitem(gpu_check.CHECKS, "lora", fail)
    with pytest.raises(SystemExit, match="1"):
        gpu_check.work(argparse.Namespace(only=["lora", "packing"]))
    out, err = capsys.readouterr()
    assert json.loads(out) == {"lora": ["FAILED", "ValueError: two lines"]} and "Traceback" in err
