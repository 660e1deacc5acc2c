"""vbon.py: Variational Best-of-N Alignment (Amini, Vieira, Ash, Cotterell; arXiv 2407.06057).

Best-of-N samples N responses from a reference model π_ref and keeps the one with the highest
reward. The distribution of that response, π_bon, has a formula. vBoN fine-tunes a policy π_θ
towards it, by minimising KL(π_θ || π_bon). After that, one sample does the work of N.
`python vbon.py` shows all of this on six responses, without a neural network.

    symbol       name          shape       meaning
    x            prompt        (P, T)      P prompts of T token ids
    y            response      (P, K, L)   K responses to each prompt, of at most L tokens
    log π_ref(y) ref_logprob   (P, K)      log-probability of the response, in nats
    log π_θ(y)   logprob       (P, K)      the same under the policy
    r(y)         reward        (P, K)      any number; only the ranking of the responses matters
    r_1..r_M     ref_rewards   (P, M)      rewards of M reference responses to the same prompt
    F            cdf           (P, K)      the probability of a lower reward under the reference
    N            n             int >= 1    the N of best-of-N

    (1)  F(r) = P(r(y') < r)  for y' ~ π_ref                                   the CDF of the reward
    (2)  π_bon(y) = (F + π_ref(y))^N - F^N                                     the exact form
                  = Σ_{i=1..N} C(N,i) · F^(N-i) · π_ref(y)^i                   the same, as a sum
    (3)  log π_bon(y) >= log N + (N-1) · log F + log π_ref(y)                  its term i = 1 alone
    (4)  π_bon(y) = π_ref(y) · Σ_{j=0..N-1} F_le^(N-1-j) · F_lt^j              also when rewards tie
         where F_lt = P(r' < r) and F_le = P(r' <= r)
    (5)  J(θ) = E_θ[log π_bon(y) - log π_θ(y)] = -KL(π_θ || π_bon)             the objective
    (6)  ∇J = E_θ[(log π_bon(y) - log π_θ(y) - b) · ∇ log π_θ(y)]              its gradient
    (7)  F_lt = (#less + 1) / (M + 1)                                          the estimate from M
         F_le = F_lt + #equal / (M + 1), or F_lt + π_ref(y) if #equal = 0         (at most 1)

E_θ is the expectation over responses y of the policy; the baseline b does not depend on y. (4) and
F_le in (7) are not in the paper, which assumes that rewards do not tie.

An update: (a) sample y from the policy, (b) compute its reward and log π_ref(y), (c) compute the
target log π_bon(y), (d) compute log π_θ(y) with gradients, (e) add an estimate of -∇J to .grad.

The functions compute in float64, on the CPU. (What best-of-N attains is computed in
support/statistics.py.) A model has two methods, a reward is a function; any device will do:
    model.sample(prompt, k, length, generator) -> response (P, K, L), logprob (P, K) or None
    model.logprob(prompt, response)            -> logprob (P, K), with gradients
    reward_fn(prompt, response)                -> reward (P, K)
"""
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

# ------------------------------------------------------------------------- 1. the CDF of the reward

def empirical_cdf(reward: Tensor, ref_rewards: Tensor) -> Tensor:  # (P, K), (P, M) -> (P, K)
    """Estimate F of equation (1) as (rank + 1) / (M + 1), where rank = #{r_j < r}.

    Reward 2.5 against 1, 2, 2, 3 has rank 3, so F = 4/5; reward 2 has rank 1, so F = 2/5.
    The + 1 keeps log F finite for a reward below all M. Raises ValueError for wrong shapes, and for
    rewards that are empty or not finite.
    """
    less, _ = count_less_and_equal(reward, ref_rewards)
    m = ref_rewards.shape[1]
    return (less + 1) / (m + 1)


def win_rate(reward: Tensor, ref_rewards: Tensor) -> Tensor:  # (P, K), (P, M) -> (P, K)
    """Return the share of the M reference responses that y beats; a tie counts half: reward 2
    against 1, 2, 2, 3 beats one and ties with two: (1 + 2/2) / 4 = 0.5."""
    less, equal = count_less_and_equal(reward, ref_rewards)
    return (less + equal / 2) / ref_rewards.shape[1]


def count_less_and_equal(reward: Tensor, ref_rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Return #{r_j < r} and #{r_j = r}, each (P, K), by binary search in sorted ref_rewards."""
    _check_rewards(reward, ref_rewards)
    reward = _float64(reward).contiguous()
    ref_rewards, _ = _float64(ref_rewards).sort(-1)
    less = torch.searchsorted(ref_rewards, reward, right=False)
    less_or_equal = torch.searchsorted(ref_rewards, reward, right=True)
    return less.double(), (less_or_equal - less).double()

# ----------------------------------------------------------------- 2. the distribution of best-of-N

def bon_logprob(ref_logprob: Tensor, log_cdf: Tensor, n: int) -> Tensor:  # (...), (...) -> (...)
    """Return log π_bon(y) by equation (2): the paper's exact form, for rewards that do not tie.

    π_ref(y) = 0.1 and F = 0.75 with n = 2 give 0.85² - 0.75² = 0.16. log_cdf may be -inf (F = 0).
    Raises ValueError for unequal shapes, for nan, and for an n that is no integer >= 1.
    """
    # The naive line, ((F + p)**n - F**n).log(), is -inf at p = e^-40, where F + p rounds to F.
    ref_logprob, log_cdf = _check_logs(n, ref_logprob, log_cdf)
    i = _numbers(1, n, log_cdf)                                      # (N, 1, .., 1)
    # log C(N,i) = log N! - log i! - log (N-i)!
    log_term = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    log_term = log_term + _log_power(log_cdf, n - i)
    log_term = log_term + i * ref_logprob                            # (N, ...)
    return log_term.logsumexp(0)


def bon_logprob_bound(ref_logprob: Tensor, log_cdf: Tensor, n: int) -> Tensor:
    """Return the lower bound (3) of log π_bon(y). Same shapes and errors as `bon_logprob`.

    On text the two nearly agree: sentences are so improbable that the terms i >= 2 nearly vanish.
    """
    ref_logprob, log_cdf = _check_logs(n, ref_logprob, log_cdf)
    return math.log(n) + _log_power(log_cdf, torch.tensor(n - 1)) + ref_logprob


def bon_logprob_ties(ref_logprob: Tensor, log_lt: Tensor, log_le: Tensor, n: int) -> Tensor:
    """Return log π_bon(y) by equation (4), from log F_lt and log F_le. Rewards may tie.

    F_le = F_lt + π_ref(y) gives equation (2). F_le = F_lt gives equation (3).
    """
    ref_logprob, log_lt, log_le = _check_logs(n, ref_logprob, log_lt, log_le)
    j = _numbers(0, n - 1, log_lt)                                   # (N, 1, .., 1)
    log_term = _log_power(log_le, n - 1 - j) + _log_power(log_lt, j)
    return ref_logprob + log_term.logsumexp(0)


def bon_target(ref_logprob: Tensor, reward: Tensor, ref_rewards: Tensor, n: int) -> Tensor:
    """Return log π_bon(y) (P, K) by (4) with the estimate (7), for training and evaluation.

    ref_logprob (P, K), reward (P, K), ref_rewards (P, M). Reward 2 against 1, 2, 2, 3 has
    F_lt = 2/5 and F_le = 4/5. Where nothing ties, this is equation (2) with `empirical_cdf`,
    unless F_lt + π_ref(y) exceeds 1.
    """
    _check_shapes(ref_logprob, reward)
    ref_logprob = _float64(ref_logprob)
    cdf_lt = empirical_cdf(reward, ref_rewards)
    # P(r' = r) is estimated by the reference responses that tie with y. If none does, y is the only
    # response known to have this reward, and its own probability is the estimate.
    _, equal = count_less_and_equal(reward, ref_rewards)
    m = ref_rewards.shape[1]
    tied = torch.where(equal > 0, equal / (m + 1), ref_logprob.exp())
    # F_le is at most 1. Where the sum exceeds it, which needs #equal = 0, F_lt makes room for y.
    cdf_le = (cdf_lt + tied).clamp(max=1)
    cdf_lt = torch.minimum(cdf_lt, cdf_le - tied).clamp(min=0)
    return bon_logprob_ties(ref_logprob, cdf_lt.log(), cdf_le.log(), n)


def best_of_n(reward: Tensor, generator: torch.Generator | None = None) -> Tensor:  # (P, N) -> (P,)
    """Return the index of the highest of N rewards; ties are broken at random."""
    _check_rewards(reward)
    reward = _float64(reward)
    is_best = reward == reward.max(-1, keepdim=True).values
    return torch.multinomial(is_best.double(), 1, generator=generator)[:, 0]

# ---------------------------------------------------------------- 3. the objective and its gradient

def leave_one_out(score: Tensor) -> Tensor:  # (P, K) -> (P, K)
    """Return the baseline b of (6): for each response, the mean score of the other K - 1.

    Scores 1, 2, 6 have the baselines 4, 3.5, 1.5. Since y's own score is left out, b does not
    depend on y, and E_θ[b ∇ log π_θ(y)] = 0. Raises ValueError for K < 2.
    """
    if score.dim() != 2 or score.shape[1] < 2:
        raise ValueError(f"want score (P, K) with K >= 2, got {tuple(score.shape)}")
    others = score.sum(-1, keepdim=True) - score
    return others / (score.shape[1] - 1)


def reverse_kl_loss(logprob: Tensor, log_target: Tensor) -> Tensor:  # (P, K), (P, K) -> ()
    """Return a surrogate loss: its *gradient* estimates minus (6), if y was sampled from π_θ.

    Minus, since an optimizer minimises. Its value means nothing. A constant in log_target, such as
    the log of a normaliser, changes nothing: the baseline subtracts it. Raises ValueError for
    K < 2, unequal shapes, and log-probabilities that are not finite.
    """
    _check_shapes(logprob, log_target)
    logprob = _float64(logprob)
    # In (6) the score is a number, so detach it: otherwise autograd would differentiate both
    # factors of advantage · logprob. (If π_θ were the target, all scores would be equal: no noise.)
    score = (_float64(log_target) - logprob).detach()
    if not score.isfinite().all():
        raise ValueError("want finite log-probabilities, got nan or inf")
    advantage = score - leave_one_out(score)
    return -(advantage * logprob).mean()

# --------------------------------------------------------------------------------- 4. the algorithm

def grow(n: int, step: int, steps: int) -> int:
    """Return the N to aim for at this step: it grows to n over the first 40 % of the steps.

    At first many responses are poor. A large N would give them a very negative (N-1) · log F, and a
    few of them would dominate the gradient. With n = 4 and 90 steps, N is 2 for 18 steps, 3 for 10,
    then 4; the KL to best-of-N jumps where it changes.
    """
    progress = min(1.0, (step + 1) / (0.4 * steps))
    return math.ceil(n ** progress)


class Rollout(NamedTuple):
    """The result of steps (a) and (b)."""
    response: Tensor                    # (P, K, L) sampled from the policy
    reward: Tensor                      # (P, K)
    ref_logprob: Tensor                 # (P, K)


@torch.no_grad()
def roll_out(policy, reference, reward_fn, prompt: Tensor, k: int, length: int,
             generator: torch.Generator | None, part: int | None = None) -> Rollout:
    """Do steps (a) and (b) of an update, with k responses to each prompt (P, T).

    log π_ref is computed for `part` prompts at a time (default: all): logits take much memory.
    """
    # (a) sample from the policy: y ~ π_θ
    response, _ = policy.sample(prompt, k, length, generator)           # (P, K, L)
    # (b) the reward of y, and its log-probability under the reference
    reward = reward_fn(prompt, response)                                # (P, K)
    size = part or len(prompt)
    ref_logprob = []
    for x, y in zip(prompt.split(size), response.split(size)):
        ref_logprob.append(_float64(reference.logprob(x, y)))
    return Rollout(response, reward, torch.cat(ref_logprob))


def reinforce(policy, prompt: Tensor, response: Tensor, log_target: Tensor,
              part: int | None = None) -> Tensor:  # (P, T), (P, K, L), (P, K) -> (P, K)
    """Do steps (d) and (e): add an estimate of *minus* (6), the gradient of the loss, to .grad.

    log π_θ is computed for `part` prompts at a time (default: all); their gradients add up. Returns
    log π_θ(y), without gradients. This estimator of (6) is called REINFORCE.
    """
    size = part or len(prompt)
    parts = zip(prompt.split(size), response.split(size), log_target.split(size))
    found = []
    for x, y, target in parts:
        # (d) log π_θ(y): one forward pass over all tokens, with gradients
        logprob = _float64(policy.logprob(x, y))                        # (part, K)
        # (e) the mean over all prompts: each part's mean, times its share of the prompts
        share = len(x) / len(prompt)
        loss = share * reverse_kl_loss(logprob, target)
        loss.backward()
        found.append(logprob.detach())
    return torch.cat(found)

# --------------------------------------------------------------------------------------- 5. helpers

def _float64(x: Tensor) -> Tensor:
    return x.cpu().double()                # in this order: not every device knows float64


def _numbers(first: int, last: int, x: Tensor) -> Tensor:
    """Return first, ..., last along a new first axis, to broadcast with x."""
    numbers = torch.arange(first, last + 1).double()
    return numbers.view(-1, *[1] * x.dim())


def _log_power(log_x: Tensor, power: Tensor) -> Tensor:
    """Return log(x^power): 0 for power 0, even where x = 0 and 0 · (-inf) would be nan."""
    return torch.where(power == 0, 0.0, power * log_x)


def _check_shapes(*tensors: Tensor) -> None:
    shapes = [tuple(x.shape) for x in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"want tensors of one shape, got {shapes}")


def _check_rewards(*rewards: Tensor) -> None:
    shapes = [tuple(r.shape) for r in rewards]
    for r in rewards:
        if r.dim() != 2 or r.numel() == 0 or len(r) != len(rewards[0]):
            raise ValueError(f"want rewards (P, K) or (P, K) and (P, M), none empty, got {shapes}")
        if not r.isfinite().all():
            raise ValueError("want finite rewards, got nan or inf")


def _check_logs(n: int, *logs: Tensor) -> list[Tensor]:
    """Return the logarithms in float64, after checking n, shapes and nan."""
    if type(n) is not int or n < 1:
        raise ValueError(f"want an integer n >= 1, got {n!r}")
    _check_shapes(*logs)
    for x in logs:
        if x.isnan().any():
            raise ValueError("want logarithms, got nan")
    return [_float64(x) for x in logs]

# -------------------------------------------------------------------------------- 6. python vbon.py

# six responses, in ascending order of their rewards
TOY_PROB = torch.tensor([0.20, 0.30, 0.20, 0.05, 0.10, 0.15], dtype=torch.float64)
TOY_REWARD = torch.tensor([-4.0, -1.0, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64)


def brute_force(prob: Tensor, reward: Tensor, n: int) -> Tensor:  # (R,), (R,) -> (R,)
    """Return π_bon by its definition: enumerate all tuples of n of the R responses."""
    bon = torch.zeros_like(prob)
    for indices in itertools.product(range(len(prob)), repeat=n):
        y = torch.tensor(indices)
        # those that tie for the best share the probability of the tuple
        best = y[reward[y] == reward[y].max()]
        share = prob[y].prod() / len(best)
        bon.index_add_(0, best, share.expand(len(best)))
    return bon


class ToyModel:
    """A language model with six responses of one token: six logits."""

    def __init__(self):
        self.logits = TOY_PROB.log().requires_grad_()

    def logprob(self, prompt: Tensor, response: Tensor) -> Tensor:
        """Return log π(y) (P, K) of responses (P, K, 1)."""
        return self.logits.log_softmax(0)[response[:, :, 0]]

    def sample(self, prompt: Tensor, k: int, length: int, generator: torch.Generator
               ) -> tuple[Tensor, None]:
        """Sample k responses (P, K, 1) to each prompt."""
        prob = self.logits.detach().softmax(0).expand(len(prompt), 6)
        response = torch.multinomial(prob, k, True, generator=generator)[:, :, None]
        return response, None


def _toy_reward(prompt: Tensor, response: Tensor) -> Tensor:  # (P, 1), (P, K, 1) -> (P, K)
    return TOY_REWARD[response[:, :, 0]]


def toy(n: int = 4) -> None:
    """Show the paper on six responses with known probabilities: all numbers can be checked."""
    cdf = TOY_PROB.cumsum(0) - TOY_PROB                         # (1): all with a lower reward
    log_bon = bon_logprob(TOY_PROB.log(), cdf.log(), n)
    bound = bon_logprob_bound(TOY_PROB.log(), cdf.log(), n).exp()
    brute = brute_force(TOY_PROB, TOY_REWARD, n)

    # vBoN: 64 samples of the policy in each update; F is estimated from 2,000 of the reference
    reference = ToyModel()
    policy = ToyModel()
    prompt = torch.zeros(1, 1)
    generator = torch.Generator().manual_seed(0)
    ref_response, _ = reference.sample(prompt, 2000, 1, generator)
    ref_rewards = _toy_reward(prompt, ref_response)
    optimizer = torch.optim.Adam([policy.logits], lr=0.05)
    print(f"Six responses, n = {n}. KL of the policy to best-of-n, in nats:")
    for step in range(401):
        logprob = policy.logits.detach().log_softmax(0)
        if step in (0, 25, 50, 100, 200, 400):
            print(f"  update {step:3}   {torch.sum(logprob.exp() * (logprob - log_bon)):.4f}")
        optimizer.zero_grad()
        rollout = roll_out(policy, reference, _toy_reward, prompt, 64, 1, generator)
        log_target = bon_target(rollout.ref_logprob, rollout.reward, ref_rewards, n)
        reinforce(policy, prompt, rollout.response, log_target)
        optimizer.step()

    print("\nThe probabilities of the responses (best of n: by enumeration of all tuples):\n")
    print(" reward   under π_ref   F (1)   best of n   exact (2)   bound (3)   trained policy")
    table = torch.stack([TOY_REWARD, TOY_PROB, cdf, brute, log_bon.exp(), bound, logprob.exp()], 1)
    for row in table.tolist():
        print("{:7.1f}{:14.3f}{:8.2f}{:12.4f}{:12.4f}{:12.4f}{:17.4f}".format(*row))


if __name__ == "__main__":
    toy()
