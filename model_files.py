"""What lies in a model's folder, read and checked before any weights are: whole or refused, in one line.

check_model_folder(config)                  what would stop a run later stops it here, in seconds
is_adapter(path), base_of(path, config)     an adapter's folder, and the whole model under it
load_tokenizer(path, config)                exactly as tokenizer.json says; load_chat: the chat format with it
fingerprint(path)                           the same for the same weights, wherever they lie
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from chat import ChatFormat
from config import Config, ConfigError

PROBE = "Your task is to: put two soapbar in cabinet 12.\n<think>Need it.</think><action>go to toilet 1</action>"
KEPT = {  # LoRA options of an adapter that training keeps as they come: its layers, sizes and scales
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    *("task_type", "peft_type", "peft_version", "auto_mapping", "inference_mode", "revision"),
    *("base_model_name_or_path", "runtime_config", "qalora_group_size", "ensure_weight_tying"),
}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
LFS_POINTER = b"version https://git-lfs"


def check_model_folder(config: Config, path: str = "", samples: bool = True) -> None:
    """Check all that can be told of a model (default: config.model.path) without its weights. Raises ConfigError.

    `samples`: whether rollouts will sample from it, whose limits have to fit.
    """
    path = path or config.model.path
    check_path(path)
    if is_adapter(path):
        check_adapter(path, config)
    elif config.model.base and path == config.model.path and fingerprint(config.model.base) != fingerprint(path):
        # not of a checkpoint: one of all weights that a run made of an adapter needs no base, and base_of() takes none
        raise ConfigError(
            f"model.base={config.model.base} is for adapters, and {path} is a whole model, and another one: leave "
            "model.base empty"
        )
    base = base_of(path, config)
    try:
        shape = AutoConfig.from_pretrained(base)
    except Exception as error:  # of many classes, for instance by a field of another type
        raise ConfigError(f"no model at {base}: {one_line(error)}") from None
    check_architecture(base, shape, "base" if is_adapter(path) else "path")
    if samples:
        check_length(base, shape, config)
    chat = load_chat(path, config)
    rows = shape.get_text_config().vocab_size
    if (largest := max(*chat.encode(PROBE), *chat.encode_reply(PROBE))) >= rows:
        raise ConfigError(f"{path}: the chat format has token {largest}, the model's embedding only {rows} rows")
    check_generation_config(base)
    check_weight_files(base)


def check_path(path: str) -> None:
    """Check that a model's folder is there, and has what every one has. Raises ConfigError; a hub id passes."""
    folder = Path(path)
    if not folder.is_dir():
        if path.count("/") != 1 or path.startswith((".", "/", "runs/", "assets/")):
            what = "is a file, not a folder" if folder.exists() else "the folder does not exist"
            where = "" if folder.is_absolute() else f" in {Path.cwd()}"
            raise ConfigError(f"no model at {path}: {what}{where}, and it is not a hub id either{near_miss(folder)}")
        return
    if is_adapter(path):
        weights = folder / "adapter_model.safetensors"
        if not weights.is_file():
            cure = ": save it with safe_serialization=True" if weights.with_suffix(".bin").is_file() else ""
            raise ConfigError(f"{path} is not a whole adapter: it has no {weights.name}{cure}")
        check_weight_file(weights)
        return
    for needed in ("config.json", "tokenizer.json"):
        if not (folder / needed).is_file():
            raise ConfigError(f"{path} is not a model folder: it has no {needed}{near_miss(folder)}")
    if not any(folder.glob("*.safetensors")):
        cure = ": save it with safe_serialization=True" if any(folder.glob("*.bin")) else near_miss(folder)
        raise ConfigError(f"{path} is not a model folder: it has no *.safetensors weights{cure}")


def near_miss(folder: Path) -> str:
    """Return the end of an error about a folder that is no model: the one that was meant, if it lies near."""

    def is_model(one: Path) -> bool:
        return any((one / name).is_file() for name in ("config.json", "adapter_config.json"))

    latest = [run / "checkpoints" / "latest" for run in (folder, folder.parent, folder.parent.parent)]
    inside = sorted(folder.glob("*/"), key=lambda one: one.stat().st_mtime, reverse=True) if folder.is_dir() else []
    hub_cache = folder.glob("snapshots/*/")  # models--owner--name, as the hub's client stores it
    found = next((one for one in (*latest, *hub_cache, *inside) if is_model(one)), None)
    return f"; did you mean {found}?" if found else ""


def check_architecture(base: str, shape: Any, option: str) -> None:
    """Check that a config.json describes a causal language model that is not quantised. Raises ConfigError.

    `option`: which one of config.model names the model.
    """
    wanted = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(shape.model_type)
    said = shape.architectures or ([wanted] if isinstance(wanted, str) else [])
    if wanted is None or wanted not in said:
        raise ConfigError(
            f"{base} is no causal language model that transformers knows: its config.json says model_type="
            f"{shape.model_type}, architectures={shape.architectures}"
        )
    if quantised := getattr(shape, "quantization_config", None):
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ConfigError(
            f"{base} has quantised weights ({kind or 'quantization_config'}), which cannot be trained: set model."
            f"{option} to the model that they were made of (model.tune=qlora makes 4 bits of it by itself)"
        )
    try:
        with torch.device("meta"):  # of its shapes alone
            AutoModelForCausalLM.from_config(shape)
    except Exception as error:  # whatever a wrong number leads to
        raise ConfigError(f"{base}: config.json does not describe a model ({one_line(error)})") from None


def known_positions(shape: Any) -> float:
    """Return how many tokens a model can tell apart by their place, by its config."""
    text = shape.get_text_config()
    known, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
    if known and isinstance(rope.get("factor"), int | float) and rope.get("original_max_position_embeddings"):
        known = max(known, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return known or math.inf


def check_length(base: str, shape: Any, config: Config) -> None:
    """Check that the longest prompt and its reply fit the positions that the model knows. Raises ConfigError."""
    known = known_positions(shape)
    for section in ("rollout", "judge") if config.judge.enabled else ("rollout",):
        limits = getattr(config, section)
        if limits.max_prompt_tokens + limits.max_response_tokens > known:
            raise ConfigError(
                f"{base} knows {known} positions, {section}.max_prompt_tokens={limits.max_prompt_tokens} and "
                f"{section}.max_response_tokens={limits.max_response_tokens} make more: lower them"
            )


def check_generation_config(base: str) -> None:
    """Check a model's generation_config.json, if it has one. Raises ConfigError for one that cannot be saved again."""
    try:
        found = GenerationConfig.from_pretrained(base)
    except (OSError, ValueError, TypeError) as error:
        if Path(base).is_dir() and (Path(base) / "generation_config.json").exists():
            raise ConfigError(f"{base}/generation_config.json: {one_line(error)}; correct or delete it") from None
        return
    valid_generation_config(found, base)


def valid_generation_config(found: GenerationConfig, base: str) -> GenerationConfig:
    """Make a generation config one that can be saved: if it says how to sample, it samples. Raises ConfigError for
    whatever else transformers reads and refuses to write.

    Many published ones have a temperature, or any of SAMPLING, and do_sample=false. What is sampled here hangs on
    nothing in it but the ids that end a turn.
    """
    if not found.do_sample:
        found.do_sample = any(getattr(found, key, None) is not None for key in SAMPLING)
    try:
        found.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{base}/generation_config.json: {one_line(error)}; correct or delete it") from None
    return found


def check_weight_files(base: str) -> None:
    """Check that every file of weights is there and whole, by its header. Raises ConfigError; a hub id passes."""
    folder = Path(base)
    if not folder.is_dir():
        return
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / "model.safetensors").is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise ConfigError(f"{index} cannot be read: load the model's files anew") from None
    for name in names:
        check_weight_file(folder / name)


def check_weight_file(file: Path) -> None:
    """Check one file of weights, by its header. Raises ConfigError."""
    if not file.is_file():
        raise ConfigError(f"{file.parent} is not a whole model: it has no {file.name}")
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        with file.open("rb") as opened:
            pointer = opened.read(len(LFS_POINTER)) == LFS_POINTER
        cure = "it is a Git LFS pointer: run `git lfs pull`" if pointer else f"load it anew ({one_line(error)})"
        raise ConfigError(f"{file} is not a file of weights, or a part of one: {cure}") from None


def fingerprint(path: str) -> str:
    """Make a short text of a model that is the same wherever it lies: of each weight file's size and some of its bytes.

    A hub id stands for itself.
    """
    digest = hashlib.sha256()
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            for part in range(64):  # all of a small file, and about a megabyte of any other
                opened.seek(size * part // 64)
                digest.update(opened.read(min(2**14, size // 64 + 1)))
    return digest.hexdigest()[:16] if files else path


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


def is_adapter(path: str) -> bool:
    """Tell whether a folder holds an adapter, as peft saves it, and not a whole model."""
    return (Path(path) / "adapter_config.json").is_file()


def adapter_config(path: str) -> PeftConfig:
    """Read an adapter's own config. Raises ConfigError."""
    try:
        return PeftConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}/adapter_config.json cannot be read: {one_line(error)}") from None


def check_adapter(path: str, config: Config) -> None:
    """Check that what an adapter is can be trained, synced and saved, or with model.tune=full merged. Raises
    ConfigError that names what cannot, and the cure."""
    made = adapter_config(path)
    said = json.loads((Path(path) / "adapter_config.json").read_text())
    if newer := [key for key, value in said.items() if value and not hasattr(made, key)]:
        raise ConfigError(
            f"{path} has {newer[0]}={said[newer[0]]}, which this version of peft does not know: upgrade it"
        )
    kind = str(getattr(made.peft_type, "value", made.peft_type))
    merge = "merge it into its base with peft first (merge_and_unload, save_pretrained)"
    if isinstance(made, LoraConfig) and made.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise ConfigError(f"{path} began as init_lora_weights={made.init_lora_weights}, of a changed base: {merge}")
    if getattr(made, "is_prompt_learning", False) or made.peft_type is None:
        raise ConfigError(f"{path} is an adapter of the kind {kind}, which is no change of weights: it cannot be kept")
    if config.model.tune == "full":
        return
    if not isinstance(made, LoraConfig) or kind != "LORA":
        raise ConfigError(f"{path} is an adapter of the kind {kind}, model.tune={config.model.tune} is LoRA: {merge}")
    for one in fields(made):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        value = getattr(made, one.name)
        if one.name not in KEPT and value != default and value not in (None, [], {}):
            raise ConfigError(
                f"{path} is LoRA with {one.name}={value}, which model.tune={config.model.tune} cannot keep: {merge}, "
                "or set model.tune=full"
            )


def base_of(path: str, config: Config) -> str:
    """Find the folder or hub id of the whole model that `path` is, or is an adapter of (model.base, else what it says).

    Folders are resolved, for `latest` will point elsewhere. Raises ConfigError where it is gone.
    """
    base = path
    if is_adapter(path):
        base = config.model.base or adapter_config(path).base_model_name_or_path or ""
        try:
            check_path(base)
        except ConfigError as error:
            where = "model.base=FOLDER says where it is"
            raise ConfigError(f"{path} is an adapter of {base!r}: {error}; {where}") from None
        if is_adapter(base):
            raise ConfigError(f"{path} is an adapter of {base}, which is one itself: merge that with peft first")
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def place_in_project(base: str) -> str:
    """Write a folder below the working directory relative to it, so that a project can be moved with its adapters."""
    folder = Path(base)
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else base


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def load_chat(path: str, config: Config, more_ends: Iterable[int] = ()) -> ChatFormat:
    """Make the chat format of a model, from its tokenizer and config.model. Raises ConfigError."""
    tokenizer = load_tokenizer(path, config)
    try:
        return ChatFormat(tokenizer, config.model.thinking, more_ends)
    except ConfigError as error:
        own = f"model.chat_template={config.model.chat_template}: " if config.model.chat_template else ""
        raise ConfigError(f"{own}{error}") from None


def load_tokenizer(path: str, config: Config) -> Any:
    """Load the tokenizer of a model, or of an adapter's base where it lies beside that alone, exactly as tokenizer.json
    describes it, with model.chat_template if that is set.

    transformers' AutoTokenizer silently replaces a custom pre-tokenizer by Qwen's wherever config.json says "qwen2", so
    folders that name the generic class are read by it, and every folder is checked against the `tokenizers` library.
    """
    if is_adapter(path) and not (Path(path) / "tokenizer.json").is_file():
        path = base_of(path, config)
    folder = Path(path)
    try:
        own = False
        if (folder / "tokenizer_config.json").is_file():
            tokenizer_class = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class")
            own = tokenizer_class in ("PreTrainedTokenizerFast", "TokenizersBackend")
        tokenizer = (PreTrainedTokenizerFast if own else AutoTokenizer).from_pretrained(path)
        if folder.is_dir():
            expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROBE, add_special_tokens=False).ids
    except Exception as error:  # the tokenizers library raises no other class
        raise ConfigError(f"{path}: its tokenizer cannot be loaded ({one_line(error)})") from None
    if folder.is_dir() and (found := tokenizer(PROBE, add_special_tokens=False)["input_ids"]) != expected:
        raise ConfigError(
            f"{path}: transformers reads the tokenizer as {len(found)} tokens, tokenizer.json as {len(expected)}, for "
            "the same text; the model would see garbage"
        )
    if config.model.chat_template:
        file = Path(config.model.chat_template)
        if not file.is_file():
            raise ConfigError(f"model.chat_template={file} does not exist; it is a file in Jinja")
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"model.chat_template={file} is no text in UTF-8 ({one_line(error)})") from None
    return tokenizer


def one_line(error: BaseException) -> str:
    """Write an error of a library's as one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
