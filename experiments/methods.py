"""Other methods beside vBoN: other targets, or other ways to one. Each update is vbon.update with
other lines (a) to (e), written out once more.

    method     moves the policy to             by
    bound      π_ref · F^(N-1), the bound (3)  reverse KL, REINFORCE
    kl-rl      π_ref · exp(r / β)              reverse KL, REINFORCE: E[r] - β · KL(π_θ || π_ref)
    bon-sft    π_bon                           forward KL: maximum likelihood on winners
    bond       π_bon                           BOND's Jeffreys loss with N fixed: half of each

bond is not all of BOND (arXiv 2407.14622): that goes in many small steps, from a moving anchor.
Winners are the best of n of the responses that the reference has given before: no new samples.
Soft best-of-N (arXiv 2505.03156), which needs no training, stands at the end.
"""
import copy
import math
import time
from pathlib import Path

import torch
from torch import Tensor

import train
import vbon
from experiments.theory import winner_weights
from model import GPT, add_adapters, merge_adapters

METHODS = ("bound", "kl-rl", "bon-sft", "bond")
FROM_WINNERS = ("bon-sft", "bond")                      # these want n different cached responses

# --------------------------------------------------------------------------------------- one update

def update_bound(policy, reference, optimizer: torch.optim.Optimizer, reward_fn, prompt: Tensor,
                 ref_rewards: Tensor, n: int, k: int, length: int, generator: torch.Generator,
                 part: int) -> dict[str, float]:
    """vbon.update with the bound (3) in the place of `bon_target`; returns win_rate and kl_ref."""
    watched = []
    optimizer.zero_grad()
    for x, refs in zip(prompt.split(part), ref_rewards.split(part)):
        with torch.no_grad():
            response, _ = policy.sample(x, k, length, generator)            # (P, K, L)
            reward = reward_fn(x, response)                                 # (P, K)
            ref_logprob = reference.logprob(x, response).cpu().double()     # (P, K)
            # (c) the term i = 1 of equation (2) alone
            log_cdf = vbon.empirical_cdf(reward, refs).log()
            log_target = vbon.bon_logprob_bound(ref_logprob, log_cdf, n)
        logprob = policy.logprob(x, response).cpu().double()
        share = len(x) / len(prompt)
        loss = share * vbon.reverse_kl_loss(logprob, log_target)
        loss.backward()
        wins = vbon.win_rate(reward, refs)
        watched.append(torch.stack([wins, logprob.detach() - ref_logprob]))
    optimizer.step()
    wins, kl_ref = torch.cat(watched, 1).mean((1, 2)).tolist()
    return {"win_rate": wins, "kl_ref": kl_ref}


def update_kl_rl(policy, reference, optimizer: torch.optim.Optimizer, reward_fn, prompt: Tensor,
                 ref_rewards: Tensor, beta: float, k: int, length: int, generator: torch.Generator,
                 part: int) -> dict[str, float]:
    """KL-regularised RL (arXiv 1909.08593) as a reverse KL: to π_ref · exp(r / β), normalised.

    The constant that normalises it is unknown, and drops out with the baseline. ref_rewards serve
    only to watch the win rate. Returns win_rate and kl_ref.
    """
    watched = []
    optimizer.zero_grad()
    for x, refs in zip(prompt.split(part), ref_rewards.split(part)):
        with torch.no_grad():
            response, _ = policy.sample(x, k, length, generator)            # (P, K, L)
            reward = reward_fn(x, response)                                 # (P, K)
            ref_logprob = reference.logprob(x, response).cpu().double()     # (P, K)
            # (c) the reward itself, not how it ranks the response
            log_target = ref_logprob + reward.cpu().double() / beta
        logprob = policy.logprob(x, response).cpu().double()
        share = len(x) / len(prompt)
        loss = share * vbon.reverse_kl_loss(logprob, log_target)
        loss.backward()
        wins = vbon.win_rate(reward, refs)
        watched.append(torch.stack([wins, logprob.detach() - ref_logprob]))
    optimizer.step()
    wins, kl_ref = torch.cat(watched, 1).mean((1, 2)).tolist()
    return {"win_rate": wins, "kl_ref": kl_ref}


def update_bon_sft(policy, optimizer: torch.optim.Optimizer, prompt: Tensor, ref_response: Tensor,
                   ref_rewards: Tensor, n: int, k: int, generator: torch.Generator, part: int
                   ) -> dict[str, float]:
    """Maximum likelihood on k winners for each prompt, among ref_response (P, M, L).

    The loss is the forward KL(π_bon || π_θ), up to a constant. Neither a reward nor a reference is
    needed any more: both have spoken already. Returns nll, the loss in nats a response.
    """
    nll = 0.0
    optimizer.zero_grad()
    parts = zip(prompt.split(part), ref_response.split(part), ref_rewards.split(part))
    for x, cached, refs in parts:
        response = draw_winners(cached, refs, n, k, generator)              # (P, K, L)
        logprob = policy.logprob(x, response)
        share = len(x) / len(prompt)
        loss = -share * logprob.mean()
        loss.backward()
        nll += loss.item()
    optimizer.step()
    return {"nll": nll}


def update_bond(policy, reference, optimizer: torch.optim.Optimizer, reward_fn, prompt: Tensor,
                ref_response: Tensor, ref_rewards: Tensor, n: int, k: int,
                generator: torch.Generator, part: int) -> dict[str, float]:
    """BOND's Jeffreys loss with N fixed: half the forward KL of bon-sft, half the reverse of vBoN.

    Of the k responses to a prompt, half are winners and half are the policy's own. Returns nll of
    the winners, and win_rate and kl_ref of its own responses.
    """
    length = ref_response.shape[-1]
    watched = []
    nll = 0.0
    optimizer.zero_grad()
    parts = zip(prompt.split(part), ref_response.split(part), ref_rewards.split(part))
    for x, cached, refs in parts:
        share = len(x) / len(prompt)
        # the forward half, as in `update_bon_sft`
        winners = draw_winners(cached, refs, n, k // 2, generator)          # (P, K/2, L)
        forward = -policy.logprob(x, winners).mean()
        (share * 0.5 * forward).backward()
        nll += share * forward.item()
        # the reverse half, as in vbon.update
        with torch.no_grad():
            response, _ = policy.sample(x, k - k // 2, length, generator)
            reward = reward_fn(x, response)
            ref_logprob = reference.logprob(x, response).cpu().double()
            log_target = vbon.bon_target(ref_logprob, reward, refs, n)
        logprob = policy.logprob(x, response).cpu().double()
        loss = share * 0.5 * vbon.reverse_kl_loss(logprob, log_target)
        loss.backward()
        wins = vbon.win_rate(reward, refs)
        watched.append(torch.stack([wins, logprob.detach() - ref_logprob]))
    optimizer.step()
    wins, kl_ref = torch.cat(watched, 1).mean((1, 2)).tolist()
    return {"nll": nll, "win_rate": wins, "kl_ref": kl_ref}


def draw_winners(response: Tensor, rewards: Tensor, n: int, k: int, generator: torch.Generator
                 ) -> Tensor:  # (P, M, L), (P, M) -> (P, k, L)
    """k responses to each prompt, each the best of n different ones among the M given."""
    weight = winner_weights(rewards, n).float().to(generator.device)
    best = torch.multinomial(weight, k, replacement=True, generator=generator)
    best = best.to(response.device)
    rows = torch.arange(len(response), device=response.device)[:, None]
    return response[rows, best]

# -------------------------------------------------------------------------------------- fine-tuning

def get_policy(out: Path, method: str, beta: float | None, reference: GPT, reward: train.Reward,
               prompts: Tensor, samples: train.Samples, n: int, settings: train.Settings, seed: int
               ) -> tuple[GPT, list[dict], float]:
    """As train.get_policy, for one of METHODS: the policy, what was watched, and seconds."""
    device = reference.wte.weight.device
    name = f"n{n}"
    if method == "kl-rl":
        # its target has no N: a policy of one beta serves every N
        name = f"beta{beta:g}"
        n = 1
    code = [train.source("experiments/methods.py"), train.source("experiments/theory.py")]
    path = train.stage_path(out, f"policy-{method}-{name}-seed{seed}", *train.policy_depends_on(
        reference, reward, prompts, samples, settings), code, method, beta, n, seed)
    checkpoint = path.with_suffix(".checkpoint")
    saved = train.stored(path, fine_tune, method, beta, checkpoint, reference, reward.fn,
                         prompts.to(device), samples, n, settings, seed)
    checkpoint.unlink(missing_ok=True)
    return train.load_model(saved, device), saved["history"], saved["seconds"]


def fine_tune(method: str, beta: float | None, checkpoint: Path, reference: GPT, reward_fn,
              prompts: Tensor, samples: train.Samples, n: int, settings: train.Settings, seed: int
              ) -> dict:
    """train.fine_tune for one of METHODS: the same optimizer, schedule, batches and checkpoints."""
    policy = copy.deepcopy(reference)
    trained = add_adapters(policy, settings.rank, train.random_numbers("cpu", "adapters", seed))
    optimizer = torch.optim.Adam(trained, lr=settings.lr, betas=(0.9, 0.99), fused=True)
    train.average_gradients(optimizer)
    first, history, before = train.resume(checkpoint, trained, optimizer)
    began = time.time() - before
    for step in range(first, settings.steps):
        optimizer.param_groups[0]["lr"] = settings.lr * train.decay(step, settings.steps)
        # the batches are the same for all methods, and for vBoN
        shuffle = train.random_numbers("cpu", "batch", seed, step)
        order = torch.randperm(len(prompts), generator=shuffle)
        rows = train.my_share(order[:settings.batch])
        generator = train.random_numbers(prompts.device, method, beta, n, seed, step,
                                         train.my_rank())
        batch = train.Samples(*[x[rows] for x in samples[:3]], seconds=0.0)
        stats = update(method, beta, policy, reference, optimizer, reward_fn,
                       prompts[rows.to(prompts.device)], batch, n, step, settings, generator)
        history.append(stats)
        train.save_checkpoint(checkpoint, step + 1, trained, optimizer, history,
                              time.time() - began)
        label = f"{method} n={n}" if beta is None else f"{method} beta={beta:g}"
        train.show_progress(label, step + 1, settings.steps, began, stats)
    merge_adapters(policy)
    return {"config": policy.config, "weights": policy.state_dict(), "history": history,
            "seconds": time.time() - began}


def update(method: str, beta: float | None, policy: GPT, reference: GPT,
           optimizer: torch.optim.Optimizer, reward_fn, prompt: Tensor, batch: train.Samples,
           n: int, step: int, settings: train.Settings, generator: torch.Generator
           ) -> dict[str, float]:
    """One step of a method; batch holds what the reference answered to these prompts before."""
    part = train.prompts_at_a_time(policy, settings)
    ref_response = batch.response.to(prompt.device)
    ref_rewards = batch.reward
    now = vbon.grow(n, step, settings.steps)
    k = settings.k
    length = settings.length
    if method == "bound":
        return update_bound(policy, reference, optimizer, reward_fn, prompt, ref_rewards, now, k,
                            length, generator, part)
    if method == "kl-rl":
        now = grow_beta(beta, step, settings.steps)
        return update_kl_rl(policy, reference, optimizer, reward_fn, prompt, ref_rewards, now, k,
                            length, generator, part)
    if method == "bon-sft":
        # it has no score that could be huge, so it aims for the full n from the first step
        return update_bon_sft(policy, optimizer, prompt, ref_response, ref_rewards, n, k,
                              generator, part)
    if method == "bond":
        return update_bond(policy, reference, optimizer, reward_fn, prompt, ref_response,
                           ref_rewards, now, k, generator, part)
    raise ValueError(f"want one of {METHODS}, got {method!r}")


def grow_beta(beta: float, step: int, steps: int) -> float:
    """The β to aim for at this step: 1/β grows from 0 over the first 40 %, as N does for vBoN."""
    share = min(1.0, (step + 1) / (0.4 * steps))
    return beta / share

# ------------------------------------------------------------------------- decoding: soft best-of-N

def soft_best_of_n(reward: Tensor, beta: float, generator: torch.Generator) -> Tensor:
    """Soft best-of-N itself: of N responses one, with probability ∝ exp(r / β). (P, N) -> (P,)"""
    chance = (reward.cpu().double() / beta).softmax(-1)
    return torch.multinomial(chance, 1, generator=generator)[:, 0]


def soft_bon_logprob(ref_logprob: Tensor, reward: Tensor, ref_rewards: Tensor, n: int, beta: float
                     ) -> Tensor:  # (P, K), (P, K), (P, M) -> (P, K)
    """log of the probability that soft best-of-n returns y: π_ref(y) · n · P(y wins).

    y wins against n - 1 rivals with probability e^(r/β) / (e^(r/β) + Σ e^(rival/β)). The mean of
    this is taken over groups of n - 1 of the M reference rewards, each used once. Needs M >= n - 1.
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
