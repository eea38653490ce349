"""Figures of what checkpoints are: likeness of hidden states, influence of one sample on another, drift of layers.

Measures of figures.py, each of one Subject.  Influences are first-order ones of the output layer (paper, equation 2;
coupling.py) except in Figure 3b, which takes the step and looks.

Decisions where the paper is silent: a sample's state is the mean of its hidden states after the final norm, over prompt
and response; cosines stand beside those of states less their mean, for language models' states all point one way.
Figure 3b's step is plain gradient ascent on the log-prob of one response (and Adam's first step, a variant), of one
size for all responses: the one that it raises most it raises by 0.05 nat a token, to first order.  Figure 9 classes
tokens by where they stand: tags, the action's words, names of objects, numbers, the rest of the thought; a reply to a
question is right where its last number is the answer's.  Figure 10b puts every layer through the final norm and the
reference's output layer.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
import torch

from config import Config
from distributed import progress_bar
from model import LanguageModel, all_logprobs, last_hidden, load_model, token_logprobs
from packing import Sample, lay_out, micro_batches
from paper import coupling
from paper.behaviour import Missing, Numbers, Subject, interval, mean_of
from rollout import Episode, Step
from samples import make_sample

SIMILAR_SAMPLES = 200  # whose states are compared
SOURCES, TARGETS = 12, 48  # of Figure 3b's steps
SELF_CHANGE = 0.05  # nat per token, of the sample that is learned from
DIRECTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # of a step, from the gradient
    "": lambda gradient: gradient,
    ", Adam": lambda gradient: gradient / (gradient.abs() + 1e-8),
}
REPLIES = 8  # to a question, of which some may be right
CLASSES = ("tags", "action words", "object names", "numbers", "reasoning", "other")
OBJECT = re.compile(r"\b[a-z]+ \d+\b")
ACTION = re.compile(r"<action>(.*?)(?:</action>|$)", re.DOTALL)
TAG = re.compile(r"</?\w+>")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def draw_steps(episodes: Sequence[Episode], most: int) -> list[tuple[Episode, Step]]:
    """Draw up to `most` steps of all episodes at random."""
    every = [(episode, step) for episode in episodes for step in episode.steps if step.response_ids]
    return random.Random(0).sample(every, min(most, len(every)))


# ----------------------------------------------------------------------------------------------------------------------
# Figure 3a


@torch.no_grad()
def states(policy: LanguageModel, samples: Sequence[Sample], budget: int) -> dict[str, torch.Tensor]:
    """Compute each sample's hidden state after the final norm, float64 [R, H]: the mean over prompt and response, that
    over the response, and the last token's."""
    whole = [  # every token is "predicted" from the one before it: what comes out is the state of all but the last
        Sample(one.prompt_ids[:1], np.concatenate([one.prompt_ids[1:], one.response_ids, one.response_ids[-1:]]))
        for one in samples
    ]
    parts: list = [None] * len(samples)
    for batch in micro_batches(whole, budget, policy.packing):
        hidden_TH, _ = last_hidden(policy, batch)
        for index, hidden_SH in zip(batch.indices, hidden_TH.double().cpu().split(batch.lengths), strict=True):
            response_TH = hidden_SH[-len(samples[index].response_ids) :]
            parts[index] = (hidden_SH.mean(0), response_TH.mean(0), hidden_SH[-1])
    names = ("prompt and response", "response", "last token")
    return dict(zip(names, (torch.stack(one) for one in zip(*parts, strict=True)), strict=True))


def embed_sim(subject: Subject) -> Numbers:
    """Measure Figure 3a: cosines between the states of different steps, by how much they share, and of questions if
    given."""
    config, policy = subject.config, subject.engine.policy
    drawn = draw_steps(subject.own, SIMILAR_SAMPLES)
    found = states(policy, [make_sample(step) for _, step in drawn], config.train.tokens_per_micro_batch)
    game_R = np.array([episode.group for episode, _ in drawn])
    episode_R = game_R * 2 + np.array([episode.member for episode, _ in drawn])
    same_episode_RR, same_game_RR = (one[:, None] == one for one in (episode_R, game_R))
    strata = {
        "same episode": same_episode_RR,
        "same game": same_game_RR & ~same_episode_RR,
        "different games": ~same_game_RR,
    }
    numbers: Numbers = {"steps": len(drawn)}
    for pooling, state_RH in found.items():
        numbers |= _cosines(state_RH, strata, game_R, pooling)
    if subject.questions:
        replies = [sample for _, sample in answered(subject, 1)]
        different = {"different questions": ~np.eye(len(replies), dtype=bool)}
        numbers["questions"] = len(replies)
        for pooling, state_RH in states(policy, replies, config.train.tokens_per_micro_batch).items():
            numbers |= _cosines(state_RH, different, np.arange(len(replies)), pooling)
    return numbers


def _cosines(state_RH: torch.Tensor, strata: dict[str, np.ndarray], game_R: np.ndarray, pooling: str) -> Numbers:
    """Compute means with intervals and histograms of the cosines of different samples, of raw and of centred states."""
    numbers: Numbers = {}
    for way, seen_RH in (("raw", state_RH), ("centred", state_RH - state_RH.mean(0))):
        unit_RH = torch.nn.functional.normalize(seen_RH, dim=-1)
        cosine_RR = (unit_RH @ unit_RH.T).numpy()
        for name, counted_RR in strata.items():
            chosen_RR = np.triu(counted_RR, 1)  # each pair once, none of a sample and itself
            key = f"{name}, {way}, {pooling}"

            def mean(
                times_R: np.ndarray, cosine_RR: np.ndarray = cosine_RR, chosen_RR: np.ndarray = chosen_RR
            ) -> float:
                apart_RR = game_R[:, None] != game_R
                weight_RR = chosen_RR * times_R[:, None] * np.where(apart_RR, times_R, 1)  # no game's own copy
                return float((weight_RR * cosine_RR).sum() / weight_RR.sum())

            numbers[key] = interval(mean, game_R)
            if pooling == "prompt and response":
                numbers[f"{key}, histogram"] = np.histogram(cosine_RR[chosen_RR], bins=50, range=(-1, 1))[0].tolist()
    return numbers


def answered(subject: Subject, replies: int) -> list[tuple[int, Sample]]:
    """Let the model reply so many times to each question; return the question's number with each reply."""
    policy, rollout = subject.engine.policy, subject.config.rollout
    prompts = {number: policy.chat.encode(question) for number, (question, _) in enumerate(subject.questions)}
    asked = [number for number, ids in prompts.items() if len(ids) <= rollout.max_prompt_tokens] * replies
    params = [subject.sampling_params(number, salt=5) for number in range(len(asked))]
    completions = subject.engine.generate([prompts[number] for number in asked], params)
    return [
        (number, Sample(np.array(prompts[number]), np.array(completion.ids)))
        for number, completion in zip(asked, completions, strict=True)
        if completion.ids
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Figure 3b


def step_influence(subject: Subject) -> Numbers:
    """Measure Figure 3b: how other steps' replies change by one step of gradient ascent on one reply, by the kinds of
    both actions; different prompts alone.

    In mean log-prob per token of the reply (the map's), and of the action's words, and in these words' probability.
    """
    config = subject.config
    all_trained = dataclasses.replace(config.model, tune="full", shard="never")
    model = load_model(dataclasses.replace(config, model=all_trained), path=subject.folder)  # float32: steps are small
    drawn = draw_steps(subject.own, min(TARGETS, config.judge.questions))
    samples, kind_R = [make_sample(step) for _, step in drawn], np.array([kind_of(step.action) for _, step in drawn])
    differ_RR = np.array([[not np.array_equal(a.prompt_ids, b.prompt_ids) for b in samples] for a in samples])
    before = likelihoods(model, samples, config)
    weights = {name: weight.detach().cpu().clone() for name, weight in model.model.named_parameters()}
    sources = range(min(SOURCES, len(samples)))
    differ_SR, same_SR = differ_RR[: len(sources)], (kind_R[:, None] == kind_R)[: len(sources)]
    sizes = step_sizes(model, [samples[source] for source in sources], config)
    moves = {way: (direction, sizes[way]) for way, direction in DIRECTIONS.items()}
    moves |= {f"{way}, a tenth": (direction, size / 10) for way, (direction, size) in moves.items()}
    changes: dict[str, list[np.ndarray]] = defaultdict(list)  # what is measured -> of each source, [R]
    for source in progress_bar(sources, desc="Figure 3b", unit=" steps"):
        gradients = reply_gradients(model, samples[source], config)
        for move, (direction, size) in moves.items():
            with stepped(model, weights, (size * direction(gradient) for gradient in gradients)):
                after = likelihoods(model, samples, config)
            for what, after_R in after.items():
                changes[what + move].append(after_R - before[what])
    numbers: Numbers = {"steps": len(samples), "sources": len(sources)}
    game_S = np.array([drawn[source][0].group for source in sources])
    for name, change in changes.items():
        change_SR = np.where(differ_SR, change, np.nan)
        for kind, counted_SR in (("same", same_SR), ("other", ~same_SR)):
            some_S, mean_S = source_means(change_SR, counted_SR)
            numbers[f"{kind} action, {name}"] = mean_of(mean_S[some_S], game_S[some_S])
        numbers[f"cells, {name}"] = _cells(change_SR, kind_R)
    for way in DIRECTIONS:
        one_SR, tenth_SR = (np.abs(changes[f"reply{way}{note}"]) for note in ("", ", a tenth"))
        numbers[f"own change{way}"] = float(np.mean([one_SR[source, source] for source in sources]))
        ratio_S = (one_SR * differ_SR).sum(1) / (10 * tenth_SR * differ_SR).sum(1)
        numbers[f"change / 10 x change by a tenth{way}"] = float(np.median(ratio_S))
    return numbers


@contextmanager
def stepped(model: LanguageModel, weights: dict[str, torch.Tensor], moves: Iterable[torch.Tensor]) -> Iterator[None]:
    """Move the model's weights, then put them back as they were: `weights`."""
    with torch.no_grad():
        for weight, move in zip(model.model.parameters(), moves, strict=True):
            weight += move
        yield
        for name, weight in model.model.named_parameters():
            weight.copy_(weights[name])


def _cells(change_SR: np.ndarray, kind_R: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """Compute [mean change, pairs] by the kind of the source and of the target; the sources are the first targets."""
    cells: dict[str, dict[str, list[float]]] = {}
    for first in np.unique(kind_R[: len(change_SR)]):
        for second in np.unique(kind_R):
            block = change_SR[kind_R[: len(change_SR)] == first][:, kind_R == second]
            if np.isfinite(block).any():
                pairs = int(np.isfinite(block).sum())
                cells.setdefault(str(first), {})[str(second)] = [float(np.nanmean(block)), pairs]
    return cells


def kind_of(action: str) -> str:
    """Say an action's kind: its words up to the first object's name; without such a name ("mug 1") its first word."""
    before, *named = OBJECT.split(action, maxsplit=1)
    return (before if named else before.partition(" ")[0]).strip() or "<invalid>"


def source_means(value_SR: np.ndarray, where_SR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell whether each source has any of the chosen targets, [S], and compute its mean over them, [S]."""
    chosen_SR = where_SR & np.isfinite(value_SR)
    return chosen_SR.any(1), np.where(chosen_SR, value_SR, 0).sum(1) / chosen_SR.sum(1).clip(min=1)


def likelihoods(model: LanguageModel, samples: Sequence[Sample], config: Config) -> dict[str, np.ndarray]:
    """Compute of each reply, float64 [R]: nat per token, nat per token of the action's words, and these words'
    probability; the latter are nan without such words."""
    found = all_logprobs(model, samples, config.train.tokens_per_micro_batch, config.rollout.temperature)
    replies = [logp_T.astype(np.float64) for logp_T in found]
    words = [action_tokens(pieces_of(model, sample.response_ids)) for sample in samples]
    actions = [logp_T[where] for logp_T, where in zip(replies, words, strict=True)]
    return {
        "reply": np.array([logp_T.mean() for logp_T in replies]),
        "action's words": np.array([logprobs.mean() if len(logprobs) else np.nan for logprobs in actions]),
        "probability": np.array([np.exp(logprobs.sum()) if len(logprobs) else np.nan for logprobs in actions]),
    }


def step_sizes(model: LanguageModel, samples: Sequence[Sample], config: Config) -> dict[str, float]:
    """Find the step's size in each of DIRECTIONS: the reply that rises most rises by SELF_CHANGE, to first order."""
    gains: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        gradients = reply_gradients(model, sample, config)
        for way, direction in DIRECTIONS.items():
            gain = sum(float((gradient.double() * direction(gradient)).sum()) for gradient in gradients)
            gains[way].append(max(gain / len(sample.response_ids), 1e-12))
    return {way: SELF_CHANGE / max(each) for way, each in gains.items()}


def reply_gradients(model: LanguageModel, sample: Sample, config: Config) -> list[torch.Tensor]:
    """Compute the gradients of a reply's log-prob by every parameter."""
    logp_T, _ = token_logprobs(model, lay_out([sample], model.packing), config.rollout.temperature)
    return list(torch.autograd.grad(logp_T.sum(), list(model.model.parameters())))


# ----------------------------------------------------------------------------------------------------------------------
# Figures 8 and 9


def coupling_gaps(subject: Subject) -> Numbers:
    """Measure Figure 8: the gap over all pairs, within games and between them, as cosine and by tokens."""
    panel = subject.panel
    samples = [make_sample(subject.step_of(question)) for question in panel]
    influence_RR = coupling.influences(subject.engine.policy, samples, subject.config)
    length_R = torch.tensor([len(sample.response_ids) for sample in samples], dtype=torch.float64)
    label_R, game_R = (torch.tensor(one) for one in zip(*((q.label, q.group) for q in panel), strict=True))
    within_RR = game_R[:, None] == game_R
    pairs = {"": torch.ones_like(within_RR), " within games": within_RR, " between games": ~within_RR}
    numbers: Numbers = {"steps": len(panel)}
    for how in ("cos", "mean_src", "mean_both", "sum"):
        for where, counted_RR in pairs.items():

            def gap(times: np.ndarray, how: str = how, counted_RR: torch.Tensor = counted_RR) -> float:
                times_R = torch.from_numpy(times).double()
                weight_RR = times_R[:, None] * torch.where(within_RR, 1, times_R)  # no pair of a game and its copy
                return coupling.coupling_gap(influence_RR, length_R, label_R, how, weight_RR * counted_RR)

            numbers[how + where] = interval(gap, game_R.numpy())
    return numbers


def similar_tokens(subject: Subject) -> Numbers:
    """Measure Figure 9: which tokens of flawed actions are pulled along by good ones of the same game; and, where
    questions with answers are given, which tokens of wrong replies are by right ones to the same question."""
    games: dict[int, tuple[list[Sample], list[Sample]]] = defaultdict(lambda: ([], []))  # flawed, good
    for question in subject.panel:
        games[question.group][question.label].append(make_sample(subject.step_of(question)))
    numbers = pulled_tokens(subject, games)
    if not numbers["tokens"]:
        raise Missing("no game has both good and flawed labelled steps; more --games or --steps may find one")
    answers = [answer for _, answer in subject.questions]
    if any(answers):
        replies: dict[int, tuple[list[Sample], list[Sample]]] = defaultdict(lambda: ([], []))
        for number, sample in answered(subject, REPLIES):
            if answers[number]:
                reply = subject.engine.policy.chat.reply(sample.response_ids)
                replies[number][is_right(reply, answers[number])].append(sample)
        found = pulled_tokens(subject, replies, to_question=True)
        numbers |= {f"questions: {key}": value for key, value in found.items()}
    return numbers


def is_right(reply: str, answer: str) -> bool:
    """Tell whether both end in the same number."""
    numbers = [NUMBER.findall(text) for text in (reply, answer)]
    said, true = (float(found[-1].replace(",", "")) if found else None for found in numbers)
    return said is not None and said == true


def pulled_tokens(
    subject: Subject, groups: dict[int, tuple[list[Sample], list[Sample]]], to_question: bool = False
) -> Numbers:
    """Measure, by class of the tokens of flawed replies, their share of all positive influence by the good ones.

    `groups` holds (flawed, good) replies. Beside that share, with its interval over groups, stand the mean influence
    and the reply to show, which has the most of it.
    """
    config, policy = subject.config, subject.engine.policy
    pulls: list[tuple[int, str, float]] = []  # group, class, influence
    shown: list[tuple[str, float]] = []
    for group, (flawed, good) in groups.items():
        for sample in flawed if good else ():
            pull_T = token_influences(policy, [sample, *good], config)
            pieces = pieces_of(policy, sample.response_ids)
            classes = token_classes(pieces, to_question)
            pulls += [(group, kind, value) for kind, value in zip(classes, pull_T, strict=True)]
            example = [(piece, float(value)) for piece, value in zip(pieces, pull_T, strict=True)]
            if sum(max(0.0, value) for _, value in example) > sum(max(0.0, value) for _, value in shown):
                shown = example
    numbers: Numbers = {"tokens": len(pulls), "shown": shown}
    if not pulls:
        return numbers
    group_T, kind_T, value_T = (np.array(one) for one in zip(*pulls, strict=True))
    positive_T = value_T.clip(min=0)
    for kind in CLASSES:
        own_T = kind_T == kind
        numbers[f"{kind}, share of positive influence"] = interval(
            lambda times, own_T=own_T: float((times * positive_T * own_T).sum() / (times * positive_T).sum()), group_T
        )
        numbers[f"{kind}, mean influence"] = mean_of(value_T[own_T], group_T[own_T])
        numbers[f"{kind}, share of tokens"] = mean_of(own_T, group_T)
    return numbers


@torch.no_grad()
def token_influences(policy: LanguageModel, samples: Sequence[Sample], config: Config) -> np.ndarray:
    """Compute for each response token of the first sample the sum of its influences with all tokens of the others:
    float64 [T]."""
    hidden_TH, target_T = last_hidden(policy, lay_out(samples, policy.packing))
    first = len(samples[0].response_ids)
    # each token of the first sample counts as a sample, the tokens of all others together as one
    sample_T = torch.arange(len(target_T), device=hidden_TH.device).clamp(max=first)
    logit_grads = coupling.all_logit_gradients(policy, hidden_TH, target_T, config.rollout.temperature)
    return coupling.couplings(hidden_TH.float(), logit_grads, sample_T)[:first, first].double().cpu().numpy()


def pieces_of(model: LanguageModel, ids: Sequence[int]) -> list[str]:
    """Split a reply into the text of each token: what decoding one more adds."""
    texts = [model.chat.tokenizer.decode(ids[:count]) for count in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in zip(texts, texts[1:], strict=False)]


def token_classes(pieces: Sequence[str], to_question: bool = False) -> list[str]:
    """Class each piece of a reply by the character in its middle. Replies to questions reason outside tags and speak of
    no objects."""
    text = "".join(pieces)
    kinds = ["reasoning" if to_question else "other"] * len(text)

    def mark(start: int, end: int, kind: str) -> None:
        kinds[start:end] = [kind] * (end - start)

    for found in re.finditer(r"<(think|planning|explore|reflection|monitor)>(.*?)(</\1>|$)", text, re.DOTALL):
        mark(*found.span(2), "reasoning")
    for found in ACTION.finditer(text):
        mark(*found.span(1), "action words")
    for pattern, kind in ((NUMBER, "numbers"), (OBJECT, "object names"), (TAG, "tags")):
        for found in pattern.finditer(text) if kind != "object names" or not to_question else ():
            mark(*found.span(), kind)
    return [
        "other" if at >= len(kinds) or re.fullmatch(r"\s*<\|.*\|>\s*|", piece) else kinds[at]
        for at, piece in zip(_middles(pieces), pieces, strict=True)
    ]


def action_tokens(pieces: Sequence[str]) -> list[int]:
    """Find which pieces of a reply are its action's words."""
    found = ACTION.search("".join(pieces))
    start, end = found.span(1) if found else (0, 0)
    return [number for number, at in enumerate(_middles(pieces)) if start <= at < end and pieces[number]]


def _middles(pieces: Sequence[str]) -> list[int]:
    """Find where in the text the middle of each piece is."""
    ends = accumulate(len(piece) for piece in pieces)
    return [end - len(piece) + len(piece) // 2 for end, piece in zip(ends, pieces, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# Figure 10b


@torch.no_grad()
def layer_drift(subject: Subject) -> Numbers:
    """Measure Figure 10b: per layer, how far this model is from the reference on the same tokens.

    In mean absolute difference and cosine: of logits through the final norm and the reference's output layer, and of
    the hidden states.
    """
    model, reference = subject.engine.policy, load_model(subject.config, path=subject.reference, train=False)
    samples = [make_sample(step) for _, step in draw_steps(subject.start, SIMILAR_SAMPLES // 4)]
    sums: dict[str, np.ndarray] = {}
    for sample in samples:
        hidden = [layer_states(one, sample) for one in (model, reference)]
        logits = [layer_logits(reference, states_LTH) for states_LTH in hidden]
        for name, (a, b) in (("logits", logits), ("hidden", hidden)):
            gap_LT, cosine_LT = (a - b).abs().mean(-1), torch.nn.functional.cosine_similarity(a, b, dim=-1)
            for what, value_LT in (("difference", gap_LT), ("cosine", cosine_LT)):
                key = f"{name}, {what}"
                sums[key] = sums.get(key, 0.0) + value_LT.double().sum(1).cpu().numpy()
    tokens = sum(len(sample.response_ids) for sample in samples)
    about = {"reference": subject.reference, "tokens": tokens, "steps": len(samples)}
    return {key: (value_L / tokens).tolist() for key, value_L in sums.items()} | about


def layer_states(model: LanguageModel, sample: Sample) -> torch.Tensor:
    """Compute the states between layers where the response's tokens are predicted: float32 [layers + 1, T, H].

    The last is taken before the final norm, as the others are.
    """
    caught: list[torch.Tensor] = []
    backbone = model.inner.base_model
    hook = backbone.norm.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    ids = np.concatenate([sample.prompt_ids, sample.response_ids]).astype(np.int64)
    with model.autocast():
        output = backbone(
            input_ids=torch.from_numpy(ids)[None].to(model.device), use_cache=False, output_hidden_states=True
        )
    hook.remove()
    first = len(sample.prompt_ids) - 1
    return torch.cat([*output.hidden_states[:-1], caught[-1]])[:, first:-1].float()


def layer_logits(model: LanguageModel, states_LTH: torch.Tensor) -> torch.Tensor:
    """Compute the logits that the model's final norm and output layer read from every layer: float32 [L, T, V]."""
    with model.autocast():
        return model.inner.get_output_embeddings()(model.inner.base_model.norm(states_LTH)).float()
