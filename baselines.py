"""What only PPO and NTHR need: the value model and its advantages, the reweighting of lost replies' tokens.

The baselines of the paper's comparison that are more than an advantage function.  Pure functions first, then the value
model (`PPO`) and the pass that NTHR makes (`nthr_reweight`).

Departures from published code: PPO's sample is one step of an episode, a sequence of its own with its score as the
reward of its last token, as published; values start at 0, the head being new; statistics are in float64.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForTokenClassification

from checkpoint import TrainState
from config import Config
from distributed import (
    Optimizer,
    adamw,
    all_gather_objects,
    progress_bar,
    sum_dicts,
    unsharded,
    unsharded_forward,
)
from logger import save_bad_samples
from losses import check_lengths, compact_ids, discounted_sums, sample_means
from model import (
    LanguageModel,
    by_sample,
    head_logprobs,
    last_hidden,
    loading_options,
    logit_gradients,
    place_on_device,
    read_weights,
    training_batches,
)
from model_files import base_of, is_adapter
from packing import MicroBatch, Sample, micro_batches


def generalised_advantage(
    reward_T: Tensor, value_T: Tensor, gamma: float, lam: float, sample_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute (advantage_T, return_T), float32 [T] each: delta_t = r_t + gamma V_(t+1) - V_t, A_t = delta_t + gamma lam
    A_(t+1), return = A + V, with V = A = 0 after the last token. With sample_T each sample is a sequence of its own.

    All [T], on any device, tokens of a sample in order. Raises ValueError where lengths differ. Source: GAE (Schulman
    et al. 2016). With r = (0, 1), V = (.5, .25), gamma = lam = 1: A = (.5, .75), return = (1, 1).
    """
    check_lengths(reward_T=reward_T, value_T=value_T, sample_T=sample_T)
    sample_T = torch.zeros(len(reward_T), dtype=torch.int64) if sample_T is None else sample_T
    value_64_T, next_T = value_T.cpu().double(), torch.zeros(len(value_T)).double()
    index_T, _ = compact_ids(sample_T)
    order_T = torch.argsort(index_T, stable=True)  # samples side by side, each in its order
    follows_T = index_T[order_T][1:] == index_T[order_T][:-1]
    next_T[order_T[:-1][follows_T]] = value_64_T[order_T[1:][follows_T]]
    delta_T = reward_T.cpu().double() + gamma * next_T - value_64_T
    advantage_T = discounted_sums(delta_T, index_T, gamma * lam)
    parts = (advantage_T, advantage_T + value_64_T)
    return tuple(part_T.to(value_T.device, torch.float32) for part_T in parts)


def whiten(value_T: Tensor, eps: float = 1e-8) -> Tensor:
    """Compute (value - mean) / sqrt(unbiased variance + eps) over all [T], float32; equal values give exactly 0.

    Source: PPO's advantages in verl.
    """
    exact_T = value_T.double()
    if len(exact_T) < 2 or exact_T.min() == exact_T.max():
        return torch.zeros_like(value_T, dtype=torch.float32)
    return ((exact_T - exact_T.mean()) / (exact_T.var() + eps).sqrt()).float()


def value_loss(value_T: Tensor, old_value_T: Tensor, return_T: Tensor, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute 0.5 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), [T], in squared units of reward.

    Returns (loss_T, detached means): `value_clip_fraction`, the tokens whose clipped error is the larger. Raises
    ValueError where lengths differ. Source: PPO as in verl. With V = 1, V_old = 0, R = 2, clip = .5: max(1, 2.25) / 2.
    """
    check_lengths(value_T=value_T, old_value_T=old_value_T, return_T=return_T)
    old_value_T = old_value_T.detach()
    near_T = torch.clamp(value_T, old_value_T - clip, old_value_T + clip)
    plain_T, clipped_T = (value_T - return_T) ** 2, (near_T - return_T) ** 2
    metrics = {"value_clip_fraction": (clipped_T > plain_T).float().mean()}
    return 0.5 * torch.maximum(plain_T, clipped_T), metrics


def nthr_weights(
    hidden_TH: Tensor,
    logit_grad: Callable[[slice], Tensor],
    sample_T: Tensor,
    won_T: Tensor,
    beta: float,
    eta: float,
    at_once: int = 2048,
) -> tuple[Tensor, dict[str, float]]:
    """Find factors on the advantages of one group's tokens, float32 [T]: eta for the tokens of lost samples that pull
    the won ones along, else 1.

    hidden_TH: the old policy's input to the lm_head at each response token; logit_grad: gives, for a slice of at most
    `at_once` tokens, one-hot of each minus the policy's probabilities, [*, V], over the vocabulary or the part of it
    that the group's responses use; won_T: bool. A token's influence is s = g^T M h with M = sum of g h^T over the won
    samples' tokens; the threshold is beta times the least mean s of a won sample; lost ones' tokens above it are
    selected. A group without both kinds is left alone.
    Returns (factor_T, {"tau", "selected": number of tokens}). Raises ValueError where lengths differ. No gradient.
    Source: NTHR (Deng et al. 2025), equations 6 to 8; a sample counts for itself in its mean, as in their formula.
    """
    check_lengths(sample_T=sample_T, won_T=won_T, hidden_TH=hidden_TH[:, 0])
    factor_T = torch.ones(len(sample_T), dtype=torch.float32, device=hidden_TH.device)
    won_T = won_T.bool()
    if won_T.all() or not won_T.any():
        return factor_T, {"tau": math.nan, "selected": 0}
    parts = [slice(first, first + at_once) for first in range(0, len(sample_T), at_once)]
    pull_VH = sum((logit_grad(part) * won_T[part, None]).T @ hidden_TH[part] for part in parts)
    influence_T = torch.cat([((logit_grad(part) @ pull_VH) * hidden_TH[part]).sum(-1) for part in parts])
    tau = beta * float(sample_means(influence_T, sample_T)[won_T].min())
    selected_T = ~won_T & (influence_T > tau)
    return torch.where(selected_T, eta, factor_T), {"tau": tau, "selected": int(selected_T.sum())}


# ----------------------------------------------------------------------------------------------------------------------
# PPO


class PPO:
    """PPO's value model ("critic") beside the policy, with an optimizer of its own."""

    def __init__(self, config: Config, policy: LanguageModel, state: TrainState) -> None:
        saved_critic = Path(state.folder) / "trainer" / "critic"
        self.config = config
        self.critic = load_critic(config, policy, str(saved_critic) if saved_critic.is_dir() else state.folder)
        make = functools.partial(adamw, kind=config.train.optimizer)
        self.optimizer = Optimizer(self.critic.model, config.train.weight_decay, make)
        if saved := state.optimizer_states.pop("critic", None):
            self.optimizer.load_state_dict(saved)

    @torch.no_grad()
    def set_values(self, samples: Sequence[Sample]) -> None:
        """Write what the critic says of each action's tokens before the update."""
        actions = [sample for sample in samples if not sample.is_critique]
        found = by_sample(
            self.critic,
            actions,
            self.config.train.tokens_per_micro_batch,
            lambda batch: token_values(self.critic, batch),
        )
        for sample, values in zip(actions, found, strict=True):
            sample.values = values

    def set_advantages(self, samples: Sequence[Sample]) -> None:
        """Turn the scores of all ranks' actions into whitened advantages of their tokens, and values to train towards.

        A sample's advantage so far, its score, is the reward of its last token. Samples that count nowhere are left as
        they are.
        """
        algo = self.config.algo
        actions = [sample for sample in samples if not sample.is_critique and sample.num_loss_tokens]
        lengths = torch.tensor([len(sample.response_ids) for sample in actions])
        sample_T = torch.arange(len(actions)).repeat_interleave(lengths)
        reward_T = torch.zeros(len(sample_T))
        reward_T[lengths.cumsum(0) - 1] = torch.tensor([sample.advantage for sample in actions])
        value_T = torch.from_numpy(np.concatenate([sample.values for sample in actions]))
        advantage_T, return_T = generalised_advantage(reward_T, value_T, algo.gae_gamma, algo.gae_lambda, sample_T)
        parts = (part_T.split(lengths.tolist()) for part_T in (whiten(advantage_T), return_T))
        for sample, advantage, returns in zip(actions, *parts, strict=True):
            sample.advantage, sample.returns = advantage.numpy(), returns.numpy()

    def update(
        self, samples: Sequence[Sample], batches: Sequence[Sequence[Sequence[Sample]]], lr: float, iteration: int
    ) -> dict[str, float]:
        """Train the critic on the actions of the policy's mini-batches; a mean over their tokens. Returns metrics."""
        rank, world, train = dist.get_rank(), dist.get_world_size(), self.config.train
        sums: dict[str, float] = defaultdict(float)
        self.critic.model.train()
        for batch in progress_bar(batches, desc="update critic", unit=" steps"):
            tokens = sum(len(one.returns) for share in batch for one in share if one.returns is not None)
            own = [sample for sample in batch[rank] if sample.returns is not None]
            for part in training_batches(self.critic, own, train.tokens_per_micro_batch):
                value_T = token_values(self.critic, part)
                if not part.samples:  # another rank has more of them
                    (0 * value_T.sum()).backward()
                    continue
                old_T, return_T = (
                    torch.from_numpy(np.concatenate(one)).to(value_T)
                    for one in zip(*((sample.values, sample.returns) for sample in part.samples), strict=True)
                )
                loss_T, metrics = value_loss(value_T, old_T, return_T, self.config.algo.value_clip)
                loss = loss_T.sum() / tokens
                loss.backward()
                sums["loss"] += float(loss.detach())
                sums["clipped"] += float(metrics["value_clip_fraction"]) * len(value_T)
                sums["tokens"] += len(value_T)
            save = functools.partial(save_bad_samples, batch, self.critic, self.config, iteration)
            norm = self.optimizer.step(lr, train.max_grad_norm, save)
            if math.isfinite(norm):
                sums["grad_norm"] += norm / world
            else:
                sums["skipped"] += 1 / world
        self.critic.model.eval()
        sums = defaultdict(float, sum_dicts(all_gather_objects([sums])))
        trained = [sample for sample in samples if sample.returns is not None]
        value_T, return_T = (
            np.concatenate([getattr(sample, key) for sample in trained]) for key in ("values", "returns")
        )
        return {
            "critic/loss": sums["loss"] / len(batches),
            "critic/clip_fraction": sums["clipped"] / max(1, sums["tokens"]),
            "critic/grad_norm": sums["grad_norm"] / max(1, len(batches) - round(sums["skipped"])),
            "critic/skipped_steps": round(sums["skipped"]),
            "critic/value": float(value_T.mean()),
            "critic/explained_variance": float(1 - np.var(return_T - value_T) / max(np.var(return_T), 1e-12)),
        }


def load_critic(config: Config, policy: LanguageModel, path: str) -> LanguageModel:
    """Load the model of `path` with a scalar head in the lm_head's place, in evaluation mode.

    The head of a language model's checkpoint starts at 0: the first values are 0, the same on every rank.
    """
    adapter, base = path if is_adapter(path) else "", base_of(path, config)
    shape = AutoConfig.from_pretrained(base, num_labels=1)
    shape.classifier_dropout = 0.0
    options = loading_options(config, train=True)
    if "quantization_config" in options:
        options["quantization_config"].llm_int8_skip_modules = ["score"]  # it is trained
    options["config"] = shape
    model, new = read_weights(AutoModelForTokenClassification, base, options, new="score.", unread="lm_head.")
    if new:
        torch.nn.init.zeros_(model.score.weight)
        torch.nn.init.zeros_(model.score.bias)
    model.score.float()
    return place_on_device(config, model, policy.chat, base, adapter, train=True, task="TOKEN_CLS")


def token_values(critic: LanguageModel, batch: MicroBatch) -> Tensor:
    """Compute the critic's value where each response token is predicted, in units of reward: float32 [T]."""

    def score() -> Tensor:
        hidden_TH, _ = last_hidden(critic, batch)
        # not under autocast: bfloat16 would round returns of 10; a sum of one, for FSDP wants no view
        return critic.inner.score(hidden_TH.float()).sum(-1)

    return unsharded_forward(critic.fsdp_root, score)


# ----------------------------------------------------------------------------------------------------------------------
# NTHR


@torch.no_grad()
def nthr_reweight(policy: LanguageModel, samples: Sequence[Sample], config: Config) -> None:
    """Weaken the negative advantage of those tokens of lost replies that pull the group's won ones along.

    `samples` are actions of whole groups. The pass gives the old policy's log-probs, too, which are kept. Source: NTHR.
    """
    algo = config.algo
    groups: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.group].append(sample)
    with unsharded(policy.fsdp_root):
        for group in groups.values():
            won = {sample.trajectory: sample.won for sample in group}
            if len(set(won.values())) == 2:
                eta = 2 * abs(0.5 - np.mean(list(won.values()))) if algo.nthr_eta is None else algo.nthr_eta
                _reweight_group(policy, group, float(eta), config)


def _reweight_group(policy: LanguageModel, group: Sequence[Sample], eta: float, config: Config) -> None:
    """Do nthr_reweight for the samples of one group, some of which are won."""
    temperature = config.rollout.temperature
    batches = micro_batches(group, config.train.tokens_per_micro_batch, policy.packing)
    hidden_TH, target_T = (
        torch.cat(one) for one in zip(*[last_hidden(policy, batch) for batch in batches], strict=True)
    )
    logp_T, _ = head_logprobs(policy, hidden_TH, target_T, temperature)
    token_V = target_T.unique()  # the tokens that occur in the group's replies: elsewhere the gradients are small

    def logit_grad(part: slice) -> Tensor:
        return logit_gradients(policy, hidden_TH[part], target_T[part], temperature, token_V, logp_T=logp_T[part])

    ordered = [sample for batch in batches for sample in batch.samples]
    lengths = [len(sample.response_ids) for sample in ordered]
    sample_T = torch.arange(len(ordered)).repeat_interleave(torch.tensor(lengths)).to(policy.device)
    won_T = torch.tensor([sample.won for sample in ordered], device=policy.device)[sample_T]
    factor_T, _ = nthr_weights(hidden_TH.float(), logit_grad, sample_T, won_T, config.algo.nthr_beta, eta)
    for sample, logprobs, factor in zip(ordered, logp_T.split(lengths), factor_T.split(lengths), strict=True):
        if config.train.old_logprobs == "trainer":
            sample.old_logprobs = logprobs.float().cpu().numpy()
        if sample.advantage < 0:
            sample.advantage = sample.advantage * factor.cpu().numpy()
            sample.nthr_tokens = int((factor != 1).sum())
