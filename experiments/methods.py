"""Other methods beside vBoN: other targets, or other losses. train.fine_tune trains them all.

    method     moves the policy to             by
    bound      π_ref · F^(N-1), the bound (3)  reverse KL, REINFORCE
    kl-rl      π_ref · exp(r / β)              reverse KL, REINFORCE: E[r] - β · KL(π_θ || π_ref)
    bon-sft    π_bon                           forward KL: maximum likelihood on winners
    bond       π_bon                           BOND's Jeffreys loss with N fixed: half of each

bond is not all of BOND (arXiv 2407.14622), which takes many small steps from a moving anchor.
Winners are the best of n of the cached responses of the reference: no new samples.
Each function below takes the place of train.vbon_gradient: it adds the gradient of its loss to the
policy's .grad, and returns means that are worth watching. Soft best-of-N (arXiv 2505.03156), which
needs no training, is at the end.
"""
import functools
import math

import torch
from torch import Tensor

import vbon
from experiments.theory import winner_weights
from model import GPT, prompts_at_a_time
from support import code
from train import Batch, Method, TuningSettings, watch

code.read_source(__file__)

METHODS = ("bound", "kl-rl", "bon-sft", "bond")
FROM_WINNERS = ("bon-sft", "bond")                      # these need n different cached responses


def choose_method(name: str, n: int, beta: float | None) -> Method:
    """Return one of METHODS; only kl-rl has a β."""
    gradients = {"bound": bound_gradient, "kl-rl": functools.partial(kl_rl_gradient, beta=beta),
                 "bon-sft": bon_sft_gradient, "bond": bond_gradient}
    label = f"{name} n={n}"
    if name == "kl-rl":
        label = f"kl-rl beta={beta:g}"
    return Method(label, (name, beta, n), gradients[name])

# ------------------------------------------------------------------- the same loss, another target

def bound_gradient(policy: GPT, reference: GPT, reward_fn, batch: Batch, n: int,
                   settings: TuningSettings, generator: torch.Generator) -> dict[str, float]:
    """vBoN with the bound (3) in the place of `bon_target`; returns win_rate and kl_ref."""
    n = vbon.grow(n, batch.step, settings.steps)
    part = prompts_at_a_time(policy, settings.k, settings.length)
    rollout = vbon.roll_out(policy, reference, reward_fn, batch.prompt, settings.k, settings.length,
                            generator, part)
    # (c): only the term i = 1 of equation (2)
    log_cdf = vbon.empirical_cdf(rollout.reward, batch.ref_rewards).log()
    log_target = vbon.bon_logprob_bound(rollout.ref_logprob, log_cdf, n)
    logprob = vbon.reinforce(policy, batch.prompt, rollout.response, log_target, part)
    return watch(batch, rollout, logprob)


def kl_rl_gradient(policy: GPT, reference: GPT, reward_fn, batch: Batch, n: int,
                   settings: TuningSettings, generator: torch.Generator, beta: float
                   ) -> dict[str, float]:
    """KL-regularised RL (arXiv 1909.08593) as a reverse KL to π_ref · exp(r / β), normalised.

    The normaliser is unknown, and drops out with the baseline. n is not used: its target has no N.
    Returns win_rate and kl_ref.
    """
    beta = grow_beta(beta, batch.step, settings.steps)
    part = prompts_at_a_time(policy, settings.k, settings.length)
    rollout = vbon.roll_out(policy, reference, reward_fn, batch.prompt, settings.k, settings.length,
                            generator, part)
    # (c): the reward itself, not how it ranks the response
    log_target = rollout.ref_logprob + rollout.reward.cpu().double() / beta
    logprob = vbon.reinforce(policy, batch.prompt, rollout.response, log_target, part)
    return watch(batch, rollout, logprob)


def grow_beta(beta: float, step: int, steps: int) -> float:
    """Return the β of this update: 1/β grows from 0 over the first 40 %, as N does for vBoN."""
    share = min(1.0, (step + 1) / (0.4 * steps))
    return beta / share

# ---------------------------------------------------------------------------------- another loss

def bon_sft_gradient(policy: GPT, reference: GPT, reward_fn, batch: Batch, n: int,
                     settings: TuningSettings, generator: torch.Generator) -> dict[str, float]:
    """Maximum likelihood on winners: the forward KL(π_bon || π_θ), up to a constant.

    It has no score that could be huge, so it aims for the full n from the first update. It needs
    neither reward nor reference: both have judged the cached responses. Returns nll, the loss in
    nats per response.
    """
    winners = sample_winners(batch, n, settings.k, generator)
    return {"nll": follow_likelihood(policy, batch.prompt, winners, settings)}


def bond_gradient(policy: GPT, reference: GPT, reward_fn, batch: Batch, n: int,
                  settings: TuningSettings, generator: torch.Generator) -> dict[str, float]:
    """BOND's Jeffreys loss with N fixed: the forward KL of bon-sft and the reverse KL of vBoN.

    It is their sum, where BOND has half of it: Adam's steps do not depend on the factor. Of the k
    responses to a prompt, half are winners and half are the policy's own. Returns nll of the
    winners, and win_rate and kl_ref of the policy's own responses.
    """
    n = vbon.grow(n, batch.step, settings.steps)
    part = prompts_at_a_time(policy, settings.k, settings.length)
    # the forward KL
    winners = sample_winners(batch, n, settings.k // 2, generator)
    nll = follow_likelihood(policy, batch.prompt, winners, settings)
    # the reverse KL
    own = settings.k - settings.k // 2
    rollout = vbon.roll_out(policy, reference, reward_fn, batch.prompt, own, settings.length,
                            generator, part)
    log_target = vbon.bon_target(rollout.ref_logprob, rollout.reward, batch.ref_rewards, n)
    logprob = vbon.reinforce(policy, batch.prompt, rollout.response, log_target, part)
    return {"nll": nll} | watch(batch, rollout, logprob)


def follow_likelihood(policy: GPT, prompt: Tensor, response: Tensor, settings: TuningSettings
                      ) -> float:
    """Add the gradient of the negative log-likelihood of responses (P, K, L) to .grad.

    Returns it in nats per response.
    """
    part = prompts_at_a_time(policy, settings.k, settings.length)
    nll = 0.0
    for x, y in zip(prompt.split(part), response.split(part)):
        share = len(x) / len(prompt)
        loss = -share * policy.logprob(x, y).mean()
        loss.backward()
        nll += loss.item()
    return nll


def sample_winners(batch: Batch, n: int, k: int, generator: torch.Generator) -> Tensor:
    """Return k responses to each prompt (P, k, L), each the best of n different cached ones."""
    weight = winner_weights(batch.ref_rewards, n).float().to(generator.device)
    best = torch.multinomial(weight, k, replacement=True, generator=generator)
    best = best.to(batch.ref_response.device)
    rows = torch.arange(len(best), device=best.device)[:, None]
    return batch.ref_response[rows, best]

# ------------------------------------------------------------------------- decoding: soft best-of-N

def soft_best_of_n(reward: Tensor, beta: float, generator: torch.Generator) -> Tensor:
    """Return the index of one of N responses, with probability ∝ exp(r / β). (P, N) -> (P,)"""
    chance = (reward.cpu().double() / beta).softmax(-1)
    return torch.multinomial(chance, 1, generator=generator)[:, 0]


def soft_bon_logprob(ref_logprob: Tensor, reward: Tensor, ref_rewards: Tensor, n: int, beta: float
                     ) -> Tensor:  # (P, K), (P, K), (P, M) -> (P, K)
    """Return the log-probability of y under soft best-of-n: π_ref(y) · n · P(y wins).

    Against n - 1 rivals, y wins with probability e^(r/β) / (e^(r/β) + Σ e^(rival/β)). This is
    averaged over groups of n - 1 of the M reference rewards, each used once. Needs M >= n - 1.
    """
    ref_logprob = ref_logprob.cpu().double()
    if n == 1:
        return ref_logprob
    P, M = ref_rewards.shape
    groups = M // (n - 1)
    rivals = ref_rewards.cpu().double()[:, :groups * (n - 1)] / beta
    rivals = rivals.view(P, 1, groups, n - 1).logsumexp(-1)                 # (P, 1, groups)
    own = reward.cpu().double()[:, :, None] / beta                          # (P, K, 1)
    log_win = torch.nn.functional.logsigmoid(own - rivals)                  # (P, K, groups)
    return ref_logprob + math.log(n) + log_win.logsumexp(-1) - math.log(groups)
