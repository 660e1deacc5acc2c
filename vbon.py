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

Probabilities are logarithms, in float64 on the CPU, where a (P, K) array costs nothing.
"""
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

Reward = Callable[[Tensor, Tensor], Tensor]    # prompt (P, T0), response (P, K, L) -> reward (P, K)
FORWARD = {"bon-sft": 1.0, "bond": 0.5}        # the share of KL(target || π_θ) in an objective
LOGITS = 2 ** 26                               # most logits at once: bounds memory, changes nothing

# ------------------------------------------------------------------------------ 1. the reward's CDF

def empirical_cdf(reward: Tensor, ref_rewards: Tensor) -> Tensor:  # (P, K), (P, M) -> (P, K)
    """F̂ of equation (1): (rank + 1) / (M + 1), where rank = #{r_j < r}, strictly: the best must
    beat the others. The +1 keeps log F̂ finite even for a reward below all M; up to it,
    P(sup|F̂ - F| > ε) <= 2 exp(-2 M ε²), the Dvoretzky-Kiefer-Wolfowitz bound.
    Raises ValueError for wrong shapes and for rewards that are empty or not finite."""
    less, _, m = _ranks(reward, ref_rewards)
    return (less + 1) / (m + 1)


def cdf_interval(reward: Tensor, ref_rewards: Tensor) -> tuple[Tensor, Tensor]:
    """F< and F≤ of equation (4), each (P, K): y counted as one more atom among M + 1.
    Under π_ref the weight of (4) made from them has mean exactly 1, at any M and with any ties."""
    less, equal, m = _ranks(reward, ref_rewards)
    return less / (m + 1), (less + equal + 1) / (m + 1)


def _ranks(reward: Tensor, ref_rewards: Tensor) -> tuple[Tensor, Tensor, int]:
    """#{r_j < r} and #{r_j = r}, each (P, K), and M."""
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
    Raises ValueError for unequal shapes, nan, and n that is no int >= 1."""
    ref_logprob, log_cdf = _log_inputs(n, ref_logprob, log_cdf)
    i = torch.arange(1, n + 1).double().view(-1, *[1] * log_cdf.dim())                   # (N, ...)
    log_choose = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    return (log_choose + _times(n - i, log_cdf) + i * ref_logprob).logsumexp(0)


def bon_logprob_bound(ref_logprob: Tensor, log_cdf: Tensor, n: int) -> Tensor:
    """Equation (3), shapes as `bon_logprob`. The gap closes as π_ref(y)/F goes to 0, as in text."""
    ref_logprob, log_cdf = _log_inputs(n, ref_logprob, log_cdf)
    return math.log(n) + _times(torch.tensor(n - 1), log_cdf) + ref_logprob


def bon_logprob_ties(ref_logprob: Tensor, log_lt: Tensor, log_le: Tensor, n: int) -> Tensor:
    """Equation (4), right for any ties: log_lt = log P(r' < r), log_le = log P(r' <= r).
    F≤ = F< + π_ref(y) gives (2); F≤ = F< gives (3); `cdf_interval` gives the empirical form."""
    ref_logprob, log_lt, log_le = _log_inputs(n, ref_logprob, log_lt, log_le)
    k = torch.arange(n).double().view(-1, *[1] * log_lt.dim())                           # (N, ...)
    return ref_logprob + (_times(n - 1 - k, log_le) + _times(k, log_lt)).logsumexp(0)


def best_of_n(reward: Tensor, generator: torch.Generator | None = None,
              beta: float | None = None) -> Tensor:  # (P, N) -> (P,)
    """Index of the highest of N rewards; ties are broken at random. ValueError if not finite.
    With beta, soft best-of-N (arXiv 2505.03156): one of the N with probability ∝ exp(r/β)."""
    _check_rewards(reward)
    best = (reward == reward.max(-1, keepdim=True).values).double()
    chance = (_f64(reward) / beta).softmax(-1) if beta else best
    return torch.multinomial(chance, 1, generator=generator)[:, 0]


def soft_bon_logprob(ref_logprob: Tensor, reward: Tensor, ref_rewards: Tensor, n: int,
                     beta: float) -> Tensor:  # (P, K), (P, K), (P, M) -> (P, K)
    """log(π_ref(y) · N · P(y is drawn)), the mean over rivals: reference rewards, N-1 at a time."""
    groups = _f64(ref_rewards)[:, :ref_rewards.shape[1] // (n - 1) * (n - 1)] / beta
    rivals = groups.view(len(reward), 1, -1, n - 1).logsumexp(-1)                     # (P, 1, B)
    drawn = F.logsigmoid(_f64(reward)[..., None] / beta - rivals)                      # (P, K, B)
    return _f64(ref_logprob) + math.log(n / rivals.shape[-1]) + drawn.logsumexp(-1)


def bon_expected_reward(ref_rewards: Tensor, n: int) -> Tensor:  # (P, M) -> (P,)
    """Unbiased E[max of N rewards] from the same M samples: Σ_j r_(j) C(j-1, N-1) / C(M, N)."""
    _check_n(n)
    _check_rewards(ref_rewards)
    if n > ref_rewards.shape[1]:
        raise ValueError(f"want ref_rewards (P, M), M >= n = {n}, got {tuple(ref_rewards.shape)}")
    ordered = _f64(ref_rewards).sort(-1).values
    j = torch.arange(n, ordered.shape[1] + 1).double()
    log_weight = torch.lgamma(j) - torch.lgamma(j - n + 1)            # + what is the same for all
    return (ordered[:, n - 1:] * log_weight.softmax(0)).sum(-1)


def bon_theory(n: int) -> tuple[float, float]:
    """KL(π_bon || π_ref) = log N - (N-1)/N nats and win rate N/(N+1), for a continuous reward."""
    _check_n(n)
    return math.log(n) - (n - 1) / n, n / (n + 1)

# ---------------------------------------------------------------- 3. the objective and its gradient

def leave_one_out(score: Tensor) -> Tensor:  # (P, K) -> (P, K)
    """The mean of the other K-1 scores of the same prompt: an unbiased baseline b for (6)."""
    if score.dim() != 2 or score.shape[1] < 2:
        raise ValueError(f"want score (P, K) with K >= 2, got {tuple(score.shape)}")
    return (score.sum(-1, keepdim=True) - score) / (score.shape[1] - 1)


def reverse_kl_loss(logprob: Tensor, log_target: Tensor) -> Tensor:  # (P, K), (P, K) -> ()
    """A surrogate whose *gradient* is that of KL(π_θ || target), y ~ π_θ: (6); its value means
    nothing. The score stays in one bracket, as its own control variate: when π_θ nears the target
    it tends to a constant, and the noise to zero. ValueError for K < 2, or what is not finite."""
    if logprob.shape != log_target.shape:
        raise ValueError(f"want (P, K) twice, got {[*logprob.shape]}, {[*log_target.shape]}")
    logprob = _f64(logprob)
    score = (_f64(log_target) - logprob).detach()               # log π_bon(y) - log π_θ(y)   (P, K)
    advantage = score - leave_one_out(score)                                               # (P, K)
    if not score.isfinite().all():
        raise ValueError("a sampled response has a log-probability that is not finite")
    return -(advantage * logprob).mean()


class Target(NamedTuple):
    """The distribution that a method moves the policy to, and for kl-rl and soft-bon their β."""
    method: str
    n: int
    beta: float | None = None


def log_target(target: Target, ref_logprob: Tensor, reward: Tensor, ref_rewards: Tensor) -> Tensor:
    """The log-density (P, K) of a target; that of kl-rl up to a constant."""
    method, n, beta = target
    log_cdf = empirical_cdf(reward, ref_rewards).log()
    if method == "ref" or method == "soft-bon" and n == 1:
        return _f64(ref_logprob)
    if method in ("bon", "vbon", "bon-sft", "bond"):
        return bon_logprob(ref_logprob, log_cdf, n)                                   # equation (2)
    if method == "bound":
        return bon_logprob_bound(ref_logprob, log_cdf, n)                             # equation (3)
    if method == "kl-rl":                               # maximises E[r] - β KL(π_θ || π_ref)
        return _f64(ref_logprob) + _f64(reward) / beta
    if method == "soft-bon":
        return soft_bon_logprob(ref_logprob, reward, ref_rewards, n, beta)
    raise ValueError(f"unknown method {method!r}")


def grow(target: Target, step: int, steps: int) -> Target:
    """The target at `step`: N grows from 1 over the first 40 % of the steps, 1/β from 0. At once, a
    large N would score the many poor responses of an untrained policy by a huge (N-1) log F."""
    share = min(1.0, (step + 1) / (0.4 * steps))
    return target._replace(n=round(target.n ** share), beta=target.beta and target.beta / share)

# ------------------------------------------------------------------------------------ 4. one update

def response_mask(response: Tensor, eot: int) -> Tensor:  # (..., L) -> (..., L)
    """True up to and including the first end-of-text token: the one mask of this project."""
    return (ended := response == eot).cumsum(-1) - ended.long() == 0


def sample(model, prompt: Tensor, k: int, length: int, generator: torch.Generator,
           rows: int = 1024) -> tuple[Tensor, Tensor]:
    """K responses (P, K, L) to each prompt (P, T0), and their log-probabilities (P, K), nats."""
    parts = [model.generate(part, length, generator)
             for part in prompt.repeat_interleave(k, 0).split(rows)]
    response, logprob = (torch.cat(part) for part in zip(*parts))
    return response.view(len(prompt), k, length), logprob.view(len(prompt), k)


def response_logprob(model, prompt: Tensor, response: Tensor) -> Tensor:
    """log π(y|x) (P, K), nats: summed over the response's tokens, end-of-text included."""
    return torch.cat([
        _token_sum(-F.cross_entropy(model(x, where=where), y[where], reduction="none"), where)
        for x, y, where in _rows(prompt, response, model.eot)]).view(response.shape[:2])


def response_kl(policy, reference, prompt: Tensor, response: Tensor) -> Tensor:
    """Σ_t KL(π_θ(·|x, y_<t) || π_ref(·|x, y_<t)) (P, K), nats: for y ~ π_θ an unbiased, quieter
    estimate of KL(π_θ || π_ref). To report, not to differentiate: y was sampled by θ too."""
    sums = []
    for tokens, _, where in _rows(prompt, response, policy.eot):
        log_p, log_q = (model(tokens, where=where).log_softmax(-1) for model in (policy, reference))
        sums.append(_token_sum((log_p.exp() * (log_p - log_q)).sum(-1), where))
    return torch.cat(sums).view(response.shape[:2])


def _rows(prompt: Tensor, response: Tensor, eot: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Prompts joined to responses, some rows at a time: tokens (R, T), the tokens after them, and
    where those are the response's, end-of-text included."""
    (P, K, _), before = response.shape, prompt.shape[1] - 1
    tokens = torch.cat([prompt[:, None].expand(P, K, -1), response], -1).flatten(0, 1)   # (P·K, T)
    mask = F.pad(response_mask(response, eot).flatten(0, 1), (before, 0))              # (P·K, T-1)
    rows = max(1, LOGITS // (tokens.shape[1] * (eot + 1)))
    for tokens, where in zip(tokens.split(rows), mask.split(rows)):
        T = int(where.any(0).nonzero().max()) + 1                           # no need to run further
        yield tokens[:, :T], tokens[:, 1:T + 1], where[:, :T]


def _token_sum(per_token: Tensor, where: Tensor) -> Tensor:
    """(tokens in the mask,) -> (R,): the only sum over tokens in this project."""
    per_row = torch.zeros(where.shape, dtype=torch.float64)
    return per_row.masked_scatter(where.cpu(), _f64(per_token)).sum(-1)


def winners(ref_rewards: Tensor, n: int, k: int, generator: torch.Generator) -> Tensor:
    """(P, M) -> (P, k): k draws of best-of-n among M responses, by (4) with atoms of 1/M."""
    less, equal, m = _ranks(ref_rewards, ref_rewards)
    weight = (((less + equal) / m) ** n - (less / m) ** n) / equal                         # (P, M)
    return torch.multinomial(weight.float().to(generator.device), k, True, generator=generator)


class LowRank(nn.Module):
    """W + B A with A (rank, columns) and B (rows, rank) to be trained; B is 0 at first."""
    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        a = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        self.a, self.b = (nn.Parameter(x.to(weight)) for x in (a, torch.zeros(len(weight), rank)))

    def forward(self, weight: Tensor) -> Tensor:
        """W -> W + B A, of the same shape."""
        return weight + self.b @ self.a


def low_rank(model: nn.Module, rank: int, generator: torch.Generator) -> list[nn.Parameter]:
    """Make all linear maps trainable in a few directions only, and return what to train: LoRA
    (arXiv 2106.09685). The noise of REINFORCE costs KL in every direction there is."""
    model.requires_grad_(False)
    for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        register_parametrization(module, "weight", LowRank(module.weight, rank, generator))
    return [p for p in model.parameters() if p.requires_grad]


def update(policy, reference, optimizer: torch.optim.Optimizer, reward_fn: Reward, target: Target,
           prompt: Tensor, ref_response: Tensor, ref_rewards: Tensor, k: int,
           generator: torch.Generator) -> dict[str, float]:
    """One step of any method, k responses to each prompt (P, T0): REINFORCE on its own and, with a
    forward share, maximum likelihood on winners among ref_response (P, M, L); what to watch."""
    forward, L, seen = FORWARD.get(target.method, 0.0), ref_response.shape[-1], {}
    won = round(forward * k)
    size = max(1, LOGITS // (k * (prompt.shape[1] + L) * (policy.eot + 1)))     # prompts at a time:
    optimizer.zero_grad()                                  # exact, since each has its own baseline
    for x, cached, refs in zip(*(y.split(size) for y in (prompt, ref_response, ref_rewards))):
        loss, watch = 0.0, {}
        if won < k:
            response, logprob = sample(policy, x, k - won, L, generator)        # y ~ π_θ  (P, K, L)
            with torch.no_grad():
                reward = reward_fn(x, response)                                             # (P, K)
                ref_logprob = response_logprob(reference, x, response)                      # (P, K)
                goal = log_target(target, ref_logprob, reward, refs)                        # (P, K)
            loss = (1 - forward) * reverse_kl_loss(response_logprob(policy, x, response), goal)
            watch = dict(win_rate=win_rate(reward, refs), kl_ref=_f64(logprob) - ref_logprob,
                         kl_target=_f64(logprob) - goal)
        if won:
            best = winners(refs, target.n, won, generator).to(x.device)                 # (P, won)
            best = cached.gather(1, best[..., None].expand(-1, -1, L))               # (P, won, L)
            watch["nll"] = -response_logprob(policy, x, best)
            loss = loss + forward * watch["nll"].mean()
        share = len(x) / len(prompt)
        (share * loss).backward()
        seen = {name: seen.get(name, 0.0) + share * v.mean().item() for name, v in watch.items()}
    optimizer.step()
    return seen

# ------------------------------------------------------------------------------------ 5. evaluation

def win_rate(reward: Tensor, ref_rewards: Tensor) -> Tensor:  # (P, K), (P, M) -> (P, K)
    """The share of M reference responses that y beats; ties count half."""
    less, equal, m = _ranks(reward, ref_rewards)
    return (less + equal / 2) / m


def metrics(n: int, logprob: Tensor, ref_logprob: Tensor, reward: Tensor, ref_rewards: Tensor,
            kl_ref: Tensor | None = None) -> dict[str, float]:
    """Means over K responses to each prompt (P, K) and, as those hang together, standard errors
    over prompts. `logprob` is under what drew them; `kl_ref`: a quieter estimate, if there is."""
    log_bon = log_target(Target("bon", n), ref_logprob, reward, ref_rewards)
    row = dict(positive=(reward > 0).double().mean().item())
    for name, x in dict(reward=_f64(reward), win_rate=win_rate(reward, ref_rewards),
                        kl_ref=_f64(logprob) - _f64(ref_logprob) if kl_ref is None else kl_ref,
                        kl_bon=_f64(logprob) - log_bon).items():
        x = x.mean(1)
        row[name], row[name + "_se"] = x.mean().item(), (x.std() / math.sqrt(len(x))).item()
    return row


def _f64(x: Tensor) -> Tensor:
    return x.cpu().double()                      # x as float64 on the CPU


def _times(k: Tensor, log_x: Tensor) -> Tensor:
    """k · log x with 0 · log 0 = 0, as x^0 = 1 demands; 0 · (-inf) alone would be nan."""
    return torch.where(k == 0, 0.0, k * log_x)


def _check_n(n: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"want an integer n >= 1, got {n!r}")


def _check_rewards(*rewards: Tensor) -> None:
    shapes = [tuple(r.shape) for r in rewards]
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or len({s[0] for s in shapes}) > 1:
        raise ValueError(f"want rewards (P, K) or (P, K) and (P, M), none empty, got {shapes}")
    if not all(r.isfinite().all() for r in rewards):
        raise ValueError("rewards must be finite, got nan or inf")


def _log_inputs(n: int, *logs: Tensor) -> list[Tensor]:
    """Log-probabilities in float64, once n, their shapes and the absence of nan are checked."""
    _check_n(n)
    if len({x.shape for x in logs}) > 1 or any(x.isnan().any() for x in logs):
        raise ValueError(f"want logs of one shape, no nan, got {[tuple(x.shape) for x in logs]}")
    return [_f64(x) for x in logs]
