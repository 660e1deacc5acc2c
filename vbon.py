"""vbon.py: Variational Best-of-N Alignment (Amini, Vieira, Ash, Cotterell; arXiv 2407.06057).

Best-of-N draws N responses from a reference model π_ref and keeps the one with the highest reward.
What it returns has a distribution, π_bon, and that distribution has a formula. vBoN fine-tunes a
policy π_θ towards it by minimising KL(π_θ || π_bon); one sample then does the work of N.

    F(r) = P(r(y') < r),  y' ~ π_ref                         the CDF of the reward               (1)
    π_bon(y) = Σ_{i=1..N} C(N,i) F^(N-i) π_ref(y)^i          = (F + π_ref(y))^N - F^N            (2)
    log π_bon(y) >= log N + (N-1) log F + log π_ref(y)       its lower bound, the i = 1 term     (3)
    π_bon(y) = π_ref(y) Σ_{k=0..N-1} F≤^(N-1-k) F<^k         the general form, with ties         (4)
    J(θ) = E_θ[log π_bon(y) - log π_θ(y)]                    the objective, -KL(π_θ || π_bon)    (5)
    ∇J = E_θ[(log π_bon(y) - log π_θ(y) - b) ∇log π_θ(y)]    REINFORCE, with a baseline b        (6)

    symbol       name          shape       meaning
    x            prompt        (P, T0)     P prompts of T0 token ids
    y            response      (P, K, L)   K responses to each; ends at its first end-of-text token
    π_ref(y|x)   ref_logprob   (P, K)      log-probability of the whole response, nats
    π_θ(y|x)     logprob       (P, K)      the same under the policy
    r(y)         reward        (P, K)      any number; only its ranking matters
    r_1..r_M     ref_rewards   (P, M)      rewards of M reference responses to the same prompt
    F            cdf, log_cdf  (P, K)      a probability, and its logarithm
    N            n             int >= 1    the N of best-of-N

Sections 1 to 3 are pure functions of tensors; models appear only in 4 and 5. Probabilities are kept
as logarithms, in float64.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Reward = Callable[[Tensor, Tensor], Tensor]    # prompt (P, T0), response (P, K, L) -> reward (P, K)

# ------------------------------------------------------------------------------ 1. the reward's CDF

def empirical_cdf(reward: Tensor, ref_rewards: Tensor) -> Tensor:  # (P, K), (P, M) -> (P, K)
    """F̂ of equation (1): (rank + 1) / (M + 1), where rank = #{r_j < r}, strictly.

    Strict, because the best must beat the others. The +1 keeps it above 0, so that log F̂ is
    finite even for a reward below all M. P(sup|F̂ - F| > ε) <= 2 exp(-2 M ε²), up to the +1 (DKW).
    Raises ValueError for wrong shapes and for rewards that are empty or not finite.
    """
    less, _, m = _ranks(reward, ref_rewards)
    return (less + 1) / (m + 1)


def cdf_interval(reward: Tensor, ref_rewards: Tensor) -> tuple[Tensor, Tensor]:
    """F< and F≤ of equation (4), each (P, K): y counted as one more atom among M + 1.

    Under π_ref the weight of (4) made from them has mean exactly 1, at any M and with any ties.
    """
    less, equal, m = _ranks(reward, ref_rewards)
    return less / (m + 1), (less + equal + 1) / (m + 1)


def _ranks(reward: Tensor, ref_rewards: Tensor) -> tuple[Tensor, Tensor, int]:
    """#{r_j < r} and #{r_j = r}, each (P, K), and M."""
    if reward.dim() != 2 or ref_rewards.dim() != 2 or len(reward) != len(ref_rewards):
        raise ValueError(f"want (P, K), (P, M), got {[*reward.shape]}, {[*ref_rewards.shape]}")
    _check_rewards(reward, ref_rewards)
    ordered = _f64(ref_rewards).sort(-1).values
    r = _f64(reward).contiguous()
    less, at_most = (torch.searchsorted(ordered, r, right=right) for right in (False, True))
    return less.double(), (at_most - less).double(), ordered.shape[1]


# -------------------------------------------------------------------- 2. the best-of-N distribution

def bon_logprob(ref_logprob: Tensor, log_cdf: Tensor, n: int) -> Tensor:  # (...), (...) -> (...)
    """log π_bon(y), equation (2): the paper's exact form, for rewards without ties.

    The naive line, `((F + p)**n - F**n).log()`, is -inf from log p = -20 in float32 (-40 in
    float64); the sum over i subtracts nothing. log_cdf may be -inf, where F = 0.
    Raises ValueError for unequal shapes, nan, and n that is no int >= 1.
    """
    ref_logprob, log_cdf = _log_inputs(n, ref_logprob, log_cdf)
    i = torch.arange(1, n + 1, dtype=torch.float64, device=log_cdf.device)
    i = i.view(-1, *[1] * log_cdf.dim())                                              # (N, ...)
    log_choose = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    return (log_choose + _times(n - i, log_cdf) + i * ref_logprob).logsumexp(0)


def bon_logprob_bound(ref_logprob: Tensor, log_cdf: Tensor, n: int) -> Tensor:
    """Equation (3): log N + (N-1) log F + log π_ref(y) <= log π_bon(y). Shapes as `bon_logprob`.

    The gap closes as π_ref(y)/F goes to 0, as it does for any text longer than a few words.
    """
    ref_logprob, log_cdf = _log_inputs(n, ref_logprob, log_cdf)
    return math.log(n) + _times(n - 1, log_cdf) + ref_logprob


def bon_logprob_ties(ref_logprob: Tensor, log_lt: Tensor, log_le: Tensor, n: int) -> Tensor:
    """Equation (4), right for any ties: log_lt = log P(r' < r), log_le = log P(r' <= r).

    F≤ = F< + π_ref(y) gives (2); F≤ = F< gives (3); `cdf_interval` gives the empirical form.
    """
    ref_logprob, log_lt, log_le = _log_inputs(n, ref_logprob, log_lt, log_le)
    k = torch.arange(n, dtype=torch.float64, device=log_lt.device).view(-1, *[1] * log_lt.dim())
    return ref_logprob + (_times(n - 1 - k, log_le) + _times(k, log_lt)).logsumexp(0)


def best_of_n(reward: Tensor, generator: torch.Generator | None = None) -> Tensor:  # (P, N) -> (P,)
    """Index of the highest of N rewards; ties are broken at random. ValueError if not finite."""
    if reward.dim() != 2:
        raise ValueError(f"want reward (P, N), got {tuple(reward.shape)}")
    _check_rewards(reward)
    best = (reward == reward.max(-1, keepdim=True).values).float()
    return torch.multinomial(best, 1, generator=generator)[:, 0]


def bon_expected_reward(ref_rewards: Tensor, n: int) -> Tensor:  # (P, M) -> (P,)
    """Unbiased E[max of N rewards] from the same M samples: Σ_j r_(j) C(j-1, N-1) / C(M, N)."""
    _check_n(n)
    if ref_rewards.dim() != 2 or n > ref_rewards.shape[1]:
        raise ValueError(f"want ref_rewards (P, M), M >= n = {n}, got {tuple(ref_rewards.shape)}")
    _check_rewards(ref_rewards)
    ordered = _f64(ref_rewards).sort(-1).values
    m = ordered.shape[1]
    j = torch.arange(n, m + 1, dtype=torch.float64, device=ordered.device)
    log_weight = (torch.lgamma(j) - torch.lgamma(j - n + 1) - math.lgamma(n)
                  - math.lgamma(m + 1) + math.lgamma(n + 1) + math.lgamma(m - n + 1))
    return (ordered[:, n - 1:] * log_weight.exp()).sum(-1)


def bon_theory(n: int) -> tuple[float, float]:
    """KL(π_bon || π_ref) = log N - (N-1)/N nats and win rate N/(N+1), for a continuous reward."""
    _check_n(n)
    return math.log(n) - (n - 1) / n, n / (n + 1)


def optimal_frontier(t: Tensor) -> tuple[Tensor, Tensor]:  # (T,) -> (T,), (T,)
    """KL to the reference (nats) and win rate of exp(t·F)·π_ref: no policy of that KL wins more."""
    win = 1 / -torch.expm1(-t) - 1 / t
    return t * win - (torch.expm1(t) / t).log(), win


# ---------------------------------------------------------------- 3. the objective and its gradient

def leave_one_out(score: Tensor) -> Tensor:  # (P, K) -> (P, K)
    """The mean of the other K-1 scores of the same prompt: an unbiased baseline b for (6)."""
    if score.dim() != 2 or score.shape[1] < 2:
        raise ValueError(f"want score (P, K) with K >= 2, got {tuple(score.shape)}")
    return (score.sum(-1, keepdim=True) - score) / (score.shape[1] - 1)


def reverse_kl_loss(logprob: Tensor, log_target: Tensor) -> Tensor:  # (P, K), (P, K) -> ()
    """A surrogate whose *gradient* is that of KL(π_θ || target), y ~ π_θ: (6). Its value means
    nothing; watch the KL. The score stays in one bracket, because it is its own control variate:
    as π_θ nears the target it tends to a constant, and the noise to zero.
    Raises ValueError for wrong shapes, K < 2, or a score that is not finite.
    """
    if logprob.shape != log_target.shape:
        raise ValueError(f"want (P, K) twice, got {[*logprob.shape]}, {[*log_target.shape]}")
    logprob = _f64(logprob)
    score = (_f64(log_target) - logprob).detach()               # log π_bon(y) - log π_θ(y)   (P, K)
    advantage = score - leave_one_out(score)                                               # (P, K)
    if not score.isfinite().all():
        raise ValueError("a sampled response has a log-probability that is not finite")
    return -(advantage * logprob).mean()


def log_target(method: str, n: int, ref_logprob: Tensor, reward: Tensor,
               ref_rewards: Tensor) -> Tensor:
    """The log-density (P, K), up to a constant, that a method moves the policy to."""
    log_cdf = empirical_cdf(reward, ref_rewards).log()
    if method == "vbon":
        return bon_logprob(ref_logprob, log_cdf, n)                                   # equation (2)
    if method == "bound":
        return bon_logprob_bound(ref_logprob, log_cdf, n)                             # equation (3)
    raise ValueError(f"unknown method {method!r}")


# ------------------------------------------------------------------------------------ 4. one update

def response_mask(response: Tensor, eot: int) -> Tensor:  # (..., L) -> (..., L)
    """True up to and including the first end-of-text token: the one mask of this project."""
    ended = response == eot
    return ended.cumsum(-1) - ended.long() == 0


def sample(model, prompt: Tensor, k: int, length: int, eot: int,
           generator: torch.Generator, rows: int = 1024) -> tuple[Tensor, Tensor]:
    """K responses (P, K, L) to each prompt (P, T0), and their log-probabilities (P, K), nats."""
    parts = [model.generate(part, length, eot, generator)
             for part in prompt.repeat_interleave(k, 0).split(rows)]
    response, logprob = (torch.cat(part) for part in zip(*parts))
    return response.view(len(prompt), k, length), logprob.view(len(prompt), k)


def response_logprob(model, prompt: Tensor, response: Tensor, eot: int) -> Tensor:
    """log π(y|x) (P, K), nats: summed over the response's tokens, end-of-text included."""
    mask = response_mask(response, eot)
    logits = _masked_logits(model, prompt, response, mask)
    return _token_sum(-F.cross_entropy(logits, response[mask], reduction="none"), mask)


def response_kl(policy, reference, prompt: Tensor, response: Tensor, eot: int) -> Tensor:
    """Σ_t KL(π_θ(·|x, y_<t) || π_ref(·|x, y_<t)) (P, K), nats: for y ~ π_θ an unbiased estimate of
    KL(π_θ || π_ref), never negative and less noisy than log π_θ(y) - log π_ref(y). For reporting
    alone: its own gradient is biased, since how y was sampled depends on θ too."""
    mask = response_mask(response, eot)
    log_p, log_q = (_masked_logits(model, prompt, response, mask).log_softmax(-1)
                    for model in (policy, reference))
    return _token_sum((log_p.exp() * (log_p - log_q)).sum(-1), mask)


def _masked_logits(model, prompt: Tensor, response: Tensor, mask: Tensor) -> Tensor:
    """Logits (tokens in the mask, V): each response token is predicted one position before it."""
    (P, K, _), before = response.shape, prompt.shape[1] - 1
    tokens = torch.cat([prompt[:, None].expand(P, K, -1), response], -1).flatten(0, 1)   # (P·K, T)
    where = F.pad(mask.flatten(0, 1), (before, 0))                                     # (P·K, T-1)
    longest = int(where.any(0).nonzero().max()) + 1                         # no need to run further
    return model(tokens[:, :longest], where=where[:, :longest])


def _token_sum(per_token: Tensor, mask: Tensor) -> Tensor:
    """(tokens in the mask,) -> (P, K): the only sum over tokens in this project."""
    per_token = _f64(per_token)
    mask = mask.to(per_token.device)
    return per_token.new_zeros(mask.shape).masked_scatter(mask, per_token).sum(-1)


def grow_n(n: int, step: int, steps: int) -> int:
    """The N aimed for at `step`: from 1 to n, geometrically, over the first 40 % of the steps.
    A large N at once would make scores of (N-1) log F, huge for the many poor responses of an
    untrained policy, and huge noise. In stages they stay near 1."""
    return round(n ** min(1.0, (step + 1) / (0.4 * steps)))


def update(policy, reference, optimizer: torch.optim.Optimizer, reward_fn: Reward, method: str,
           n: int, prompt: Tensor, ref_rewards: Tensor, k: int, length: int, eot: int,
           generator: torch.Generator) -> dict[str, float]:
    """One step of vBoN: sample k >= 2 responses to each prompt (P, T0), score them against
    ref_rewards (P, M), REINFORCE. Returns what to watch, from these samples."""
    response, sampled = sample(policy, prompt, k, length, eot, generator)       # y ~ π_θ  (P, K, L)
    with torch.no_grad():
        reward = reward_fn(prompt, response)                                                # (P, K)
        ref_logprob = response_logprob(reference, prompt, response, eot)                    # (P, K)
        target = log_target(method, n, ref_logprob, reward, ref_rewards)                    # (P, K)
    loss = reverse_kl_loss(response_logprob(policy, prompt, response, eot), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return dict(win_rate=win_rate(reward, ref_rewards).mean().item(),
                kl_ref=(_f64(sampled) - ref_logprob).mean().item(),
                kl_target=(_f64(sampled) - target).mean().item())


# ------------------------------------------------------------------------------------ 5. evaluation

def win_rate(reward: Tensor, ref_rewards: Tensor) -> Tensor:  # (P, K), (P, M) -> (P, K)
    """The share of M reference responses that y beats; ties count half."""
    less, equal, m = _ranks(reward, ref_rewards)
    return (less + equal / 2) / m


def clustered(x: Tensor) -> tuple[float, float]:
    """Mean of x (P, K) and its standard error over prompts: responses to one hang together."""
    means = x.mean(1)
    return means.mean().item(), (means.std() / math.sqrt(len(means))).item()


def metrics(reward: Tensor, ref_rewards: Tensor, kl_ref: Tensor, kl_bon: Tensor) -> dict:
    """Means and clustered standard errors of what is known of K responses to each prompt (P, K)."""
    row = {}
    for name, x in dict(reward=_f64(reward), win_rate=win_rate(reward, ref_rewards),
                        kl_ref=kl_ref, kl_bon=kl_bon).items():
        row[name], row[name + "_se"] = clustered(x)
    return row | dict(positive=(reward > 0).double().mean().item())


def evaluate_reference(logprob: Tensor, reward: Tensor, ref_rewards: Tensor, n: int) -> dict:
    """Metrics of π_ref from its own samples (P, K), none of them among the M behind F."""
    kl_bon = _f64(logprob) - bon_logprob(logprob, empirical_cdf(reward, ref_rewards).log(), n)
    return metrics(reward, ref_rewards, torch.zeros_like(kl_bon), kl_bon)


def evaluate_bon(logprob: Tensor, reward: Tensor, ref_rewards: Tensor, n: int,
                 generator: torch.Generator) -> dict[str, float]:
    """Metrics of best-of-N, really done: each N of the reference samples (P, A·N) give one answer.
    KL(π_bon || π_ref) is their mean log π_bon - log π_ref; the KL to π_bon is 0 by definition."""
    best = best_of_n(reward.reshape(-1, n), generator)[:, None]                          # (P·A, 1)
    reward, logprob = (x.reshape(-1, n).gather(1, best).view(len(x), -1) for x in (reward, logprob))
    kl_ref = bon_logprob(logprob, empirical_cdf(reward, ref_rewards).log(), n) - _f64(logprob)
    return metrics(reward, ref_rewards, kl_ref, torch.zeros_like(kl_ref))


@torch.no_grad()
def evaluate_policy(policy, reference, reward_fn: Reward, prompt: Tensor, ref_rewards: Tensor,
                    n: int, k: int, length: int, eot: int, generator: torch.Generator) -> tuple:
    """What `metrics` takes, from k samples of the policy to each prompt: reward, kl_ref, kl_bon."""
    response, logprob = sample(policy, prompt, k, length, eot, generator)
    reward = reward_fn(prompt, response)
    ref_logprob = response_logprob(reference, prompt, response, eot)
    target = bon_logprob(ref_logprob, empirical_cdf(reward, ref_rewards).log(), n)
    return reward, response_kl(policy, reference, prompt, response, eot), _f64(logprob) - target

# ------------------------------------------------------------------------------------ small helpers

def _f64(x: Tensor) -> Tensor:
    """float64 on the CPU: a (P, K) array costs nothing there, and every device agrees."""
    return x.cpu().double()


def _times(k: Tensor | int, log_x: Tensor) -> Tensor:
    """k · log x with 0 · log 0 = 0, as x^0 = 1 demands; 0 · (-inf) alone would be nan."""
    k = torch.as_tensor(k, dtype=torch.float64, device=log_x.device)
    return torch.where(k == 0, torch.zeros_like(log_x), k * log_x)


def _check_n(n: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"want an integer n >= 1, got {n!r}")


def _check_rewards(*rewards: Tensor) -> None:
    if bad := [tuple(r.shape) for r in rewards if r.numel() == 0 or not r.isfinite().all()]:
        raise ValueError(f"rewards must be finite and at least one, got shape {bad[0]}")


def _log_inputs(n: int, *logs: Tensor) -> list[Tensor]:
    """Log-probabilities in float64, once n, their shapes and the absence of nan are checked."""
    _check_n(n)
    if len({x.shape for x in logs}) > 1:
        raise ValueError(f"want logs of one shape, got {[tuple(x.shape) for x in logs]}")
    if any(x.isnan().any() for x in logs):
        raise ValueError("log-probabilities must not be nan")
    return [_f64(x) for x in logs]
