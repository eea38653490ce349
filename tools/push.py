"""A checkpoint -> a model on the Hugging Face Hub, with a card made of what its run wrote down.

    export HF_TOKEN=hf_...        # one that may write, of https://huggingface.co/settings/tokens
    python tools/push.py runs/quickstart/checkpoints/latest OWNER/NAME [--private]
    python tools/push.py runs/quickstart/checkpoints/latest OWNER/NAME --dry-run      # prints list and card, no network

One commit: the checkpoint without trainer/, the card (README.md), its picture, and the run's config.yaml, which
evaluate.py needs; paths on this machine that it names can be read there.  The token comes from $HF_TOKEN alone and is
not printed.  $HF_ENDPOINT is honoured.  Running it again is safe: what has arrived is not sent twice.

Guidelines, names and settings are text that models and others wrote: in the card they are code, and nothing in them
is markup.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Read when huggingface_hub is imported: plain HTTP, which every endpoint of the hub's kind speaks and the tests see,
# in place of xet, a protocol of its own with servers of its own. HF_HUB_DISABLE_XET=0 has it back.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from matplotlib.figure import Figure

import config as configuration
from config import ConfigError
from tools import report

CURVES = {"success in training": "rollout/success", "balanced accuracy as judge": "judge/balanced_accuracy"}
LEVELS = "L0 is new games of the kinds trained on, L1 the same in unseen rooms, L2 task types never trained on."


def main() -> None:
    """Upload the checkpoint that the command line names, or print what would be."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("ckpt", help="a run's checkpoint: runs/NAME/checkpoints/latest")
    command.add_argument("repo", metavar="OWNER/NAME", help="made if it is not there")
    command.add_argument("--private", action="store_true", help="seen by its owner alone")
    command.add_argument("--dry-run", action="store_true", help="print what would be uploaded, and the card")
    arguments = command.parse_args()
    folder = Path(arguments.ckpt).resolve()
    run = configuration.run_folder(folder)
    if run is None or not (run / "config.yaml").is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{arguments.ckpt} is not a checkpoint of a run: say runs/NAME/checkpoints/latest")
    if not is_hub_id(arguments.repo):
        raise ConfigError(f"{arguments.repo} is no name on the hub: say OWNER/NAME, of letters, digits, '-', '_', '.'")
    token = os.environ.get("HF_TOKEN", "").strip()
    if not arguments.dry_run and not re.fullmatch("[!-~]+", token):  # an HTTP client quotes what it cannot send
        where = "https://huggingface.co/settings/tokens"
        raise ConfigError(f"no token in $HF_TOKEN: make one that may write at {where}, then export HF_TOKEN=...")
    files = gather(folder, report.read_run(run), arguments.repo)
    for path, content in files.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"{size / 1e6:12.3f} MB  {path}")
    if arguments.dry_run:
        print(f"nothing is uploaded; README.md:\n\n{files['README.md'].decode()}", end="")
    else:
        print(upload(files, arguments.repo, arguments.private, token, f"{run.name}, {folder.name}"))


def is_hub_id(name: str) -> bool:
    """Tell whether a text has the form OWNER/NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def gather(folder: Path, run: report.Run, repo: str) -> dict[str, Path | bytes]:
    """Collect what is uploaded: path in the repository -> file or content."""
    inside = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files: dict[str, Path | bytes] = {name: path for name, path in inside.items() if not name.startswith("trainer/")}
    files["config.yaml"] = run.folder / "config.yaml"
    if picture := draw(run, int(folder.name) if folder.name.isdecimal() else 0):
        files["curves.png"] = picture
    files["README.md"] = card(folder, run, repo, bool(picture)).encode()  # peft leaves one of its own there
    return files


def upload(files: dict[str, Path | bytes], repo: str, private: bool, token: str, message: str) -> str:
    """Upload files in one commit, which deletes another checkpoint's, and return the repository's address.

    Raises ConfigError, without the token in it.
    """
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        there = api.repo_info(repo)
        exposed = private and not there.private
        if not exposed:
            stale = [one.rfilename for one in there.siblings or () if is_stale(one.rfilename, files)]
            changes = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=source) for name, source in files.items()]
            changes += [CommitOperationDelete(path_in_repo=name) for name in stale]
            api.create_commit(repo, changes, commit_message=message)
    except Exception as error:  # HTTP's, xet's and the disk's have no class in common, and a traceback may show a token
        raise ConfigError(explain(error, repo, api.endpoint).replace(token, "$HF_TOKEN")) from None
    if exposed:
        raise ConfigError(f"{repo} is there already, and public: choose another name, or leave --private out")
    return str(url)


def is_stale(name: str, files: Iterable[str]) -> bool:
    """Tell whether a file in the repository is an earlier checkpoint's, whose readers would take it for this one's."""
    ours = ("adapter_*", "*.safetensors*", "curves.png")
    return name not in files and any(fnmatch(name, pattern) for pattern in ours)


def explain(error: Exception, repo: str, endpoint: str) -> str:
    """Say in one line why an upload failed, and what to do."""
    cause = error.__cause__ or error if isinstance(error, RuntimeError) else error  # of one file's upload
    said = " ".join(str(cause).split()) or type(cause).__name__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status == 401:
        return f"{endpoint} does not know the token in $HF_TOKEN (401): make one at {endpoint}/settings/tokens"
    if status == 403:
        return f"the token in $HF_TOKEN may not write to {repo} (403): make one that may, or choose a name of your own"
    if status is not None:
        return f"{endpoint} refused the upload to {repo} ({said}): correct what it names, then run this again"
    return f"could not upload to {repo} at {endpoint} ({said}): check the network and $HF_ENDPOINT, then run this again"


# ----------------------------------------------------------------------------------------------------------------------
# The card


def card(folder: Path, run: report.Run, repo: str, has_picture: bool) -> str:
    """Write the model card of a checkpoint, in Markdown."""
    settings, adapter = run.config, folder / "adapter_config.json"
    adapted = adapter.is_file()
    base = (json.loads(adapter.read_text())["base_model_name_or_path"] if adapted else first_model(run)) or ""
    is_local = not is_hub_id(base) or any((place / base).exists() for place in (Path(), run.folder.parent.parent))
    about = {"library_name": "peft" if adapted else "transformers", "pipeline_tag": "text-generation"}
    about |= {} if is_local else {"base_model": base}
    about["tags"] = ["reinforcement-learning", "agent", settings.get("env.name", "")]
    how = f"was trained by reinforcement learning ({code(settings.get('algo.advantage', ''))})"
    how += " with generative classification disentanglement (GCD)" * (settings.get("judge.enabled") == "true")
    how = "imitates an expert (a cold start)" if folder.name == "final" else how  # train_sft.py calls it so
    where = " (a folder where it was made; nothing on the hub is known to be the same)" * is_local
    name, place = repo.split("/")[1], f"runs/{run.name}/checkpoints/{folder.name}"
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n\n# {repo}",
        f"{'An adapter' if adapted else 'A language model'}, made of {code(base)}{where}, that plays "
        f"{code(settings.get('env.name', ''))} and {how}: {code(place)} of *GCD for agentic RL*, the method of "
        "[arXiv 2509.23870](https://arxiv.org/abs/2509.23870).",
        fenced(loading(folder, repo, base if adapted else ""), "python"),
        "It wants that project's prompts. To evaluate it there:",
        fenced(f"hf download {repo} --local-dir {name}\npython evaluate.py --ckpt {name} --config {name}/config.yaml"),
        f"## Success\n\n{success(run.folder / f'eval_{folder.name}.json', place)}",
        "![learning curves](curves.png)" if has_picture else "",
    ]
    guidelines = folder / "guidelines.json"
    if lines := json.loads(guidelines.read_text(encoding="utf-8")) if guidelines.is_file() else []:
        parts.append("## Guidelines\n\nThey stand in its prompts (`guidelines.json`):")
        parts.append(fenced("\n".join(f"- {' '.join(str(line).split())}" for line in lines)))
    every = fenced((run.folder / "config.yaml").read_text(encoding="utf-8", errors="replace"), "yaml")
    parts.append(f"## How it was made\n\n<details><summary>Every option</summary>\n\n{every}\n\n</details>")
    parts.append(fenced("\n".join(f"{part}: {told}" for part, told in run.machine.items())) if run.machine else "")
    return "\n\n".join(filter(None, parts)) + "\n"


def first_model(run: report.Run) -> str:
    """Find the model that a run began with, or the run that it started from, and so on."""
    for _ in range(9):  # two that were made anew may start from each other
        run = report.read_run(run.start) if run.start else run
    return run.config.get("model.path", "")


def loading(folder: Path, repo: str, base: str) -> str:
    """Write the Python that loads a checkpoint from the hub, onto `base` if it is an adapter."""
    made_by = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
    # the Auto class would split words in Qwen's way wherever config.json says "qwen2": model_files.load_tokenizer()
    own = made_by in ("PreTrainedTokenizerFast", "TokenizersBackend")
    tokenizer = "PreTrainedTokenizerFast" if own else "AutoTokenizer"
    model = f"AutoModelForCausalLM.from_pretrained({base or repo!r})"
    lines = [f"from transformers import AutoModelForCausalLM, {tokenizer}\n"]
    if base:
        lines, model = ["from peft import PeftModel", *lines], f"PeftModel.from_pretrained({model}, {repo!r})"
    return "\n".join([*lines, f"model = {model}", f"tokenizer = {tokenizer}.from_pretrained({repo!r})"])


def success(file: Path, place: str) -> str:
    """Lay out what evaluate.py found of a checkpoint. Raises ConfigError for a file that it did not write."""
    if not file.is_file():
        return f"This checkpoint has not been evaluated; {code(f'python evaluate.py --ckpt {place}')} does it."
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        lines = ["| | success, % | 95 % interval | plays | games |", "|---|---|---|---|---|"]
        for level, result in record["levels"].items():
            mark = " (trained on these types)" * bool(result.get("trained_on"))
            for name, one in [
                (level + mark, result),
                *((f"{level}: {kind}", r) for kind, r in result["types"].items()),
            ]:
                share, low, high = (f"{100 * one[key]:.1f}" for key in ("success", "low", "high"))
                lines.append(f"| {code(name)} | {share} | {low} to {high} | {one['n']:d} | {one['games']:d} |")
        lines.append(f"\n{record['seeds']:d} plays of each game, temperature {record['temperature']:g}. {LEVELS}")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{file} is not what evaluate.py writes: delete it, and evaluate the checkpoint again"
        ) from None
    return "\n".join(lines)


def draw(run: report.Run, iterations: int) -> bytes:
    """Draw a run's curves up to a checkpoint, as PNG; nothing if it has none."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for label, metric in CURVES.items():
        if curve := {at: value for at, value in run.metrics.get(metric, {}).items() if at < iterations}:
            axes.plot(list(curve), list(curve.values()), label=label, marker=".")
    if not axes.lines:
        return b""
    axes.set(xlabel="iteration", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png := io.BytesIO(), dpi=150)
    return png.getvalue()


def fenced(text: str, language: str = "text") -> str:
    """Put text that others wrote into a block of code, where nothing is markup and nothing in it ends the block."""
    shown = "".join(one if one == "\n" or one.isprintable() else "\ufffd" for one in text).rstrip("\n")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}{language}\n{shown}\n{fence}"


def code(text: str) -> str:
    """Put a name that others chose into a line, as code, without what could end that or a table's cell."""
    return "`" + (re.sub(r"[^\w.,/:+=() -]", "?", text, flags=re.ASCII) or "?") + "`"


if __name__ == "__main__":
    configuration.fail_clearly(main)
