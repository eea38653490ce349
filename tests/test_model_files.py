"""Model folders and adapters as people have them: read whole, or refused in one line before anything runs."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import baselines
import model
from checkpoint import rehearse_save, save_model
from config import Config, ConfigError
from model import all_logprobs, as_reference, load_model, load_reference
from model_files import check_model_folder, fingerprint
from packing import Sample, lay_out


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
    "no weights": (
        lambda at: (at / "model.safetensors").rename(at / "pytorch_model.bin"),
        r"no \*.safetensors weights: save it with safe_serialization=True",
    ),
    "no template": (lambda at: (at / "chat_template.jinja").unlink(), "no chat template.*model.chat_template=FILE"),
    "4 bits": (
        lambda at: change_json(at / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        r"has quantised weights \(bitsandbytes\), which cannot be trained: set model.path to the model",
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


def test_limits_of_rollouts_fit_a_model_that_is_sampled(folder):
    """A cold start's rows are as long as they are (test_own_data.py)."""
    change_json(folder / "config.json", max_position_embeddings=512)
    config = settings(f"model.path={folder}")
    message = "knows 512 positions, rollout.max_prompt_tokens=2048 and rollout.max_response_tokens=512 make more"
    with pytest.raises(ConfigError, match=message):
        check_model_folder(config)
    with pytest.raises(ConfigError, match=message):
        load_model(config, train=False)
    check_model_folder(config, samples=False)
    assert load_model(config).inner.config.max_position_embeddings == 512


@pytest.mark.parametrize(
    "said",
    [{"top_k": 9}, {"min_p": 0.05}, {"typical_p": 0.9}, {"top_h": 0.4}, {"epsilon_cutoff": 0.01}, {"eta_cutoff": 0.01}],
)
def test_whatever_a_generation_config_says_of_sampling_can_be_saved(folder, tmp_path, said):
    change_json(folder / "generation_config.json", do_sample=False, **said)
    loaded = load_model(settings(f"model.path={folder}"))
    save_model(loaded, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["do_sample"] and said.items() <= saved.items()


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{{ messages }} \u00e9".encode("latin-1"), r"own.jinja is no text in UTF-8"),
        (b"\x89PNG\r\n\x1a\n\xff\x00", r"own.jinja is no text in UTF-8"),
        (b"{% for m in messages %}\n{{ m.content }}", r"own.jinja: the chat template of .* cannot show these messages"),
        (b"{{ messages }\n\n", r"own.jinja: the chat template of .* cannot show these messages"),
        (b"User:", r"own.jinja: the chat template of .* does not show what the user says"),
    ],
)
def test_a_file_that_is_no_template_is_named(folder, tmp_path, content, message):
    own = tmp_path / "own.jinja"
    own.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"model.chat_template={tmp_path}/{message}") as caught:
        check_model_folder(settings(f"model.path={folder}", f"model.chat_template={own}"))
    assert "\n" not in str(caught.value)


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
}
HEAD = dict(target_modules=["lm_head"], task_type="CAUSAL_LM")
EMBEDDING = dict(target_modules=["embed_tokens"], task_type="CAUSAL_LM")
Q = dict(target_modules=["q_proj"], task_type="CAUSAL_LM")
OF_TIED_ENDS = {
    "LoRA on the head": LoraConfig(**HEAD),
    "LoRA on the embedding": LoraConfig(**EMBEDDING),
    "IA3 on the head": IA3Config(feedforward_modules=[], **HEAD),
    "another head": LoraConfig(modules_to_save=["lm_head"], **Q),
    "another embedding": LoraConfig(modules_to_save=["embed_tokens"], **Q),
    "both, apart": LoraConfig(modules_to_save=["lm_head", "embed_tokens"], **Q),
}
STAYS_TIED = {
    "some tokens": LoraConfig(trainable_token_indices=[5, 6, 7], **Q),
    "tokens alone": TrainableTokensConfig(token_indices=[5, 6, 7], task_type="CAUSAL_LM"),
    "both as one": LoraConfig(modules_to_save=["embed_tokens"], ensure_weight_tying=True, **Q),
}


def make_adapter(base: Path, made, to: Path, **saving) -> Path:
    """Save an adapter with random weights of some size, as plain peft does: without a tokenizer."""
    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), made)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if any(part in name for part in ("lora_", "ia3_", "modules_to_save", "trainable_tokens_delta")):
                weight.add_(0.1 * torch.randn_like(weight))
            elif saving and "embed_tokens" in name:  # resized or trained by hand, as some scripts do
                weight.add_(0.1 * torch.randn_like(weight))
    adapted.save_pretrained(to, **saving)
    return to


def untied(base: Path, to: Path) -> Path:
    """Copy a model's folder, with a head of its own, which is a copy of the embedding."""
    tiny.copy(base, to)
    change_json(to / "config.json", tie_word_embeddings=False)
    change_weights(to, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    return to


def logits_of(module) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))).logits


def logits_by_peft(base: Path, adapter: Path) -> torch.Tensor:
    return logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval())


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


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_critic_begins_as_an_adapters_model(folder, tmp_path, tune):
    """As after a cold start with adapters: it has no value head, which is 0 at first and then saved with the rest."""
    adapter = make_adapter(folder, LoraConfig(r=4, **LORA), tmp_path / "adapter")
    config = settings(f"model.path={adapter}", f"model.tune={tune}")
    policy = load_model(config)
    critic = baselines.load_critic(config, policy, str(adapter))
    rng = np.random.default_rng(0)
    batch = lay_out([Sample(rng.integers(3, 300, 20), rng.integers(3, 300, 30))], policy.packing)
    with torch.no_grad():
        assert baselines.token_values(critic, batch).eq(0).all()
        torch.testing.assert_close(model.last_hidden(critic, batch)[0], model.last_hidden(policy, batch)[0])
        critic.inner.score.bias.fill_(0.25)
        save_model(critic, tmp_path / "saved")
        again = baselines.load_critic(config, policy, str(tmp_path / "saved"))
        assert baselines.token_values(again, batch).eq(0.25).all()
    assert any("score" in name and weight.requires_grad for name, weight in again.model.named_parameters())


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_cannot_be_kept_is_named(folder, tmp_path, kind):
    made, message = REFUSED[kind]
    adapter = make_adapter(folder, made, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(settings(f"model.path={adapter}", "model.tune=lora"))
    assert "\n" not in str(caught.value) and "peft" in str(caught.value)


@pytest.mark.parametrize("made", [REFUSED["DoRA"][0], REFUSED["IA3"][0], REFUSED["biases"][0], *STAYS_TIED.values()])
def test_other_kinds_can_become_part_of_the_weights(folder, tmp_path, made):
    adapter = make_adapter(folder, made, tmp_path / "adapter")
    merged = load_model(settings(f"model.path={adapter}", "model.tune=full"))
    torch.testing.assert_close(logits_of(merged.model), logits_by_peft(folder, adapter), atol=1e-4, rtol=0)
    assert all(weight.requires_grad for weight in merged.model.parameters())
    assert merged.inner.config.tie_word_embeddings and "lm_head.weight" not in dict(merged.inner.named_parameters())


@pytest.mark.parametrize("kind", OF_TIED_ENDS)
def test_an_adapter_of_a_head_that_is_the_embedding_at_once(folder, tmp_path, kind):
    """Merged it would change both, or part them unknown to the engine. The cure that is named makes it what it is."""
    made = OF_TIED_ENDS[kind]
    adapter = make_adapter(folder, made, tmp_path / "adapter")
    expected = logits_by_peft(folder, adapter)
    assert (logits_of(AutoModelForCausalLM.from_pretrained(folder)) - expected).abs().max() > 0.1
    config = settings(f"model.path={adapter}", "model.tune=full")
    message = rf"changes a head that is the embedding at once .* tie_word_embeddings of {folder} says: give that a head"
    for tune in ("full", "lora") if kind.startswith("LoRA") else ("full",):
        with pytest.raises(ConfigError, match=message) as caught:
            load_model(tiny.changed(config, f"model.tune={tune}"))
        assert "\n" not in str(caught.value) and "model.base" in str(caught.value)
    own_head = load_model(tiny.changed(config, f"model.base={untied(folder, tmp_path / 'untied')}"))
    torch.testing.assert_close(logits_of(own_head.model), expected, atol=1e-4, rtol=0)


def test_lora_that_is_tied_itself_has_no_such_cure(folder, tmp_path):
    adapter = make_adapter(folder, LoraConfig(ensure_weight_tying=True, **EMBEDDING), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"peft cannot merge one that is tied itself \(ensure_weight_tying\)"):
        load_model(settings(f"model.path={adapter}", "model.tune=full"))


def test_an_embedding_in_an_adapters_file(folder, tmp_path):
    """Another one than the base's would be lost with the next checkpoint; peft saves the base's own beside a head."""
    adapter = make_adapter(folder, LoraConfig(r=4, **LORA), tmp_path / "adapter", save_embedding_layers=True)
    for tune in ("lora", "qlora"):
        with pytest.raises(ConfigError, match=r"has another .*embed_tokens.weight than .*model.tune=full") as caught:
            load_model(settings(f"model.path={adapter}", f"model.tune={tune}"))
        assert "\n" not in str(caught.value)
    merged = load_model(settings(f"model.path={adapter}", "model.tune=full"))
    torch.testing.assert_close(logits_of(merged.model), logits_by_peft(folder, adapter), atol=1e-4, rtol=0)
    base = untied(folder, tmp_path / "untied")
    adapter = make_adapter(base, LoraConfig(r=4, **HEAD), tmp_path / "head")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(adapter / "adapter_model.safetensors")
    loaded = load_model(settings(f"model.path={adapter}", "model.tune=lora"))
    torch.testing.assert_close(logits_of(loaded.model), logits_by_peft(base, adapter), atol=1e-5, rtol=0)
    save_model(loaded, tmp_path / "saved")
    again = load_model(settings(f"model.path={tmp_path / 'saved'}", "model.tune=lora"))
    torch.testing.assert_close(logits_of(again.model), logits_of(loaded.model), atol=1e-6, rtol=0)


def test_gradients_by_logits_are_those_of_an_adapted_head(folder, tmp_path):
    base = untied(folder, tmp_path / "untied")
    adapter = make_adapter(base, LoraConfig(r=4, lora_alpha=6, **HEAD), tmp_path / "adapter")
    loaded = load_model(settings(f"model.path={adapter}", "model.tune=lora"))
    rng = np.random.default_rng(0)
    batch = lay_out([Sample(rng.integers(3, 300, 20), rng.integers(3, 300, 30))], loaded.packing)
    with torch.no_grad():
        hidden_TH, target_T = model.last_hidden(loaded, batch)
        logits_TV = loaded.inner.get_output_embeddings()(hidden_TH) / 0.7
        logp_T, _ = model.head_logprobs(loaded, hidden_TH, target_T, 0.7)
    expected_TV = torch.nn.functional.one_hot(target_T, logits_TV.shape[-1]) - logits_TV.softmax(-1)
    token_C = target_T.unique()
    found_TC = model.logit_gradients(loaded, hidden_TH, target_T, 0.7, token_C, logp_T=logp_T)
    torch.testing.assert_close(found_TC, expected_TV[:, token_C], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda file: file.write_bytes(file.read_bytes()[:-100]),
            "is not a file of weights, or a part of one: load",
        ),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "run `git lfs pull`"),
        (lambda file: file.rename(file.with_suffix(".bin")), r"no adapter_model.safetensors: save it with safe_serial"),
        (lambda file: file.unlink(), "is not a whole adapter: it has no adapter_model.safetensors$"),
    ],
)
def test_an_adapters_own_weights_are_checked_first(folder, tmp_path, monkeypatch, spoil, message):
    adapter = make_adapter(folder, LoraConfig(r=4, **LORA), tmp_path / "adapter")
    spoil(adapter / "adapter_model.safetensors")
    monkeypatch.setattr(model, "read_weights", lambda *_: pytest.fail("weights were read"))
    for tune in ("lora", "full"):
        with pytest.raises(ConfigError, match=message) as caught:
            load_model(settings(f"model.path={adapter}", f"model.tune={tune}"))
        assert "\n" not in str(caught.value) and str(adapter) in str(caught.value)


def test_an_adapter_of_a_model_in_4_bits_needs_that_it_was_made_of(folder, tmp_path):
    adapter = make_adapter(folder, LoraConfig(r=4, **LORA), tmp_path / "adapter")
    tiny.copy(folder, tmp_path / "whole")
    change_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    config = settings(f"model.path={adapter}", "model.tune=lora")
    with pytest.raises(ConfigError, match=r"given has quantised weights .*: set model.base to the model that they"):
        check_model_folder(config)
    check_model_folder(tiny.changed(config, f"model.base={tmp_path / 'whole'}"))


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


@pytest.mark.parametrize("tune", ["full", "lora", "qlora"])
def test_a_base_of_a_whole_model_is_that_model(folder, tmp_path, tune):
    """Another one would come under its adapter when the run goes on."""
    other, same = str(tiny.ROOT / "assets" / "base"), tiny.copy(folder, tmp_path / "same")
    config = settings(f"model.path={folder}", f"model.tune={tune}")
    with pytest.raises(ConfigError, match=rf"model.base={other} is for adapters, and {folder} is a whole .*, and ano"):
        check_model_folder(tiny.changed(config, f"model.base={other}"))
    check_model_folder(tiny.changed(config, f"model.base={same}"))


def test_a_checkpoint_of_all_weights_needs_no_base(folder, tmp_path):
    """model.tune=full of an adapter whose base has been moved: the run goes on, and is evaluated."""
    adapter = make_adapter(folder, LoraConfig(r=4, **LORA), tmp_path / "adapter")
    folder.rename(tmp_path / "moved")
    config = settings(f"model.path={adapter}", "model.tune=full", f"model.base={tmp_path / 'moved'}")
    loaded = load_model(config)
    save_model(loaded, tmp_path / "saved")
    for train in (True, False):
        again = load_model(config, path=str(tmp_path / "saved"), train=train)
        np.testing.assert_array_equal(logprobs(again), logprobs(loaded))
        assert again.base == str(tmp_path / "saved")


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
