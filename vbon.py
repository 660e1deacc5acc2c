"""vbon.py: Variational Best-of-N Alignment (Amini, Vieira, Ash, Cotterell; arXiv 2407.06057).

Best-of-N draws N responses from a reference model π_ref and keeps the one with the highest reward.
What it returns has a distribution, π_bon, and this distribution has a formula. vBoN fine-tunes a
policy π_θ towards it, by minimising KL(π_θ || π_bon). After that, one sample does the work of N.

`python vbon.py` shows all of it on six responses, in one screen, without a network.

    symbol       name          shape       meaning
    x            prompt        (P, T)      P prompts of T token ids
    y            response      (P, K, L)   K responses to each, of at most L tokens
    π_ref(y)     ref_logprob   (P, K)      log-probability of a whole response, in nats
    π_θ(y)       logprob       (P, K)      the same under the policy
    r(y)         reward        (P, K)      any number; only how it ranks responses matters
    r_1..r_M     ref_rewards   (P, M)      rewards of M reference responses to the same prompt
    F            cdf           (P, K)      the probability that a reference response scores lower
    N            n             int >= 1    the N of best-of-N

    (1)  F(r) = P(r(y') < r)  for y' ~ π_ref                                   the CDF of the reward
    (2)  π_bon(y) = (F + π_ref(y))^N - F^N                                     the exact form
                  = Σ_{i=1..N} C(N,i) · F^(N-i) · π_ref(y)^i                   the same, as a sum
    (3)  log π_bon(y) >= log N + (N-1) · log F + log π_ref(y)                  its term i = 1 alone
    (4)  π_bon(y) = π_ref(y) · Σ_{k=0..N-1} F_le^(N-1-k) · F_lt^k              also when rewards tie
         where F_lt = P(r' < r) and F_le = P(r' <= r)
    (5)  J(θ) = E_θ[log π_bon(y) - log π_θ(y)] = -KL(π_θ || π_bon)             the objective
    (6)  ∇J = E_θ[(log π_bon(y) - log π_θ(y) - b) · ∇ log π_θ(y)]              its gradient
    (7)  F_lt = (#less + 1) / (M + 1),  F_le = F_lt + (share of ties)          the estimate from M

E_θ is the mean over responses y that the policy itself samples; b is a number, the baseline.

Of a model, this file needs two methods and nothing else:
    sample(prompt, k, length, generator) -> response (P, K, L), logprob (P, K)
    logprob(prompt, response)            -> logprob (P, K), with gradients
Of a reward, it needs a function: reward_fn(prompt, response) -> reward (P, K).
All arithmetic on (P, K) tensors runs in float64 on the CPU, where it costs nothing.
"""
import itertools
import math

import torch
from torch import Tensor

# ------------------------------------------------------------------------- 1. the CDF of the reward

def empirical_cdf(reward: Tensor, ref_rewards: Tensor) -> Tensor:  # (P, K), (P, M) -> (P, K)
    """Estimate F of equation (1) as (rank + 1) / (M + 1), where rank = #{r_j < r}.

    Reward 2.5 against 1, 2, 2, 3 has rank 3, so F = 4/5; reward 2 has rank 1, so F = 2/5.
    The + 1 keeps log F finite for a response that scores below all M. With 95 % probability no
    estimate is off by more than 1.36/√M (DKW inequality), apart from the + 1.
    Raises ValueError for wrong shapes and for rewards that are empty or not finite.
    """
    less, _ = _count_less_and_equal(reward, ref_rewards)
    return (less + 1) / (ref_rewards.shape[1] + 1)


def cdf_interval(reward: Tensor, ref_rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Another estimate of F_lt and F_le, each (P, K): y counts as one more among M + 1 responses.

    Reward 2 against 1, 2, 2, 3 gives 1/5 and 4/5. With it, the weight of equation (4), the sum over
    k, has a mean of exactly 1 under π_ref. Training does not use it; see `bon_target`.
    """
    less, equal = _count_less_and_equal(reward, ref_rewards)
    total = ref_rewards.shape[1] + 1
    return less / total, (less + equal + 1) / total


def win_rate(reward: Tensor, ref_rewards: Tensor) -> Tensor:  # (P, K), (P, M) -> (P, K)
    """The share of the M reference responses that y beats; a tie counts half.

    Reward 2 against 1, 2, 2, 3 beats one and ties with two: (1 + 2/2) / 4 = 0.5.
    """
    less, equal = _count_less_and_equal(reward, ref_rewards)
    return (less + equal / 2) / ref_rewards.shape[1]


def _count_less_and_equal(reward: Tensor, ref_rewards: Tensor) -> tuple[Tensor, Tensor]:
    """#{r_j < r} and #{r_j = r}, each (P, K): the one place where rewards are compared."""
    _check_rewards(reward, ref_rewards)
    ordered = _float64(ref_rewards).sort(-1).values
    reward = _float64(reward).contiguous()
    less = torch.searchsorted(ordered, reward, right=False)
    less_or_equal = torch.searchsorted(ordered, reward, right=True)
    return less.double(), (less_or_equal - less).double()

# ----------------------------------------------------------------- 2. the distribution of best-of-N

def bon_logprob(ref_logprob: Tensor, log_cdf: Tensor, n: int) -> Tensor:  # (...), (...) -> (...)
    """log π_bon(y) by equation (2): the paper's exact form, for rewards that do not tie.

    π_ref(y) = 0.1 and F = 0.75 with n = 2 give 0.85² - 0.75² = 0.16. log_cdf may be -inf (F = 0).
    Raises ValueError for unequal shapes, for nan, and for an n that is no integer >= 1.
    """
    # The naive line is ((F + p)**n - F**n).log(). With p = e^-40 it is -inf: F + p rounds to F.
    # The sum over i subtracts nothing.
    ref_logprob, log_cdf = _check_logs(n, ref_logprob, log_cdf)
    i = _numbers(1, n, log_cdf)                                            # (N, 1, .., 1)
    log_choose = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    log_term = log_choose + _log_power(log_cdf, n - i) + i * ref_logprob   # (N, ...)
    return log_term.logsumexp(0)


def bon_logprob_bound(ref_logprob: Tensor, log_cdf: Tensor, n: int) -> Tensor:
    """The lower bound (3) of log π_bon(y), same shapes as `bon_logprob`.

    On text the two agree to rounding: a whole sentence is improbable, so the terms i >= 2 vanish.
    """
    ref_logprob, log_cdf = _check_logs(n, ref_logprob, log_cdf)
    power = torch.tensor(n - 1.0).double()
    return math.log(n) + _log_power(log_cdf, power) + ref_logprob


def bon_logprob_ties(ref_logprob: Tensor, log_lt: Tensor, log_le: Tensor, n: int) -> Tensor:
    """log π_bon(y) by equation (4), right for any ties, from log F_lt and log F_le.

    F_le = F_lt + π_ref(y) gives equation (2). F_le = F_lt gives equation (3).
    """
    ref_logprob, log_lt, log_le = _check_logs(n, ref_logprob, log_lt, log_le)
    k = _numbers(0, n - 1, log_lt)                                         # (N, 1, .., 1)
    log_term = _log_power(log_le, n - 1 - k) + _log_power(log_lt, k)       # (N, ...)
    return ref_logprob + log_term.logsumexp(0)


def bon_target(ref_logprob: Tensor, reward: Tensor, ref_rewards: Tensor, n: int) -> Tensor:
    """log π_bon(y) (P, K) from samples: (4) with the estimate (7). *The* target of this project.

    ref_logprob (P, K), reward (P, K), ref_rewards (P, M). Where no reference response has y's
    reward, this is equation (2) with `empirical_cdf`. It is right for any ties and any reward.
    """
    _check_shapes(ref_logprob, reward)
    ref_logprob = _float64(ref_logprob)
    less, equal = _count_less_and_equal(reward, ref_rewards)
    total = ref_rewards.shape[1] + 1
    cdf_lt = (less + 1) / total
    # How much probability has exactly y's reward? The share of the reference responses that have
    # it. If none has it, y is the only response known to: its own probability.
    tied = torch.where(equal > 0, equal / total, ref_logprob.exp())
    cdf_le = cdf_lt + tied
    return bon_logprob_ties(ref_logprob, cdf_lt.log(), cdf_le.log(), n)


def best_of_n(reward: Tensor, generator: torch.Generator | None = None) -> Tensor:  # (P, N) -> (P,)
    """Best-of-N itself: the index of the highest of N rewards; ties are broken at random."""
    _check_rewards(reward)
    reward = _float64(reward)
    is_best = reward == reward.max(-1, keepdim=True).values
    return torch.multinomial(is_best.double(), 1, generator=generator)[:, 0]


def bon_theory(n: int) -> tuple[float, float]:
    """KL(π_bon || π_ref) in nats and win rate of best-of-N, if the reward is continuous.

    n = 4 gives log 4 - 3/4 = 0.636 and 4/5.
    """
    _check_n(n)
    return math.log(n) - (n - 1) / n, n / (n + 1)


def bon_attains(ref_rewards: Tensor, n: int) -> tuple[float, float]:  # (P, M) -> kl, win_rate
    """What best-of-N attains with this reward, ties included: KL to π_ref in nats, and win rate.

    The M rewards of a prompt are taken for all that the reference can earn: best-of-N returns a
    reward with probability F_le^N - F_lt^N. The means over P prompts; without ties, `bon_theory`.
    """
    _check_n(n)
    less, equal = _count_less_and_equal(ref_rewards, ref_rewards)
    m = ref_rewards.shape[1]
    cdf_lt = less / m
    cdf_le = (less + equal) / m
    # how many times as probable best-of-n makes each of the M responses
    ratio = (cdf_le ** n - cdf_lt ** n) / (equal / m)
    kl = torch.xlogy(ratio, ratio).mean()
    win = (ratio * (cdf_lt + cdf_le) / 2).mean()
    return kl.item(), win.item()

# ---------------------------------------------------------------- 3. the objective and its gradient

def leave_one_out(score: Tensor) -> Tensor:  # (P, K) -> (P, K)
    """The baseline b of (6): for each response, the mean score of the other K - 1.

    Scores 1, 2, 6 have the baselines 4, 3.5, 1.5. A response's own score must stay out: then b does
    not depend on it, and E_θ[b ∇ log π_θ] = 0. Raises ValueError for K < 2.
    """
    if score.dim() != 2 or score.shape[1] < 2:
        raise ValueError(f"want score (P, K) with K >= 2, got {tuple(score.shape)}")
    total = score.sum(-1, keepdim=True)
    return (total - score) / (score.shape[1] - 1)


def reverse_kl_loss(logprob: Tensor, log_target: Tensor) -> Tensor:  # (P, K), (P, K) -> ()
    """A surrogate for -J: its *gradient* is minus (6), if y was sampled from π_θ.

    Its value means nothing and need not fall; watch the KL to π_bon instead. Raises ValueError for
    K < 2, unequal shapes and log-probabilities that are not finite.
    """
    _check_shapes(logprob, log_target)
    logprob = _float64(logprob)
    # The score is a number for each response: no gradient flows through it. When π_θ reaches the
    # target it is the same for every response, and the noise of the gradient is zero.
    score = (_float64(log_target) - logprob).detach()
    if not score.isfinite().all():
        raise ValueError("want finite log-probabilities, got nan or inf")
    advantage = score - leave_one_out(score)
    return -(advantage * logprob).mean()

# --------------------------------------------------------------------------------- 4. the algorithm

def grow(n: int, step: int, steps: int) -> int:
    """The N to aim for at this step: it grows from 1 to n over the first 40 % of the steps.

    An untrained policy has many poor responses. A large N at once would score them by a huge
    (N-1) · log F, and a few of them would decide the gradient.
    """
    share = min(1.0, (step + 1) / (0.4 * steps))
    return round(n ** share)


def update(policy, reference, optimizer: torch.optim.Optimizer, reward_fn, prompt: Tensor,
           ref_rewards: Tensor, n: int, k: int, length: int, generator: torch.Generator,
           part: int | None = None) -> dict[str, float]:
    """One step of vBoN: k responses of the policy to each prompt (P, T), ref_rewards (P, M).

    Returns what to watch, as means over the responses: win_rate, kl_ref and kl_target, the KL to
    best of *this* n. `part` prompts are worked on at a time, to bound memory: it changes nothing,
    since the gradients of the parts add up to that of the whole.
    """
    watched = []
    size = part or len(prompt)
    optimizer.zero_grad()
    for x, refs in zip(prompt.split(size), ref_rewards.split(size)):
        with torch.no_grad():
            # (a) sample from the policy, y ~ π_θ
            response, _ = policy.sample(x, k, length, generator)        # (P, K, L)
            # (b) ask the reward and the reference what they think of y
            reward = reward_fn(x, response)                             # (P, K)
            ref_logprob = _float64(reference.logprob(x, response))      # (P, K)
            # (c) how probable would best-of-n make y?
            log_target = bon_target(ref_logprob, reward, refs, n)       # (P, K)
        # (d) score y under the policy, now with gradients: sampling kept none
        logprob = _float64(policy.logprob(x, response))                 # (P, K)
        # (e) REINFORCE
        share = len(x) / len(prompt)
        loss = share * reverse_kl_loss(logprob, log_target)
        loss.backward()

        now = logprob.detach()
        wins = win_rate(reward, refs)
        watched.append(torch.stack([wins, now - ref_logprob, now - log_target]))
    optimizer.step()
    wins, kl_ref, kl_target = torch.cat(watched, 1).mean((1, 2)).tolist()
    return {"win_rate": wins, "kl_ref": kl_ref, "kl_target": kl_target}

# ------------------------------------------------------------------ 5. what the functions above use

def _float64(x: Tensor) -> Tensor:
    return x.cpu().double()                # in this order: not every device knows float64


def _numbers(first: int, last: int, x: Tensor) -> Tensor:
    """first, ..., last along a new axis in front of those of x."""
    numbers = torch.arange(first, last + 1).double()
    return numbers.view(-1, *[1] * x.dim())


def _log_power(log_x: Tensor, k: Tensor) -> Tensor:
    """log(x^k) = k · log x, and 0 for k = 0 even where x = 0: there 0 · (-inf) would be nan."""
    return torch.where(k == 0, 0.0, k * log_x)


def _check_n(n: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"want an integer n >= 1, got {n!r}")


def _check_shapes(*given: Tensor) -> None:
    shapes = [tuple(x.shape) for x in given]
    if len(set(shapes)) > 1:
        raise ValueError(f"want tensors of one shape, got {shapes}")


def _check_rewards(*rewards: Tensor) -> None:
    shapes = [tuple(r.shape) for r in rewards]
    for r, shape in zip(rewards, shapes):
        if len(shape) != 2 or 0 in shape or shape[0] != shapes[0][0]:
            raise ValueError(f"want rewards (P, K) or (P, K) and (P, M), none empty, got {shapes}")
        if not r.isfinite().all():
            raise ValueError("want finite rewards, got nan or inf")


def _check_logs(n: int, *logs: Tensor) -> list[Tensor]:
    """The same logarithms in float64, once they are known to be usable."""
    _check_n(n)
    _check_shapes(*logs)
    for x in logs:
        if x.isnan().any():
            raise ValueError("want logarithms, got nan")
    return [_float64(x) for x in logs]

# -------------------------------------------------------------------------------- 6. python vbon.py

def toy(n: int = 4, steps: int = 400) -> None:
    """The whole paper on six responses with known probabilities: no network, no estimate of F."""
    prob = torch.tensor([0.20, 0.30, 0.20, 0.05, 0.10, 0.15]).double()
    reward = torch.tensor([-4.0, -1.0, 0.5, 1.0, 2.0, 3.0]).double()
    # equation (1): the probability of all responses that score lower
    lower = reward[None, :] < reward[:, None]                              # (6, 6)
    cdf = (lower * prob).sum(1)

    # Best-of-n by its definition: go through all 6^n ways to draw n responses.
    brute = torch.zeros(6).double()
    for draws in itertools.product(range(6), repeat=n):
        best = max(draws, key=reward.tolist().__getitem__)
        brute[best] += prob[list(draws)].prod()
    log_bon = bon_logprob(prob.log(), cdf.log(), n)
    log_bound = bon_logprob_bound(prob.log(), cdf.log(), n)

    # A policy of six numbers that starts as the reference; 64 samples of its own at each step.
    logits = prob.log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    kl_to_bon = []
    for step in range(steps):
        logprob = logits.log_softmax(0)
        kl_to_bon.append((logprob.exp() * (logprob - log_bon)).sum().item())
        y = torch.multinomial(logprob.exp().detach(), 64, True, generator=generator)
        loss = reverse_kl_loss(logprob[y][None], log_bon[y][None])         # P = 1 prompt, K = 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    print(f"Six responses, n = {n}. Probability of each under ...\n")
    print(" reward  reference  F (1)   best-of-n  exact (2)  bound (3)  policy after training")
    policy = logits.softmax(0)
    columns = [reward, prob, cdf, brute, log_bon.exp(), log_bound.exp(), policy]
    for row in torch.stack(columns, 1).tolist():
        print("{:7.1f}{:11.3f}{:7.2f}{:12.4f}{:11.4f}{:11.4f}{:11.4f}".format(*row))
    print("\nbest-of-n: all ways to draw n responses, counted one by one.")
    print("policy: trained with reverse_kl_loss on its own samples. Its KL to best-of-n, in nats:")
    for step in (0, 25, 50, 100, 200, steps - 1):
        print(f"  step {step:3}  {kl_to_bon[step]:.4f}")


if __name__ == "__main__":
    toy()
