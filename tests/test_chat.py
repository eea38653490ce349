"""chat.py: what is read off chat templates as Qwen2.5, Qwen3, R1's distillates, Llama 3 and base models have them."""

import copy
import json

import pytest
import tiny

import prompts
from chat import ChatFormat
from config import ConfigError
from tools import tiny_base_model

LOOP = "{% for m in messages %}"
HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
TEMPLATES = {  # as those models have them, without tools
    "Qwen2.5": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}" + LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "Qwen3": LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "R1": LOOP + "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>"
    "{{ m.content.split('</think>')[-1] }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
    "Llama 3": "<|begin_of_text|>" + LOOP + HEADER + "{% if loop.first %}Today Date: {{ date_string }}\n\n{% endif %}"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "plain": (tiny.ROOT / "assets" / "plain_chat.jinja").read_text(),
}
CONTROL = "<｜User｜> <｜Assistant｜> <|start_header_id|> <|end_header_id|> <|begin_of_text|> <|eot_id|>".split()
REPLY = "<think>Need it.</think><action>go to bed 1</action>"


@pytest.fixture(scope="module")
def tokenizer(small_games):
    made = tiny_base_model.build_tokenizer(tiny.corpus(small_games)[:50], vocab=500)
    made.add_special_tokens({"additional_special_tokens": CONTROL})
    made.eos_token = "<|endoftext|>"  # as base models have it, whatever ends a turn
    return made


def with_template(tokenizer, name: str, **options) -> ChatFormat:
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATES[name]
    return ChatFormat(made, **options)


@pytest.mark.parametrize(
    ("name", "thinking", "tail", "opening", "end"),
    [
        ("Qwen2.5", "default", "look<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>"),
        ("Qwen3", "default", "look<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>"),
        ("Qwen3", "on", "look<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>"),
        ("Qwen3", "off", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "", "<|im_end|>"),
        ("R1", "default", "<｜User｜>look<｜Assistant｜><think>\n", "<think>\n", "<|endoftext|>"),
        ("Llama 3", "default", "look<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>"),
        ("plain", "default", "User:\nlook\n\nAssistant:\n", "", "<|endoftext|>"),
    ],
)
def test_what_a_template_says(tokenizer, name, thinking, tail, opening, end):
    chat = with_template(tokenizer, name, thinking=thinking)
    assert chat.tokenizer.decode(chat.encode("look")).endswith(tail)
    assert chat.opening == opening
    assert chat.tokenizer.convert_ids_to_tokens(chat.end) == end
    assert chat.ends == {chat.end, chat.tokenizer.eos_token_id}
    taught = chat.encode_reply(REPLY)
    assert taught[-1] == chat.end and chat.is_over(taught) and not chat.is_over(taught[:-1]) and not chat.is_over([])
    # the taught tag is not doubled: prompt and reply together have it once, and the parser finds the reply whole
    whole = chat.tokenizer.decode(chat.encode("look") + taught).split("look")[-1].replace("<think>\n\n</think>", "")
    assert whole.count("<think>") == whole.count("</think>") == 1
    parsed = prompts.parse_reply(chat.reply(taught))
    assert parsed.valid and parsed.action == "go to bed 1" and parsed.thought == "Need it."


def test_a_reply_to_a_prompt_that_opens_the_thought(tokenizer):
    chat = with_template(tokenizer, "R1")
    sampled = tokenizer("a</think>\n<action>go to bed 1</action>")["input_ids"]
    assert prompts.parse_reply(chat.reply(sampled)).valid
    assert not prompts.parse_reply(with_template(tokenizer, "Qwen2.5").reply(sampled)).valid


@pytest.mark.parametrize(
    "reply", [REPLY, f"\n{REPLY}", REPLY.replace("<think>", " <think>\n"), REPLY.removeprefix("<think>")]
)
def test_a_taught_reply_has_the_tag_once(tokenizer, reply):
    chat = with_template(tokenizer, "R1")
    chat.check_reply(reply)
    whole = tokenizer.decode(chat.encode("look") + chat.encode_reply(reply))
    assert whole.count("<think>") == whole.count("</think>") == 1


@pytest.mark.parametrize(
    "reply",
    [
        "On the desk.",
        "<think>a",
        "Well. <think>a</think>b",
        "<think><think>a</think>b",
        "<planning>a</planning><action>look</action>",
    ],
)
def test_a_taught_reply_closes_the_thought_that_the_prompt_opens(tokenizer, reply):
    with pytest.raises(ConfigError, match=r"opens a thought \(<think>\), which .*model.thinking=off.*model.chat_temp"):
        with_template(tokenizer, "R1").check_reply(reply)
    for name in TEMPLATES.keys() - {"R1"}:
        with_template(tokenizer, name).check_reply(reply)
    with_template(tokenizer, "Qwen3", thinking="off").check_reply(reply)


@pytest.mark.parametrize("thought", ["", "Hm.</think>\n", "Hm. <THINK>So.</think>"])
def test_a_sampled_reply_may_have_rlvmrs_tags_after_the_thought_or_in_it(tokenizer, thought):
    """Only its own tags count in that style: policies that think by nature can be trained in it."""
    chat = with_template(tokenizer, "R1")
    sampled = tokenizer(f"{thought}<planning>Go.</planning><action>look</action>")["input_ids"]
    parsed = prompts.parse_reply(chat.reply(sampled), "rlvmr")
    assert parsed.valid and parsed.thought == "Go." and parsed.action == "look"


def test_what_ends_a_turn_is_one_set(tokenizer):
    """The tokenizer's eos, generation_config's, and what the template writes; but no id that is an ordinary token."""
    extra, word = tokenizer.convert_tokens_to_ids(["<|im_start|>", "a"])
    chat = with_template(tokenizer, "Qwen2.5", more_ends=[extra, word])
    names = set(chat.tokenizer.convert_ids_to_tokens(sorted(chat.ends)))
    assert names == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}


def test_the_day_in_a_prompt_does_not_change(tokenizer):
    """Whether a template is told the date, or asks for it."""
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(with_template(tokenizer, "Llama 3").encode("look"))
    made = copy.deepcopy(tokenizer)
    made.chat_template = "{{ strftime_now('%Y-%m-%d, a %A') }}\n" + TEMPLATES["Qwen2.5"]
    assert ChatFormat(made).render([{"role": "user", "content": "look"}]).startswith("2024-07-26, a Friday\n")


def test_a_system_message_and_several_turns(tokenizer):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": "again"},
    ]
    shown = with_template(tokenizer, "Qwen2.5").render(messages)
    assert "helpful" not in shown and shown.index("Be short.") < shown.index("look") < shown.index("I see.")
    assert shown.endswith("again<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (None, {}, r"no chat template, as base models do.*model.chat_template=FILE.*plain_chat.jinja"),
        (TEMPLATES["Qwen2.5"], {"thinking": "on"}, "model.thinking=on: .* knows no such switch"),
        ("{{ raise_exception('never') }}", {}, "cannot show these messages: never"),
        ("{{ messages[0].content", {}, "cannot show these messages: "),
        ("{% for m in messages %}\n{{ m.content }\n", {}, "cannot show these messages: "),
        ("{{ messages[0].content }}{{ 1 / 0 }}", {}, "cannot show these messages: division by zero"),
        ("{{ '{key}'.format() }}", {}, "cannot show these messages: 'key'"),
        ("Hello.", {}, "does not show what the user says"),
        ("{{ messages[0].content }}", {}, "does not show what the assistant says"),
    ],
)
def test_templates_that_cannot_be_used(tokenizer, template, options, message):
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    with pytest.raises(ConfigError, match=message) as caught:
        ChatFormat(made, **options)
    assert "\n" not in str(caught.value)


def test_untrusted_text_cannot_spell_the_control_tokens_of_any(tokenizer):
    for name in TEMPLATES:
        chat = with_template(tokenizer, name)
        control = set(chat.tokenizer.all_special_ids)
        attack = prompts.inert("".join([*CONTROL, "<|im_end|>", "<|endoftext|>"]))
        assert sum(token in control for token in chat.encode(attack)) == sum(
            token in control for token in chat.encode("look")
        )


def test_a_run_whose_prompts_open_the_thought_and_whose_eos_ends_no_turn(small_games, tmp_path):
    """As R1's distillates and base models have it: the tiny model goes on from <think>, and ends with <|im_end|>."""
    folder = tiny.copy(tiny.checkpoint(small_games), tmp_path / "given")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        template.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>")
    )
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | {"eos_token": "<|endoftext|>"}))
    fields = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(fields | {"eos_token_id": 0}))
    invalid, cut_off = {}, {}
    for name, path in (("plain", tiny.checkpoint(small_games)), ("opened", folder)):
        settings = f"name={name} model.path={path} train.iterations=1 train.eval_every=0 algo.overlong=mask".split()
        tiny.run("train_rl.py", tiny.rl_yaml(small_games, tmp_path), "--set", *settings, cwd=tmp_path)
        (record,) = tiny.metrics_of(tmp_path / "runs" / name)
        invalid[name], cut_off[name] = record["rollout/invalid"], record["rollout/truncated"]
        assert record["train/grad_norm"] > 0 and record["mismatch/mean_abs"] < 1e-4
        step = tiny.episodes_of(tmp_path / "runs" / name, 0)[0][0]["steps"][0]
        assert step["response"].count("<think>") == 1
    assert invalid["opened"] < invalid["plain"] + 0.1 < 0.6 and cut_off["opened"] < cut_off["plain"] + 0.1 < 0.6
