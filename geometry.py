"""Figures of what checkpoints are: likeness of hidden states, influence of one sample on another, drift of layers.

measure functions of analysis.py, each of one Subject.  Influences are first-order ones of the output layer (paper,
equation 2; losses.coupling) except in Figure 3b, which takes the step and looks.

Decisions where the paper is silent: a sample's state is the mean of its hidden states after the final norm, over prompt
and response; cosines stand beside those of states less their mean, for language models' states all point one way.
Figure 3b's step is plain gradient ascent on the log-prob of one response, of one size for all responses: the one that
it raises most it raises by 0.05 nat a token, to first order.  Figure 9 classes tokens by where they stand: tags, the
action's words, names of objects, the rest of the thought.  Figure 10b puts every layer through the final norm and the
reference's output layer.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

import losses
from behaviour import Numbers, Subject, interval, mean_of
from config import Config
from model import Actor, Row, all_logprobs, last_hidden, load_actor, micro_batches, token_logprobs
from rollout import Episode, Step
from telemetry import error_parts, influences

SIMILAR_SAMPLES = 200  # whose states are compared
SOURCES, TARGETS = 12, 48  # of Figure 3b's steps
SELF_CHANGE = 0.05  # nat per token, of the sample that is learned from
CLASSES = ("tags", "action words", "object names", "reasoning", "other")
OBJECT = re.compile(r"\b[a-z]+ \d+\b")


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
        rows = _answered(subject)
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


def _answered(subject: Subject) -> list[Row]:
    """The questions as this model's prompts, with a reply of its own to each."""
    actor, rollout = subject.engine.actor, subject.config.rollout
    prompt_ids = [actor.encode(question) for question in subject.questions]
    prompt_ids = [ids for ids in prompt_ids if len(ids) <= rollout.max_prompt_tokens]
    sampling = [subject.sampling(number, salt=5) for number in range(len(prompt_ids))]
    samples = subject.engine.generate(prompt_ids, sampling)
    return [Row(np.array(ids), np.array(one.ids)) for ids, one in zip(prompt_ids, samples, strict=True) if one.ids]


# ----------------------------------------------------------------------------------------------------------------------
# Figure 3b


def step_influence(subject: Subject) -> Numbers:
    """Figure 3b: how the mean log-prob per token of other steps' responses changes by one step of gradient ascent on
    one response, by the kinds of both actions; different prompts alone. The weights are put back."""
    config = subject.config
    all_trained = dataclasses.replace(config.model, tune="full", shard="never")
    whole = dataclasses.replace(config, model=all_trained)
    actor = load_actor(whole, path=subject.folder)  # in float32: the steps are small
    drawn = draw_steps(subject.own, min(TARGETS, config.judge.questions))
    steps, rows = [step for _, step in drawn], [row_of(step) for _, step in drawn]
    kinds = [kind_of(step.action) for step in steps]
    before_R = _mean_logprobs(actor, rows, config)  # [R]
    kept = {name: weight.detach().cpu().clone() for name, weight in actor.model.named_parameters()}
    sources = range(min(SOURCES, len(rows)))
    size = SELF_CHANGE / max(_first_order_gain(actor, rows[source], config) for source in sources)
    changes, halves, own = [], [], []
    for source in tqdm(sources, desc="steps", leave=False):
        change_R = _step(actor, kept, rows, source, size, config) - before_R  # [R]
        tenth_R = _step(actor, kept, rows, source, size / 10, config) - before_R  # [R]
        others_R = np.array([row.prompt_ids.tolist() != rows[source].prompt_ids.tolist() for row in rows])  # [R]
        changes.append(np.where(others_R, change_R, np.nan))
        own.append(change_R[source])
        halves.append(np.abs(change_R[others_R]).sum() / (10 * np.abs(tenth_R[others_R]).sum()))
    change_SR = np.array(changes)  # [S, R]
    names = sorted(set(kinds))
    cells: dict[str, dict[str, list[float]]] = {}
    for first in names:
        for second in names:
            block = change_SR[[kinds[s] == first for s in range(len(changes))]][:, [kind == second for kind in kinds]]
            if np.isfinite(block).any():
                cells.setdefault(first, {})[second] = [float(np.nanmean(block)), int(np.isfinite(block).sum())]
    same = np.array([[kinds[s] == kind for kind in kinds] for s in range(len(changes))])  # [S, R]
    games = np.array([drawn[s][0].group for s in range(len(changes))])  # [S]
    return {
        "steps": len(rows),
        "sources": len(changes),
        "own change": float(np.mean(own)),
        "change / 10 x change by a tenth": float(np.median(halves)),
        "same action": mean_of(_row_means(change_SR, same), games),
        "other action": mean_of(_row_means(change_SR, ~same), games),
        "cells": cells,
    }


def kind_of(action: str) -> str:
    """An action's kind: its words up to the first object's name."""
    return OBJECT.split(action)[0].strip() or "<invalid>"


def _row_means(value_SR: np.ndarray, where_SR: np.ndarray) -> np.ndarray:
    """Each source's mean over the chosen targets, [S]; 0 where it has none."""
    chosen_SR = where_SR & np.isfinite(value_SR)  # [S, R]
    return np.where(chosen_SR, value_SR, 0).sum(1) / chosen_SR.sum(1).clip(min=1)


def _mean_logprobs(actor: Actor, rows: Sequence[Row], config: Config) -> np.ndarray:
    """Nat per response token of each row: float64 [R]."""
    found = all_logprobs(actor, rows, config.train.tokens_per_micro_batch, config.rollout.temperature)
    return np.array([logprobs.astype(np.float64).mean() for logprobs in found])


def _gradients(actor: Actor, row: Row, config: Config) -> list[torch.Tensor]:
    """Of the log-prob of a response, by every parameter."""
    logp_T, _ = token_logprobs(actor, [row], config.rollout.temperature)  # [T]
    return list(torch.autograd.grad(logp_T.sum(), list(actor.model.parameters())))


def _first_order_gain(actor: Actor, row: Row, config: Config) -> float:
    """Nat per token that a unit step on a response gives it."""
    square = sum(float((gradient.double() ** 2).sum()) for gradient in _gradients(actor, row, config))
    return max(square / len(row.response_ids), 1e-12)


def _step(
    actor: Actor, kept: dict[str, torch.Tensor], rows: Sequence[Row], source: int, size: float, config: Config
) -> np.ndarray:
    """_mean_logprobs after a step on row `source`; the weights are put back."""
    gradients = _gradients(actor, rows[source], config)
    with torch.no_grad():
        for weight, gradient in zip(actor.model.parameters(), gradients, strict=True):
            weight += size * gradient
        after_R = _mean_logprobs(actor, rows, config)  # [R]
        for name, weight in actor.model.named_parameters():
            weight.copy_(kept[name])
    return after_R


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
    """Figure 9: which tokens of flawed actions are pulled along by good ones of the same game: each token's influence,
    its share of all that is positive by class, and one flawed response to show."""
    panel, config, actor = subject.panel, subject.config, subject.engine.actor
    games: dict[int, list[Step]] = defaultdict(list)
    for question in panel:
        games[question.group].append(question.step)
    pulls: list[tuple[int, str, float]] = []  # game, class, influence
    shown: list[tuple[str, float]] = []
    for game, steps in games.items():
        good = [step for step in steps if step.label]
        for flawed in (step for step in steps if not step.label and good):
            rows = [row_of(step) for step in (flawed, *good)]
            pull_T = token_influences(actor, rows, config)  # [T]
            pieces = pieces_of(actor, flawed.response_ids)
            classes = token_classes(pieces)
            pulls += [(game, kind, value) for kind, value in zip(classes, pull_T, strict=True)]
            example = [(piece, float(value)) for piece, value in zip(pieces, pull_T, strict=True)]
            if sum(max(0.0, value) for _, value in example) > sum(max(0.0, value) for _, value in shown):
                shown = example
    numbers: Numbers = {"tokens": len(pulls), "shown": shown}
    if not pulls:
        return numbers
    game_T, kind_T, value_T = (np.array(one) for one in zip(*pulls, strict=True))  # [T] each
    positive_T = value_T.clip(min=0)  # [T]
    for kind in CLASSES:
        own_T = kind_T == kind  # [T]
        numbers[f"{kind}, share of positive influence"] = interval(
            lambda times, own_T=own_T: float((times * positive_T * own_T).sum() / (times * positive_T).sum()), game_T
        )
        numbers[f"{kind}, mean influence"] = mean_of(value_T[own_T], game_T[own_T])
        numbers[f"{kind}, share of tokens"] = mean_of(own_T, game_T)
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


def token_classes(pieces: Sequence[str]) -> list[str]:
    """The class of each piece of a reply, by the character in its middle."""
    text = "".join(pieces)
    kinds = ["other"] * len(text)

    def mark(start: int, end: int, kind: str) -> None:
        kinds[start:end] = [kind] * (end - start)

    for tag, kind in (("action", "action words"), (r"think|planning|explore|reflection|monitor", "reasoning")):
        for found in re.finditer(rf"<({tag})>(.*?)(</\1>|$)", text, re.DOTALL):
            mark(*found.span(2), kind)
    for found in OBJECT.finditer(text):
        mark(*found.span(), "object names")
    for found in re.finditer(r"</?\w+>", text):
        mark(*found.span(), "tags")
    classes, position = [], 0
    for piece in pieces:
        middle = position + len(piece) // 2
        special = re.fullmatch(r"\s*<\|.*\|>\s*", piece)
        classes.append("other" if special or not piece or middle >= len(kinds) else kinds[middle])
        position += len(piece)
    return classes


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
    return {key: (value / tokens).tolist() for key, value in sums.items()} | {"tokens": tokens, "steps": len(rows)}


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
