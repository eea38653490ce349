"""Model folders and adapters as people have them: read whole, or refused in one line before anything runs."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import model
from checkpoint import rehearse_save, save_model
from config import Config, ConfigError
from model import all_logprobs, as_reference, load_model, load_reference
from model_files import check_model_folder, fingerprint
from packing import Sample


@pytest.fixture
def folder(small_games, tmp_path) -> Path:
    """A whole model's folder, to be spoiled."""
    return tiny.copy(tiny.checkpoint(small_games), tmp_path / "given")


def settings(*overrides: str) -> Config:
    return tiny.changed(Config(), "device=cpu", *overrides)


def change_json(file: Path, **fields) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | fields))


def change_weights(folder: Path, change) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def logprobs(loaded) -> np.ndarray:
    rng = np.random.default_rng(0)
    samples = [Sample(rng.integers(3, 300, 20), rng.integers(3, 300, 30)) for _ in range(3)]
    return np.concatenate(all_logprobs(loaded, samples, 1000, 1.0))


# ---- Model folders

SPOILED = {
    "other names": (
        lambda at: change_weights(at, lambda w: {f"module.{k}": v for k, v in w.items()}),
        r"lacks .* of its model's weights, which would be random; it has module",
    ),
    "a head that is not there": (
        lambda at: change_json(at / "config.json", tie_word_embeddings=False),
        r"lacks lm_head.weight .*tie_word_embeddings in config.json wrong\?",
    ),
    "a head of its own that is said to be tied": (
        lambda at: change_weights(
            at, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] + 0.02 * torch.randn(1)}
        ),
        "has an lm_head of its own, and its config.json says tie_word_embeddings=true",
    ),
    "one weight too few": (
        lambda at: change_weights(at, lambda w: {k: v for k, v in w.items() if "norm" not in k}),
        "which would be random",
    ),
    "one weight too many": (
        lambda at: change_weights(at, lambda w: w | {"value_head.weight": torch.zeros(1, 64)}),
        "weights that its model does not read: value_head.weight",
    ),
    "another shape": (lambda at: change_json(at / "config.json", intermediate_size=256), "no model at"),
    "not a number": (
        lambda at: change_weights(at, lambda w: w | {"model.norm.weight": w["model.norm.weight"] * torch.nan}),
        "model.norm.weight has values that are not finite",
    ),
    "a torn file": (
        lambda at: (at / "model.safetensors").write_bytes((at / "model.safetensors").read_bytes()[:-1000]),
        r"model.safetensors is not a file of weights, or a part of one: load it anew",
    ),
    "a pointer": (
        lambda at: (at / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is a Git LFS pointer: run `git lfs pull`",
    ),
    "a shard that is missing": (
        lambda at: (
            (at / "model.safetensors").rename(at / "model-00001-of-00002.safetensors"),
            (at / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002.safetensors"}})
            ),
        ),
        "is not a whole model: it has no model-00002.safetensors",
    ),
    "no weights": (lambda at: (at / "model.safetensors").rename(at / "pytorch_model.bin"), r"no \*.safetensors"),
    "no template": (lambda at: (at / "chat_template.jinja").unlink(), "no chat template.*model.chat_template=FILE"),
    "few positions": (
        lambda at: change_json(at / "config.json", max_position_embeddings=512),
        "knows 512 positions, rollout.max_prompt_tokens=2048 and rollout.max_response_tokens=512 make more",
    ),
    "4 bits": (
        lambda at: change_json(at / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        r"has quantised weights \(bitsandbytes\), which cannot be trained",
    ),
    "no architecture": (
        lambda at: change_json(at / "config.json", architectures=["NoSuchForCausalLM"]),
        "no causal language model that transformers knows: .*NoSuchForCausalLM",
    ),
    "an encoder": (
        lambda at: change_json(at / "config.json", model_type="bert", architectures=["BertForMaskedLM"]),
        "no causal language model",
    ),
    "an unknown kind": (lambda at: change_json(at / "config.json", model_type="nosuch"), "no model at .*nosuch"),
    "wrong sizes": (lambda at: change_json(at / "config.json", num_attention_heads="many"), "config.json|no model at"),
    "a config that is none": (lambda at: (at / "config.json").write_text("{"), "no model at"),
    "a tokenizer that is none": (lambda at: (at / "tokenizer.json").write_text("{}"), "tokenizer cannot be loaded"),
    "a smaller embedding": (
        lambda at: (
            change_json(at / "config.json", vocab_size=200),
            change_weights(at, lambda w: w | {"model.embed_tokens.weight": w["model.embed_tokens.weight"][:200]}),
        ),
        "the chat format has token .*, the model's embedding only 200 rows",
    ),
    "how to sample, nonsense": (
        lambda at: change_json(at / "generation_config.json", early_stopping="sometimes"),
        "generation_config.json: .*; correct or delete it",
    ),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_folder_that_is_not_whole_is_one_line(folder, kind):
    spoil, message = SPOILED[kind]
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(settings(f"model.path={folder}"))
    assert "\n" not in str(caught.value) and "given" in str(caught.value)


@pytest.mark.parametrize("kind", sorted(SPOILED.keys() - {"other names", "one weight too few", "one weight too many"}))
def test_most_of_it_is_told_before_weights_are_loaded(folder, kind, monkeypatch):
    late = ("a head that is not there", "a head of its own that is said to be tied", "another shape", "not a number")
    SPOILED[kind][0](folder)
    monkeypatch.setattr(model, "read_weights", lambda *_: pytest.fail("weights were read"))
    if kind in late:
        check_model_folder(settings(f"model.path={folder}"))
    else:
        with pytest.raises(ConfigError):
            check_model_folder(settings(f"model.path={folder}"))


def test_what_many_published_folders_have(folder, tmp_path):
    """A greedy generation config with a temperature, no pad token, several ids that end a turn: it trains and saves."""
    change_json(folder / "generation_config.json", do_sample=False, temperature=0.6, top_p=0.9, eos_token_id=[2, 0])
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    fields.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    loaded = load_model(settings(f"model.path={folder}"))
    assert loaded.chat.ends == {0, 2} and loaded.chat.tokenizer.pad_token_id is None
    tiny.join()
    rehearse_save(loaded, tmp_path)
    save_model(loaded, tmp_path / "saved")
    again = load_model(settings(f"model.path={tmp_path / 'saved'}"))
    assert again.chat.ends == {0, 2}
    np.testing.assert_array_equal(logprobs(again), logprobs(loaded))


def test_a_template_of_ones_own_travels_with_the_checkpoint(folder, tmp_path):
    (folder / "chat_template.jinja").unlink()
    own = f"model.chat_template={tiny.ROOT / 'assets' / 'plain_chat.jinja'}"
    loaded = load_model(settings(f"model.path={folder}", own))
    save_model(loaded, tmp_path / "saved")
    again = load_model(settings(f"model.path={tmp_path / 'saved'}"))
    assert again.chat.encode("look") == loaded.chat.encode("look")
    assert "User:\nlook\n\nAssistant:\n" in again.chat.tokenizer.decode(again.chat.encode("look"))
    with pytest.raises(ConfigError, match=r"model.chat_template=nosuch.jinja does not exist"):
        check_model_folder(settings(f"model.path={folder}", "model.chat_template=nosuch.jinja"))


def test_near_misses(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "one"
    tiny.copy(folder, run / "checkpoints" / "000003")
    (run / "checkpoints" / "latest").symlink_to("000003")
    tiny.copy(folder, tmp_path / "hub" / "snapshots" / "0a1b")
    for path, meant in {
        "runs/one": "runs/one/checkpoints/latest",
        "runs/one/checkpoints": "runs/one/checkpoints/latest",
        "runs/one/checkpoints/000009": "runs/one/checkpoints/latest",
        "./hub": "hub/snapshots/0a1b",
    }.items():
        with pytest.raises(ConfigError, match=rf"did you mean {meant}\?"):
            check_model_folder(settings(f"model.path={path}"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELS", str(tmp_path / "hub"))
    for path in ("~/given", "$MODELS/snapshots/0a1b", "${MODELS}/snapshots/0a1b"):
        check_model_folder(settings(f"model.path={path}"))
    with pytest.raises(ConfigError, match=r"model.path=\$NOSUCH/x: \$NOSUCH is not set"):
        settings("model.path=$NOSUCH/x")
    with pytest.raises(ConfigError, match=rf"no model at runs/two: the folder does not exist in {tmp_path}"):
        check_model_folder(settings("model.path=runs/two"))


def test_a_fingerprint_is_of_what_lies_there(folder, tmp_path):
    moved = tiny.copy(folder, tmp_path / "elsewhere")
    assert fingerprint(str(moved)) == fingerprint(str(folder)) != ""
    change_weights(moved, lambda w: w | {"model.norm.weight": w["model.norm.weight"] + 1})
    assert fingerprint(str(moved)) != fingerprint(str(folder)) and fingerprint("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"


# ---- Adapters

LORA = dict(target_modules="all-linear", task_type="CAUSAL_LM")
KEPT = {
    "rank and alpha": dict(r=4, lora_alpha=6, **LORA),
    "rsLoRA": dict(r=16, lora_alpha=8, use_rslora=True, **LORA),
    "patterns": dict(r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}, **LORA),
    "q and v": dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "the first layer": dict(r=4, layers_to_transform=[0], target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    "dropout": dict(r=4, lora_dropout=0.3, **LORA),
}
REFUSED = {
    "DoRA": (LoraConfig(use_dora=True, **LORA), "use_dora=True"),
    "a head of its own": (LoraConfig(modules_to_save=["lm_head"], **LORA), "modules_to_save="),
    "biases": (LoraConfig(bias="all", **LORA), "bias=all"),
    "IA3": (IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"), "of the kind IA3"),
    "the tied head": (LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"), "which is the embedding at once"),
    "the embedding": (LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM"), "merge it into its base"),
}


def make_adapter(base: Path, made, to: Path) -> Path:
    """Save an adapter with random weights of some size, as plain peft does: without a tokenizer."""
    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), made)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name or "ia3_" in name or "modules_to_save" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    adapted.save_pretrained(to)
    return to


@pytest.mark.parametrize("kind", KEPT)
def test_an_adapter_is_what_peft_says_it_is(folder, tmp_path, kind):
    """Loaded, given to an engine, saved and loaded again, merged; and it is its own reference at the start."""
    adapter = make_adapter(folder, LoraConfig(**KEPT[kind]), tmp_path / "adapter")
    config = settings(f"model.path={adapter}", "model.tune=lora")
    loaded = load_model(config)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(ids).logits
        found = loaded.model(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert (AutoModelForCausalLM.from_pretrained(folder)(ids).logits - expected).abs().max() > 0.1
    engine = AutoModelForCausalLM.from_pretrained(folder)
    engine.load_state_dict(dict(model.named_weights(loaded)))
    with torch.no_grad():
        torch.testing.assert_close(engine(ids).logits, expected, atol=1e-4, rtol=0)
    reference = load_reference(config, loaded)
    with as_reference(reference, loaded) as initial:
        np.testing.assert_allclose(logprobs(initial), logprobs(loaded), atol=1e-6)
    save_model(loaded, tmp_path / "saved")
    again = load_model(tiny.changed(config, f"model.path={tmp_path / 'saved'}"))
    np.testing.assert_allclose(logprobs(again), logprobs(loaded), atol=1e-6)
    given, kept = (json.loads((at / "adapter_config.json").read_text()) for at in (adapter, tmp_path / "saved"))
    for key in "r lora_alpha use_rslora rank_pattern alpha_pattern lora_dropout layers_to_transform".split():
        assert given[key] == kept[key], key
    assert sorted(given["target_modules"]) == sorted(kept["target_modules"])
    merged = load_model(tiny.changed(config, "model.tune=full"))
    np.testing.assert_allclose(logprobs(merged), logprobs(loaded), atol=1e-4)
    assert all(weight.requires_grad for weight in merged.model.parameters())


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_cannot_be_kept_is_named(folder, tmp_path, kind):
    made, message = REFUSED[kind]
    adapter = make_adapter(folder, made, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(settings(f"model.path={adapter}", "model.tune=lora"))
    assert "\n" not in str(caught.value) and "peft" in str(caught.value)


@pytest.mark.parametrize("kind", ["DoRA", "IA3", "biases"])
def test_other_kinds_can_become_part_of_the_weights(folder, tmp_path, kind):
    adapter = make_adapter(folder, REFUSED[kind][0], tmp_path / "adapter")
    merged = load_model(settings(f"model.path={adapter}", "model.tune=full"))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(merged.model(ids).logits, plain(ids).logits, atol=1e-4, rtol=0)
    assert all(weight.requires_grad for weight in merged.model.parameters())


def test_what_cannot_be_merged(folder, tmp_path):
    made = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    adapter = make_adapter(folder, made, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="of the kind PREFIX_TUNING, which is no change of weights"):
        load_model(settings(f"model.path={adapter}", "model.tune=full"))


def test_the_base_of_an_adapter(folder, tmp_path, monkeypatch):
    """Written relative to a project that can be moved; model.base where it is elsewhere."""
    monkeypatch.chdir(tmp_path)
    config = settings("model.path=given", "model.tune=lora")
    loaded = load_model(config)
    save_model(loaded, Path("runs/lora/checkpoints/000001"))
    said = json.loads(Path("runs/lora/checkpoints/000001/adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "given"
    project = tmp_path / "moved"
    project.mkdir()
    for name in ("given", "runs"):
        shutil.move(tmp_path / name, project / name)
    monkeypatch.chdir(project)
    np.testing.assert_array_equal(
        logprobs(load_model(tiny.changed(config, "model.path=runs/lora/checkpoints/000001"))), logprobs(loaded)
    )
    os.rename("given", "given2")
    path = "model.path=runs/lora/checkpoints/000001"
    with pytest.raises(ConfigError, match=r"is an adapter of 'given': .*model.base=FOLDER says where it is"):
        load_model(tiny.changed(config, path))
    again = load_model(tiny.changed(config, path, "model.base=given2"))
    np.testing.assert_array_equal(logprobs(again), logprobs(loaded))
    with pytest.raises(ConfigError, match="model.base=given2 is for adapters, and given2 is a whole model"):
        check_model_folder(settings("model.path=given2", "model.base=given2"))


def test_an_adapter_of_another_model(folder, tmp_path):
    adapter = make_adapter(folder, LoraConfig(r=4, **LORA), tmp_path / "adapter")
    other = str(tiny.ROOT / "assets" / "base")
    with pytest.raises(ConfigError, match=r"the adapter .* does not fit .*assets/base"):
        load_model(settings(f"model.path={adapter}", "model.tune=lora", f"model.base={other}"))
    change_json(adapter / "adapter_config.json", shiny="yes", dull=None)
    with pytest.raises(ConfigError, match="has shiny=yes, which this version of peft does not know"):
        load_model(settings(f"model.path={adapter}", "model.tune=lora"))
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an adapter of the kind None"):
        load_model(settings(f"model.path={adapter}", "model.tune=lora"))
