"""Figures of what checkpoints are: likeness of hidden states, influence of one sample on another, drift of layers.

measure functions of analysis.py, each of one Subject.  Influences are first-order ones of the output layer (paper,
equation 2; losses.coupling) except in Figure 3b, which takes the step and looks.

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

import losses
from behaviour import Missing, Numbers, Subject, interval, mean_of
from config import Config
from model import Actor, Row, all_logprobs, last_hidden, load_actor, micro_batches, token_logprobs
from ranks import progress_bar
from rollout import Episode, Step
from telemetry import error_parts, influences

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


def row_of(step: Step) -> Row:
    """A step as it was sampled."""
    return Row(np.array(step.prompt_ids, dtype=np.int32), np.array(step.response_ids, dtype=np.int32))


def draw_steps(episodes: Sequence[Episode], most: int) -> list[tuple[Episode, Step]]:
    """Up to `most` steps of all episodes, at random."""
    every = [(episode, step) for episode in episodes for step in episode.steps if step.response_ids]
    return random.Random(0).sample(every, min(most, len(every)))


# ----------------------------------------------------------------------------------------------------------------------
# Figure 3a


@torch.no_grad()
def states(actor: Actor, rows: Sequence[Row], budget: int) -> dict[str, torch.Tensor]:
    """Each row's hidden state after the final norm, float64 [R, H]: the mean over prompt and response, that over the
    response, and the last token's."""
    whole = [  # every token is "predicted" from the one before it: what comes out is the state of all but the last
        Row(row.prompt_ids[:1], np.concatenate([row.prompt_ids[1:], row.response_ids, row.response_ids[-1:]]))
        for row in rows
    ]
    parts: list = [None] * len(rows)
    for batch in micro_batches(whole, budget, actor.packed):
        hidden_TH, _ = last_hidden(actor, [whole[index] for index in batch])  # [T, H]
        lengths = [len(whole[index].response_ids) for index in batch]
        for index, hidden_SH in zip(batch, hidden_TH.double().cpu().split(lengths), strict=True):  # [S, H]
            own_SH = hidden_SH[-len(rows[index].response_ids) :]  # [S, H]
            parts[index] = (hidden_SH.mean(0), own_SH.mean(0), hidden_SH[-1])  # [H] each
    names = ("prompt and response", "response", "last token")
    return dict(zip(names, (torch.stack(one) for one in zip(*parts, strict=True)), strict=True))


def embed_sim(subject: Subject) -> Numbers:
    """Figure 3a: cosines between the states of different steps, by how much they share, and of questions if given."""
    config, actor = subject.config, subject.engine.actor
    drawn = draw_steps(subject.own, SIMILAR_SAMPLES)
    found = states(actor, [row_of(step) for _, step in drawn], config.train.tokens_per_micro_batch)
    game_R = np.array([episode.group for episode, _ in drawn])  # [R]
    episode_R = game_R * 2 + np.array([episode.member for episode, _ in drawn])  # [R]
    same_episode_RR, same_game_RR = (one[:, None] == one for one in (episode_R, game_R))  # [R, R] each
    strata = {
        "same episode": same_episode_RR,
        "same game": same_game_RR & ~same_episode_RR,
        "different games": ~same_game_RR,
    }
    numbers: Numbers = {"steps": len(drawn)}
    for pooling, state_RH in found.items():
        numbers |= _cosines(state_RH, strata, game_R, pooling)
    if subject.questions:
        rows = [row for _, row in answered(subject, 1)]
        apart_RR = ~np.eye(len(rows), dtype=bool)  # [R, R]
        other = states(actor, rows, config.train.tokens_per_micro_batch)
        numbers["questions"] = len(rows)
        for pooling, state_RH in other.items():
            numbers |= _cosines(state_RH, {"different questions": apart_RR}, np.arange(len(rows)), pooling)
    return numbers


def _cosines(state_RH: torch.Tensor, strata: dict[str, np.ndarray], game_R: np.ndarray, pooling: str) -> Numbers:
    """Means with intervals and histograms of the cosines of different rows, raw and of centred states."""
    numbers: Numbers = {}
    for way, seen_RH in (("raw", state_RH), ("centred", state_RH - state_RH.mean(0))):
        unit_RH = torch.nn.functional.normalize(seen_RH, dim=-1)  # [R, H]
        cosine_RR = (unit_RH @ unit_RH.T).numpy()  # [R, R]
        for name, counted_RR in strata.items():
            chosen_RR = np.triu(counted_RR, 1)  # [R, R] each pair once, none of a row and itself
            key = f"{name}, {way}, {pooling}"

            def mean(
                times_R: np.ndarray, cosine_RR: np.ndarray = cosine_RR, chosen_RR: np.ndarray = chosen_RR
            ) -> float:
                apart_RR = game_R[:, None] != game_R  # [R, R]
                weight_RR = chosen_RR * times_R[:, None] * np.where(apart_RR, times_R, 1)  # [R, R] no game's own copy
                return float((weight_RR * cosine_RR).sum() / weight_RR.sum())

            numbers[key] = interval(mean, game_R)
            if pooling == "prompt and response":
                numbers[f"{key}, histogram"] = np.histogram(cosine_RR[chosen_RR], bins=50, range=(-1, 1))[0].tolist()
    return numbers


def answered(subject: Subject, replies: int) -> list[tuple[int, Row]]:
    """The questions as this model's prompts, each by its number with so many replies of its own."""
    actor, rollout = subject.engine.actor, subject.config.rollout
    prompts = {number: actor.encode(question) for number, (question, _) in enumerate(subject.questions)}
    asked = [number for number, ids in prompts.items() if len(ids) <= rollout.max_prompt_tokens] * replies
    sampling = [subject.sampling(number, salt=5) for number in range(len(asked))]
    samples = subject.engine.generate([prompts[number] for number in asked], sampling)
    return [
        (number, Row(np.array(prompts[number]), np.array(sample.ids)))
        for number, sample in zip(asked, samples, strict=True)
        if sample.ids
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Figure 3b


def step_influence(subject: Subject) -> Numbers:
    """Figure 3b: how other steps' replies change by one step of gradient ascent on one reply, by the kinds of both
    actions; different prompts alone. In mean log-prob per token of the reply (the map's), and of the action's words,
    and in these words' probability. The weights are put back."""
    config = subject.config
    all_trained = dataclasses.replace(config.model, tune="full", shard="never")
    whole = dataclasses.replace(config, model=all_trained)
    actor = load_actor(whole, path=subject.folder)  # in float32: the steps are small
    drawn = draw_steps(subject.own, min(TARGETS, config.judge.questions))
    rows, kinds = [row_of(step) for _, step in drawn], np.array([kind_of(step.action) for _, step in drawn])  # [R]
    differ_RR = np.array([[not np.array_equal(a.prompt_ids, b.prompt_ids) for b in rows] for a in rows])  # [R, R]
    before = likelihoods(actor, rows, config)
    kept = {name: weight.detach().cpu().clone() for name, weight in actor.model.named_parameters()}
    sources = range(min(SOURCES, len(rows)))
    sizes = step_sizes(actor, [rows[source] for source in sources], config)
    moves = {way: (direction, sizes[way]) for way, direction in DIRECTIONS.items()}
    moves |= {f"{way}, a tenth": (direction, size / 10) for way, (direction, size) in moves.items()}
    changes: dict[str, list[np.ndarray]] = defaultdict(list)  # what is measured -> of each source, [R]
    for source in progress_bar(sources, desc="Figure 3b", unit=" steps"):
        gradients = _gradients(actor, rows[source], config)
        for move, (direction, size) in moves.items():
            with stepped(actor, kept, (size * direction(gradient) for gradient in gradients)):
                after = likelihoods(actor, rows, config)
            for what, after_R in after.items():
                changes[what + move].append(after_R - before[what])
    numbers: Numbers = {"steps": len(rows), "sources": len(sources)}
    games = np.array([drawn[source][0].group for source in sources])  # [S]
    same_SR = (kinds[:, None] == kinds)[: len(sources)]  # [S, R]
    for name, change in changes.items():
        change_SR = np.where(differ_RR[: len(sources)], change, np.nan)  # [S, R]
        for kind, counted_SR in (("same", same_SR), ("other", ~same_SR)):
            some_S, mean_S = _row_means(change_SR, counted_SR)  # [S] each
            numbers[f"{kind} action, {name}"] = mean_of(mean_S[some_S], games[some_S])
        numbers[f"cells, {name}"] = _cells(change_SR, kinds)
    for way in DIRECTIONS:
        one_SR, tenth_SR = (np.abs(changes[f"reply{way}{note}"]) for note in ("", ", a tenth"))  # [S, R] each
        numbers[f"own change{way}"] = float(np.mean([one_SR[source, source] for source in sources]))
        ratios = (one_SR * differ_RR[: len(sources)]).sum(1) / (10 * tenth_SR * differ_RR[: len(sources)]).sum(1)
        numbers[f"change / 10 x change by a tenth{way}"] = float(np.median(ratios))
    return numbers


@contextmanager
def stepped(actor: Actor, kept: dict[str, torch.Tensor], moves: Iterable[torch.Tensor]) -> Iterator[None]:
    """The actor's weights moved, then as they were `kept`."""
    with torch.no_grad():
        for weight, move in zip(actor.model.parameters(), moves, strict=True):
            weight += move
        yield
        for name, weight in actor.model.named_parameters():
            weight.copy_(kept[name])


def _cells(change_SR: np.ndarray, kinds_R: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """[mean change, pairs] by the kind of the source and of the target; the sources are the first of the targets."""
    cells: dict[str, dict[str, list[float]]] = {}
    for first in np.unique(kinds_R[: len(change_SR)]):
        for second in np.unique(kinds_R):
            block = change_SR[kinds_R[: len(change_SR)] == first][:, kinds_R == second]
            if np.isfinite(block).any():
                pairs = int(np.isfinite(block).sum())
                cells.setdefault(str(first), {})[str(second)] = [float(np.nanmean(block)), pairs]
    return cells


def kind_of(action: str) -> str:
    """An action's kind: its words up to the first object's name; without such a name ("mug 1") its first word."""
    before, *named = OBJECT.split(action, maxsplit=1)
    return (before if named else before.partition(" ")[0]).strip() or "<invalid>"


def _row_means(value_SR: np.ndarray, where_SR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each source has any of the chosen targets, [S], and its mean over them, [S]."""
    chosen_SR = where_SR & np.isfinite(value_SR)  # [S, R]
    return chosen_SR.any(1), np.where(chosen_SR, value_SR, 0).sum(1) / chosen_SR.sum(1).clip(min=1)


def likelihoods(actor: Actor, rows: Sequence[Row], config: Config) -> dict[str, np.ndarray]:
    """Of each reply, float64 [R]: nat per token, nat per token of the action's words, and these words' probability;
    the latter are nan without such words."""
    found = all_logprobs(actor, rows, config.train.tokens_per_micro_batch, config.rollout.temperature)
    words = [action_tokens(pieces_of(actor, row.response_ids)) for row in rows]
    own = [logprobs.astype(np.float64)[where] for logprobs, where in zip(found, words, strict=True)]  # of [T] the words
    return {
        "reply": np.array([logprobs.astype(np.float64).mean() for logprobs in found]),
        "action's words": np.array([logprobs.mean() if len(logprobs) else np.nan for logprobs in own]),
        "probability": np.array([np.exp(logprobs.sum()) if len(logprobs) else np.nan for logprobs in own]),
    }


def step_sizes(actor: Actor, rows: Sequence[Row], config: Config) -> dict[str, float]:
    """Of each of DIRECTIONS the step's size: the reply that rises most rises by SELF_CHANGE, to first order."""
    gains: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        gradients = _gradients(actor, row, config)
        for way, direction in DIRECTIONS.items():
            gain = sum(float((gradient.double() * direction(gradient)).sum()) for gradient in gradients)
            gains[way].append(max(gain / len(row.response_ids), 1e-12))
    return {way: SELF_CHANGE / max(each) for way, each in gains.items()}


def _gradients(actor: Actor, row: Row, config: Config) -> list[torch.Tensor]:
    """Of the log-prob of a reply, by every parameter."""
    logp_T, _ = token_logprobs(actor, [row], config.rollout.temperature)  # [T]
    return list(torch.autograd.grad(logp_T.sum(), list(actor.model.parameters())))


# ----------------------------------------------------------------------------------------------------------------------
# Figures 8 and 9


def coupling_gaps(subject: Subject) -> Numbers:
    """Figure 8: the gap over all pairs, within games and between them, as cosine and by tokens."""
    panel = subject.panel
    rows = [row_of(question.step) for question in panel]
    influence_RR = influences(subject.engine.actor, rows, subject.config)  # [R, R]
    length_R = torch.tensor([len(row.response_ids) for row in rows], dtype=torch.float64)  # [R]
    label_R, game_R = (torch.tensor(one) for one in zip(*((q.step.label, q.group) for q in panel), strict=True))  # [R]
    within_RR = game_R[:, None] == game_R  # [R, R]
    pairs = {"": torch.ones_like(within_RR), " within games": within_RR, " between games": ~within_RR}  # [R, R] each
    numbers: Numbers = {"steps": len(panel)}
    for how in ("cos", "mean_src", "mean_both", "sum"):
        for where, counted_RR in pairs.items():

            def gap(times_R: np.ndarray, how: str = how, counted_RR: torch.Tensor = counted_RR) -> float:
                times = torch.from_numpy(times_R).double()  # [R]
                weight_RR = times[:, None] * torch.where(within_RR, 1, times)  # [R, R] no pair of a game and its copy
                return losses.coupling_gap(influence_RR, length_R, label_R, how, weight_RR * counted_RR)

            numbers[how + where] = interval(gap, game_R.numpy())
    return numbers


def similar_tokens(subject: Subject) -> Numbers:
    """Figure 9: which tokens of flawed actions are pulled along by good ones of the same game; and, where questions
    with answers are given, which tokens of wrong replies are by right ones to the same question."""
    games: dict[int, tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))  # flawed, good
    for question in subject.panel:
        games[question.group][question.step.label].append(row_of(question.step))
    numbers = pulled_tokens(subject, games)
    if not numbers["tokens"]:
        raise Missing("no game has both good and flawed labelled steps; more --games or --steps may find one")
    answers = [answer for _, answer in subject.questions]
    if any(answers):
        replies: dict[int, tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))
        for number, row in answered(subject, REPLIES):
            if answers[number]:
                said = subject.engine.actor.decode(row.response_ids)
                replies[number][is_right(said, answers[number])].append(row)
        found = pulled_tokens(subject, replies, to_question=True)
        numbers |= {f"questions: {key}": value for key, value in found.items()}
    return numbers


def is_right(reply: str, answer: str) -> bool:
    """Whether both end in the same number."""
    numbers = [NUMBER.findall(text) for text in (reply, answer)]
    said, true = (float(found[-1].replace(",", "")) if found else None for found in numbers)
    return said is not None and said == true


def pulled_tokens(
    subject: Subject, groups: dict[int, tuple[list[Row], list[Row]]], to_question: bool = False
) -> Numbers:
    """Of (flawed, good) replies by group: by class of the flawed ones' tokens their share of all positive influence by
    the good ones, with its interval over groups, and their mean; and the reply to show, which has the most of it."""
    config, actor = subject.config, subject.engine.actor
    pulls: list[tuple[int, str, float]] = []  # group, class, influence
    shown: list[tuple[str, float]] = []
    for group, (flawed, good) in groups.items():
        for row in flawed if good else ():
            pull_T = token_influences(actor, [row, *good], config)  # [T]
            pieces = pieces_of(actor, row.response_ids)
            classes = token_classes(pieces, to_question)
            pulls += [(group, kind, value) for kind, value in zip(classes, pull_T, strict=True)]
            example = [(piece, float(value)) for piece, value in zip(pieces, pull_T, strict=True)]
            if sum(max(0.0, value) for _, value in example) > sum(max(0.0, value) for _, value in shown):
                shown = example
    numbers: Numbers = {"tokens": len(pulls), "shown": shown}
    if not pulls:
        return numbers
    group_T, kind_T, value_T = (np.array(one) for one in zip(*pulls, strict=True))  # [T] each
    positive_T = value_T.clip(min=0)  # [T]
    for kind in CLASSES:
        own_T = kind_T == kind  # [T]
        numbers[f"{kind}, share of positive influence"] = interval(
            lambda times, own_T=own_T: float((times * positive_T * own_T).sum() / (times * positive_T).sum()), group_T
        )
        numbers[f"{kind}, mean influence"] = mean_of(value_T[own_T], group_T[own_T])
        numbers[f"{kind}, share of tokens"] = mean_of(own_T, group_T)
    return numbers


@torch.no_grad()
def token_influences(actor: Actor, rows: Sequence[Row], config: Config) -> np.ndarray:
    """For each response token of the first row the sum of its influences with all tokens of the others: float64 [T]."""
    hidden_TH, target_T = last_hidden(actor, rows)  # [T, H], [T]
    own = len(rows[0].response_ids)
    row_T = torch.arange(len(target_T), device=hidden_TH.device).clamp(
        max=own
    )  # [T] the other rows' tokens are one row
    errors = error_parts(actor, hidden_TH, target_T, config.rollout.temperature)
    return losses.couplings(hidden_TH.float(), errors, row_T)[:own, own].double().cpu().numpy()


def pieces_of(actor: Actor, ids: Sequence[int]) -> list[str]:
    """The text of each token: what decoding one more adds."""
    texts = [actor.tokenizer.decode(ids[:count]) for count in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in zip(texts, texts[1:], strict=False)]


def token_classes(pieces: Sequence[str], to_question: bool = False) -> list[str]:
    """The class of each piece of a reply, by the character in its middle. Replies to questions reason outside tags and
    speak of no objects."""
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
    """Which pieces of a reply are its action's words."""
    found = ACTION.search("".join(pieces))
    start, end = found.span(1) if found else (0, 0)
    return [number for number, at in enumerate(_middles(pieces)) if start <= at < end and pieces[number]]


def _middles(pieces: Sequence[str]) -> list[int]:
    """Where in the text the middle of each piece is."""
    ends = accumulate(len(piece) for piece in pieces)
    return [end - len(piece) + len(piece) // 2 for end, piece in zip(ends, pieces, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# Figure 10b


@torch.no_grad()
def layer_drift(subject: Subject) -> Numbers:
    """Figure 10b: per layer, how far this model is from the reference on the same tokens, in mean absolute difference
    and cosine: of logits through the final norm and the reference's output layer, and of the hidden states."""
    config, actor = subject.config, subject.engine.actor
    reference = load_actor(config, path=subject.reference, train=False)
    drawn = draw_steps(subject.start, SIMILAR_SAMPLES // 4)
    rows = [row_of(step) for _, step in drawn]
    sums: dict[str, np.ndarray] = {}
    tokens = 0
    for row in rows:
        own, other = (_layers(one, row) for one in (actor, reference))  # [layers + 1, T, H] each
        read = [_lens(reference, layers) for layers in (own, other)]  # [layers + 1, T, V] each
        for name, (a, b) in (("logits", read), ("hidden", (own, other))):
            gap, cosine = (a - b).abs().mean(-1), torch.nn.functional.cosine_similarity(a, b, dim=-1)  # [layers + 1, T]
            for what, value in (("difference", gap), ("cosine", cosine)):
                key = f"{name}, {what}"
                sums[key] = sums.get(key, 0.0) + value.double().sum(1).cpu().numpy()
        tokens += own.shape[1]
    about = {"reference": subject.reference, "tokens": tokens, "steps": len(rows)}
    return {key: (value / tokens).tolist() for key, value in sums.items()} | about


def _layers(actor: Actor, row: Row) -> torch.Tensor:
    """The states between layers where the response's tokens are predicted: float32 [layers + 1, T, H]; the last is
    taken before the final norm, as the others are."""
    caught: list[torch.Tensor] = []
    backbone = actor.inner.base_model
    hook = backbone.norm.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64))[None].to(actor.device)
    with actor.autocast():
        output = backbone(input_ids=ids, use_cache=False, output_hidden_states=True)
    hook.remove()
    first = len(row.prompt_ids) - 1
    return torch.cat([*output.hidden_states[:-1], caught[-1]])[:, first:-1].float()


def _lens(actor: Actor, layers_LTH: torch.Tensor) -> torch.Tensor:
    """The logits that the actor's final norm and output layer read from every layer: float32 [L, T, V]."""
    with actor.autocast():
        return actor.inner.get_output_embeddings()(actor.inner.base_model.norm(layers_LTH)).float()
