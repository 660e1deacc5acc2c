"""Where a policy's KL to best-of-N comes from: which ranks of the reward it makes too probable."""
from torch import Tensor

import vbon

EDGES = (0, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 1)      # of F, the share of lower rewards


def study(evaluated: dict, ref_rewards: Tensor, n: int) -> None:
    """Print a row for each range of F, for a policy that train.evaluate has evaluated."""
    rows, explained = gap_by_rank(evaluated["logprob"], evaluated["ref_logprob"],
                                  evaluated["reward"], ref_rewards, n)
    print(f"\nWhere does the KL of vBoN to best of {n} come from?\n\n"
          f"{'F':>13}{'responses':>12}{'log π_θ / π_ref':>18}{'log π_bon / π_ref':>20}"
          f"{'of the KL':>12}")
    for row in rows:
        print(f"  {row['low']:4g} to {row['high']:<4g}{row['share']:11.1%}{row['policy']:17.2f}"
              f"{row['bon']:20.2f}{row['kl']:13.3f}")
    total = sum(row["kl"] for row in rows)
    noise = (n - 1) / (2 * ref_rewards.shape[1])
    print(f"{'together':>13}{total:62.3f}\n  F explains {explained:.0%} of the variance of "
          f"log π_θ - log π_bon. A perfect policy would have\n  (n - 1) / (2 M) = {noise:.3f}, not "
          f"0: F is estimated from M samples.")


def gap_by_rank(logprob: Tensor, ref_logprob: Tensor, reward: Tensor, ref_rewards: Tensor, n: int
                ) -> tuple[list[dict], float]:
    """Split KL(π_θ || π_bon) by the rank of the responses y ~ π_θ: (P, K), (P, M).

    A row has the range of F, its share of the responses, their mean log π_θ/π_ref and log
    π_bon/π_ref, and its part of the KL. The number beside the rows is the share of the variance of
    log π_θ - log π_bon that lies between them: 0 for a policy with the right function of F.
    """
    cdf = vbon.empirical_cdf(reward, ref_rewards)
    ref_logprob = ref_logprob.double()
    log_bon = vbon.bon_target(ref_logprob, reward, ref_rewards, n)
    log_policy_ratio = logprob.double() - ref_logprob
    log_bon_ratio = log_bon - ref_logprob
    difference = log_policy_ratio - log_bon_ratio
    # E[difference] is the KL. E[π_bon/π_θ - 1] is 0; with it, no response counts less than 0.
    part = difference + (-difference).exp() - 1
    rows = []
    between = 0.0
    for low, high in zip(EDGES, EDGES[1:]):
        inside = (cdf > low) & (cdf <= high)
        if not inside.any():
            continue
        share = inside.double().mean().item()
        rows.append({
            "low": low, "high": high, "share": share,
            "policy": log_policy_ratio[inside].mean().item(),
            "bon": log_bon_ratio[inside].mean().item(),
            "kl": share * part[inside].mean().item(),
        })
        between += share * (difference[inside].mean() - difference.mean()).square().item()
    variance = difference.var(correction=0).item()
    return rows, between / variance if variance > 0 else 0.0
