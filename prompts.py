"""The prompts of the paper's Appendix A.4 and the parsers of what comes back.

One builder serves the cold start, the rollouts and the evaluation, so the three cannot drift apart.  What is said of an
environment, its module says (EnvPrompt).  Model output is untrusted text: the parsers never raise, run in linear time
and accept one strict form.

Departures from the paper: typographical slips are mended ("observaitons", mismatched quotes); the guideline sentences
are left out where there are no guidelines, and the history sentences at the first step, where there is no history; the
guideline is asked for inside <rule> tags, because the paper does not say how it is read out of the answer.  The "rlvmr"
style is RLVMR's in our own words: one of four reasoning tags opens the reply, the latest plan and replies stand in the
prompt; its sheet of action syntax is left out, since the actions are listed.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import envs

GUIDELINES = (
    "You should strictly follow the guidelines below, do what the guideline suggests in your thinking steps to make "
    "better actions:\n{guidelines}\n"
)
HISTORY = (
    "Prior to this step, you have already taken {step_count} step(s). Below are the most recent {history_length} "
    "observations and the corresponding actions you took:\n{action_history}\n"
    "You are now at step {current_step} and your current observation is: {observation}\n"
)
FIRST_STEP = "Your current observation is: {observation}\n"
REPLY_FORMAT = {  # by prompt style
    "think": "This reasoning process MUST be enclosed within <think> </think> tags. Once you've finished your "
    "reasoning, you should choose {choice} and present it within <action> </action> tags.",
    "rlvmr": "This reasoning process MUST be enclosed within one pair of tags, the one that fits the situation:\n"
    "<planning> </planning>: set up or revise the overall plan, the subgoals in their order;\n"
    "<explore> </explore>: think of what is not known yet, and of an action not tried before that can reveal it;\n"
    "<reflection> </reflection>: find out why the last action failed, and what to do instead;\n"
    "<monitor> </monitor>: check the progress against the plan, and go on with its next subgoal.\n"
    "Once you've finished your reasoning, you should choose {choice} and present it within <action> </action> tags.",
}
REASONING = {"think": ("think",), "rlvmr": ("planning", "explore", "reflection", "monitor")}  # tags by prompt style
PLAN = "Your overall plan: {plan}\n"
REPLIES = "Your latest replies, oldest first:\n{replies}\n"
PLAN_CHARS, REPLIES_SHOWN = 600, 3  # of the plan and the replies in a prompt of the rlvmr style

JUDGE_PROMPT = """\
Role: You are an expert evaluator, a "Critic" tasked with judging the quality of an action taken by another agent in \
{environment}, where the agent is required to do tasks like {examples}. Given the question and the agent's response, \
you should judge the quality of the response.
Context:
Problem: {problem}
Agent Response: {response}
The problem has not been solved in the current state; if the agent considered the problem done before taking any \
action, it is a serious error.
Your Task:
1. Analyze: In your <think> block, perform a step-by-step analysis. Consider the 'Current State' and the overall \
'Problem'. Evaluate the thinking process of the agent and check whether the thinking is logical and whether the \
'Chosen Action' makes logical progress. Evaluate whether the 'Chosen Action' will cause serious trouble, is obviously \
not a good option, or may end in a loop of actions. Evaluate other possible actions and analyze whether some action is \
obviously better than the chosen one. You should notice that the agent is good at this task, its success rate is about \
80 percent, but it will also make some small mistakes or redundant actions, so you should not only consider the bad \
side of the action but also its good side.
2. Judge: In the <answer> block, provide a score. Use '1' for a good action, and '0' if the action is obviously a poor \
action and there exist explicitly better actions.
3. Propose (if applicable): In the <action> block, if (and only if) the score is '0', provide the single best \
alternative action based on the available actions. Do not add any explanation here, only the action itself.
4. Trajectory Analyze: Based on previous actions and their corresponding feedback, analyze the agent's previous \
actions and check whether some of them could be further improved.
5. Advise: In the <advise> block, provide a single, concise sentence of feedback. Based on your analysis of the \
current action and previous actions, provide advice to help the agent avoid its mistakes and enhance its advantage in \
the future. Provide a high-level strategic principle that applies to various situations, rather than a correction for \
this specific instance.
Output Format: You must follow this exact format. The <action> block is conditional and should only appear when the \
score is 0.
<think> Your step-by-step reasoning here. This is where you will explain why the chosen action is good or bad. If it \
is bad, you will also explain why your proposed alternative action is better. </think>
<answer> \\boxed{{0/1}} </answer>
<action> The single best alternative action for the current observation here (only if score is 0) </action>
<advise> Your concise, high-level strategic advice here </advise>"""

GUIDELINE_PROMPT = """\
Role: You are an Expert AI Strategist, tasked with synthesizing raw feedback to generate high-level, actionable \
principles for improving an agent's performance. The agent is operating in a complex environment like {environment}.
Context: You will be provided with a pre-defined theme and a list of specific advice sentences that have already been \
clustered under this theme.
Your Sole Task: Distill the entire collection of related advice into one single, overarching "Golden Rule." This rule \
must be:
High-Level: Abstract away from specific examples.
Actionable: Provide clear guidance on what the agent should do.
Generalizable: Be applicable to future, unseen situations related to this theme.
For each theme provided in the input data, you must perform the following steps:
1. Think Step-by-Step: First **you must think step by step and dig deep into the advice to formulate the high-level \
principle.** Analyze the specific advice, identify the common pattern or root cause, and build a line of reasoning \
toward a general rule.
2. Formulate the Rule: Based on your thinking, synthesize the advice into **one single, actionable, and generalizable \
Golden Rule** and present it within <rule> </rule> tags.
THEME: {theme}
ADVICE LIST:
{advice}"""

THOUGHTS = """\
An expert played this episode of {environment}. Write what it may have thought before each action: a few sentences \
that follow from the task and from what had been seen by then, never from what comes later, and that lead to the action.
Task: {task}
{steps}
Answer with a JSON list alone, with one object for each of the {count} actions, in their order, the actions unchanged: \
{form}"""
THOUGHT_FORM = {
    "think": '{"thought": "...", "action": "..."}',
    "rlvmr": '{"tag": "...", "thought": "...", "action": "..."}, where the tag is planning (sets up the plan),'
    " explore (looks for what is not known yet), reflection (mends a failed action) or monitor (goes on by the plan)",
}

TAGS = ("think", "action", "answer", "advise", "rule", *REASONING["rlvmr"])
_TAG = re.compile(rf"<(/?)({'|'.join(TAGS)})>", re.IGNORECASE | re.ASCII)  # ASCII: a dotless i is no i
_VERDICT = re.compile(r"\s*(?:\\?boxed\s*\{\s*([01])\s*\}|([01]))\s*\.?\s*")
_IDEOGRAPH = re.compile("[\u4e00-\u9fff]")
THOUGHT_CHARS = 1000  # of a thought that a teacher wrote
ACTION_CHARS = 200  # of an action shown in a prompt; real ones are far shorter
GUIDELINE_CHARS = 200  # of one guideline


@dataclass(frozen=True)
class EnvPrompt:
    """What the prompts say of one environment: its module's PROMPT. Braces are filled in."""

    opening: str  # of the policy's prompt, before any guidelines: {task}
    task: str  # after them, where the opening does not tell the task: {task}
    closing: str  # what can be done, and how to reply: {actions}, {objects}, {guided}, {reply_format}
    choice: str  # "an admissible action for current step"
    judge_setting: str  # what the judge is told of the environment
    judge_examples: str  # tasks like ...
    guideline_setting: str  # an environment like ...
    lower_case: bool = False  # actions are lower-cased before they are sent


@dataclass(frozen=True)
class PromptContext:
    """What a prompt shows at one step of an episode.

    `history` holds the latest (observation, action) pairs, oldest first; `objects` what a placeholder in `actions` can
    stand for; `plan` and the latest `replies` are shown in the "rlvmr" style alone.
    """

    env: str
    task: str
    observation: str
    actions: tuple[str, ...]
    history: tuple[tuple[str, str], ...] = ()
    step: int = 0  # from 0
    objects: tuple[str, ...] = ()
    style: str = "think"
    plan: str = ""
    replies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What the policy answered. `action` is what the environment is sent, also where the form is not `valid`."""

    action: str
    valid: bool
    tag: str
    thought: str


@dataclass(frozen=True)
class Critique:
    """What the judge answered: its verdict (None where it gave none), a better action, a sentence of advice."""

    score: int | None
    action: str | None
    advice: str | None


def build_prompt(ctx: PromptContext, guidelines: Sequence[str] = ()) -> str:
    """Write the policy's prompt of one step. Source: paper, Appendix A.4; RLVMR for its style."""
    words = envs.load(ctx.env).PROMPT
    parts = [words.opening.format(task=ctx.task)]
    if guidelines:
        parts.append(GUIDELINES.format(guidelines="\n".join(f"- {plain(one)}" for one in guidelines)))
    parts.append(words.task.format(task=ctx.task))
    if ctx.history:
        first = ctx.step - len(ctx.history) + 1
        lines = [
            f"[Observation {number}: '{observation}', Action {number}: '{plain(action, ACTION_CHARS)}']"
            for number, (observation, action) in enumerate(ctx.history, first)
        ]
        parts.append(
            HISTORY.format(
                step_count=ctx.step,
                history_length=len(ctx.history),
                action_history="\n".join(lines),
                current_step=ctx.step + 1,
                observation=ctx.observation,
            )
        )
    else:
        parts.append(FIRST_STEP.format(observation=ctx.observation))
    if ctx.style == "rlvmr":
        parts.append(PLAN.format(plan=plain(ctx.plan, PLAN_CHARS) or "No plan."))
        if ctx.replies:
            parts.append(REPLIES.format(replies="\n".join(inert(reply) for reply in ctx.replies)))
    parts.append(
        words.closing.format(
            actions="\n ".join(f"'{action}'" for action in ctx.actions),
            objects=", ".join(ctx.objects),
            guided=" based on the guideline" if guidelines else "",
            reply_format=REPLY_FORMAT[ctx.style].format(choice=words.choice),
        )
    )
    return "".join(parts)


def recall(replies: Sequence[Reply], texts: Sequence[str], style: str) -> tuple[str, tuple[str, ...]]:
    """Return what a prompt of this style shows of an episode's replies so far: the latest plan, the latest texts."""
    if style != "rlvmr":
        return "", ()
    plans = (reply.thought for reply in reversed(replies) if reply.tag == "planning" and reply.thought)
    return next(plans, ""), tuple(texts[-REPLIES_SHOWN:])


def fit_prompt(
    ctx: PromptContext, guidelines: Sequence[str], encode: Callable[[str], list[int]], max_tokens: int
) -> tuple[str, list[int]]:
    """Write the prompt within `max_tokens`, as (text, token ids): without its oldest replies, then its oldest history,
    then its last guidelines.

    Raises ValueError if the prompt is too long without any: task, observation and actions are never cut.
    """
    kept = [(ctx.replies[dropped:], ctx.history, guidelines) for dropped in range(len(ctx.replies))]
    kept += [((), ctx.history[dropped:], guidelines) for dropped in range(len(ctx.history) + 1)]
    kept += [((), (), guidelines[:count]) for count in reversed(range(len(guidelines)))]
    for replies, history, guided in kept:
        text = build_prompt(dataclasses.replace(ctx, replies=replies, history=history), guided)
        ids = encode(text)
        if len(ids) <= max_tokens:
            return text, ids
    raise ValueError(
        f"a prompt without history and guidelines has {len(ids)} tokens, more than the limit of {max_tokens}: raise "
        f"rollout.max_prompt_tokens (it begins {text[:80]!r})"
    )


def build_judge_prompt(env: str, problem: str, response: str) -> str:
    """Write the question "was this a good action?" about one step: its whole prompt, and the reply it got.

    Source: paper, Appendix A.4.
    """
    words = envs.load(env).PROMPT
    fields = {"environment": words.judge_setting, "examples": words.judge_examples}
    return JUDGE_PROMPT.format(problem=problem, response=inert(response), **fields)


def build_guideline_prompt(env: str, theme: str, advice: Sequence[str]) -> str:
    """Write the request to distil advice on one theme into a guideline. Source: paper, Appendix A.4."""
    sentences = "\n".join(f"- {plain(sentence)}" for sentence in advice)
    return GUIDELINE_PROMPT.format(environment=envs.load(env).PROMPT.guideline_setting, theme=theme, advice=sentences)


def build_thoughts_prompt(env: str, task: str, turns: Sequence[tuple[str, str]], style: str) -> str:
    """Write the request for the thoughts behind an expert's (observation, action) pairs."""
    steps = "\n".join(
        f"[Observation {number}: '{seen}', Action {number}: '{action}']"
        for number, (seen, action) in enumerate(turns, 1)
    )
    fields = {"environment": envs.load(env).PROMPT.judge_setting, "task": task, "steps": steps, "count": len(turns)}
    return THOUGHTS.format(form=THOUGHT_FORM[style], **fields)


def parse_thoughts(text: str, actions: Sequence[str], style: str) -> list[str] | None:
    """Read an answer to build_thoughts_prompt as replies in the form that parse_reply reads.

    None unless it has a thought, with a tag of the style, for each action and leaves all actions unchanged. Never
    raises.
    """
    try:
        found = json.loads(text[text.index("[") : text.rindex("]") + 1])
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list) or len(found) != len(actions):
        return None
    replies = []
    for one, action in zip(found, actions, strict=True):
        fields = [one.get(key) for key in ("thought", "action")] if isinstance(one, dict) else [None]
        if not all(isinstance(field, str) for field in fields) or fields[1].strip() != action:
            return None
        tag, thought = one.get("tag") if style == "rlvmr" else "think", plain(fields[0], THOUGHT_CHARS)
        if tag not in REASONING[style] or not thought:
            return None
        replies.append(f"<{tag}>{thought}</{tag}><action>{action}</action>")
    return replies


def parse_reply(text: str, style: str = "think", env: str = "") -> Reply:
    """Read a reply of the policy: valid iff one reasoning block of the style, in "rlvmr" not an empty one, then one
    non-empty action, no more.

    Tags may be in any case; a CJK ideograph anywhere makes the reply invalid. The action of an invalid reply is its
    first action block if it has one, else empty (which every environment answers with its "nothing happens"); its tag
    is "none". Actions are lower-cased where the environment's prompt says so, and without `env`, as the published
    parser does. Raises ValueError for an unknown style.
    """
    if style not in REASONING:
        raise ValueError(f"unknown prompt style {style!r}")
    tags, blocks = _scan(text, (*REASONING[style], "action"))
    action = " ".join(blocks.get("action", [""])[0].split())
    action = action.lower() if not env or envs.load(env).PROMPT.lower_case else action
    tag = tags[0] if tags and tags[0] in REASONING[style] else "none"
    thought = blocks.get(tag, [""])[0].strip()
    valid = tags == [tag, f"/{tag}", "action", "/action"] and bool(action) and not _IDEOGRAPH.search(text)
    valid = valid and (style != "rlvmr" or bool(thought))
    return Reply(action=action, valid=valid, tag=tag if valid else "none", thought=thought)


def parse_critique(text: str) -> Critique:
    """Read an answer of the judge: a verdict counts only if there is exactly one answer block and it says 0 or 1."""
    tags, blocks = _scan(text, TAGS)
    answer = blocks.get("answer", [""])[0]
    sole = tags.count("answer") == tags.count("/answer") == 1
    match = _VERDICT.fullmatch(answer) if sole and len(answer) < 100 else None
    score = int(match[1] or match[2]) if match else None
    action = plain(blocks.get("action", [""])[0], ACTION_CHARS) or None
    advice = plain(blocks.get("advise", [""])[-1], 300) or None
    return Critique(score=score, action=action, advice=advice)


def parse_guideline(text: str, max_chars: int) -> str:
    """Read an answer to build_guideline_prompt: its last <rule> block, plain and capped; empty without one."""
    _, blocks = _scan(text, TAGS)
    return plain(blocks.get("rule", [""])[-1], max_chars)


def inert(text: str) -> str:
    """Make model output fit to stand in a prompt: it cannot spell a chat template's control tokens (<|im_end|>, and
    with DeepSeek's wide bars <｜User｜>)."""
    return text.replace("<|", "< |").replace("<\uff5c", "< \uff5c")


def plain(text: str, max_chars: int | None = None) -> str:
    """Make untrusted text fit for a line of a prompt: inert, without the tags our parsers know, at most `max_chars`.

    A tag leaves a space behind, so that what stood around it cannot join into another.
    """
    return inert(" ".join(_TAG.sub(" ", text).split()))[:max_chars].strip()


def first_sentence(text: str) -> str:
    """Cut a text after its first sentence or line, and end it with a full stop."""
    return f"{text.split(chr(10))[0].split('. ')[0].strip().rstrip('.:')}."


def _scan(text: str, names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Find the tags of these names in order ("think", "/think", ...) and each one's closed blocks. One pass."""
    tags, blocks = [], {}
    opened: tuple[str, int] | None = None  # a block ends at the first tag after its opening that closes it
    for match in _TAG.finditer(text):
        slash, name = match[1], match[2].lower()
        if name not in names:
            continue
        tags.append(slash + name)
        if not slash:
            opened = (name, match.end())
        elif opened and opened[0] == name:
            blocks.setdefault(name, []).append(text[opened[1] : match.start()])
            opened = None
    return tags, blocks
