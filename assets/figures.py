"""figures.py: what methods aim at, results, tables and pictures: all of train.py but the training.

By itself, this answers three questions that need no fine-tuning: what the scale of the reward, the
bound and the number of reference samples M do. It takes the arguments of `train.py`, uses what that
has left in --out, and draws m-n*.png there.

    python assets/figures.py --n 4
"""
import io
import json
import math
import os
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import vbon
from model import GPT, load_gpt
from vbon import Target

matplotlib.use("agg")
import matplotlib.pyplot as plt

NAMES = {"ref": "reference", "bon": "best-of-N", "soft-bon": "soft best-of-N", "vbon": "vBoN",
         "bound": "vBoN bound", "kl-rl": "KL-RL", "bon-sft": "BoN-SFT", "bond": "BOND"}
DECODED = ("ref", "bon", "soft-bon")                                    # methods without training
TILTED = ("kl-rl", "soft-bon")                                          # methods with a β


def label(target: Target) -> str:
    """A short name of what is trained, for progress lines and files."""
    return target.method + (f" beta={target.beta}" if target.beta else f" n={target.n}")


def draws(target: Target) -> int:
    """How many samples one answer takes."""
    return target.n if target.method in ("bon", "soft-bon") else 1


def title(method: str, n: int) -> str:
    """How a method is called in a table."""
    return NAMES[method].replace("-of-N", f" of {n}")

# --------------------------------------------------------------- what the methods aim at, in theory

def tilt(score: Tensor, ref_rewards: Tensor) -> dict[str, float]:  # (P, M), (P, M)
    """What ∝ π_ref(y) exp(score(y)) attains, from M reference responses alone, by self-normalised
    importance weights: reward, win_rate, kl_ref (nats), and the effective sample size, ess, to be
    kept well above 10. At its KL, score = t·F has the highest win rate, r/β the highest reward."""
    rewards, log_weight = ref_rewards.double().cpu(), score.double().cpu().log_softmax(-1)
    weight = log_weight.exp()                                                              # (P, M)
    values = dict(reward=rewards, win_rate=vbon.win_rate(rewards, rewards),
                  kl_ref=log_weight + math.log(score.shape[1]))
    means = {name: (weight * x).sum(-1).mean().item() for name, x in values.items()}
    return means | dict(ess=(1 / weight.square().sum(-1)).mean().item())


def optimum(target: Target, ref_rewards: Tensor) -> dict[str, float]:
    """`tilt` of a target itself: what a policy would attain that got there. (P, M)"""
    improbable = torch.full_like(ref_rewards, -1e3)             # no response comes up twice in text
    return tilt(vbon.log_target(target, improbable, ref_rewards, ref_rewards), ref_rewards)


def targets(methods: list[str], n: int, betas: list[float] | None, ref_rewards: Tensor
            ) -> list[Target]:
    """What the methods aim at for one N, and what they are shown beside. Without a β given, the β
    whose optimum is as far from π_ref as best-of-n: found by bisection, two digits."""
    methods = [m for m in NAMES if m in {"ref", "bon", *methods}
               or m == "soft-bon" and "kl-rl" in methods]
    if betas is None and set(methods) & set(TILTED):
        low, high = 1e-3, 1e6
        for _ in range(50):
            beta = math.sqrt(low * high)
            far = optimum(Target("kl-rl", n, beta), ref_rewards)["kl_ref"]
            low, high = (beta, high) if far > vbon.bon_theory(n)[0] else (low, beta)
        betas = [float(f"{beta:.2g}")]
    return [Target(method, n, beta) for method in methods
            for beta in (betas if method in TILTED else [None])]


def theory(ref_rewards: Tensor) -> dict[str, dict[str, np.ndarray]]:
    """Curves in both planes, from reference rewards (P, M) alone: the highest win rate at a KL
    (tilt), best-of-N for every N, the optima of KL-RL for every β, which have the highest reward at
    a KL. Each ends where fewer than 16 effective samples are left."""
    cdf = vbon.empirical_cdf(ref_rewards, ref_rewards)
    strength = [0, *np.geomspace(1e-3, 100, 40)]
    curves = {"tilt": [tilt(t * cdf, ref_rewards) for t in strength],
              "kl-rl": [tilt(t * ref_rewards, ref_rewards) for t in strength],
              "bon": [tilt((n - 1) * cdf.log(), ref_rewards) for n in np.geomspace(1, 64, 24)]}
    return {name: {key: np.array([point[key] for point in curve if point["ess"] >= 16])
                   for key in ("kl_ref", "win_rate", "reward")} for name, curve in curves.items()}


def gaps(target: Target, row: dict, ref_rewards: Tensor, curves: dict) -> dict[str, float]:
    """What a target's own optimum attains (aim_*), and how far the row (gap_*) and that optimum
    (aim_gap_*) lie below the highest win rate and reward at their own KL."""
    found = {f"aim_{name}": x for name, x in optimum(target, ref_rewards).items()}
    for plane, best in (("win_rate", curves["tilt"]), ("reward", curves["kl-rl"])):
        for by, at in (("", row), ("aim_", found)):
            highest = np.interp(at[by + "kl_ref"], best["kl_ref"], best[plane])
            found[f"{by}gap_{plane}"] = float(highest) - at[by + plane]
    return found

# -------------------------------------------------------------------- results, from samples to rows

def result(w: SimpleNamespace, target: Target, drawn: dict, saved: dict | None,
           g: torch.Generator) -> dict:
    """A row of results: of a policy from its own samples, of a decoding method from many of π_ref
    to choose among."""
    if not saved:
        x, reward = decode(target, drawn["logprob"], drawn["reward"], g)
        drawn = drawn | dict(logprob=vbon.log_target(target, x, reward, w.held_rewards),
                             ref_logprob=x, reward=reward)
    row = target._asdict() | vbon.metrics(target.n, drawn["logprob"], drawn["ref_logprob"],
                                          drawn["reward"], w.held_rewards, drawn.get("kl_ref"))
    return row | gaps(target, row, w.held_rewards, w.curves) | dict(
        seed=w.seed, beta_found=w.args.beta is None and target.beta is not None,
        samples_per_answer=draws(target),
        seconds=drawn["seconds"] + (saved["seconds"] if saved else 0.0))


def decode(target: Target, logprob: Tensor, reward: Tensor, g: torch.Generator) -> list[Tensor]:
    """(P, M) -> (P, A): each n draws give one answer, the first of them for "ref"."""
    both = [x[:, :x.shape[1] // target.n * target.n].reshape(-1, target.n)
            for x in (logprob, reward)]                                                  # (P·A, n)
    pick = vbon.best_of_n(both[1][:, :draws(target)], g, target.beta)[:, None]
    return [x.gather(1, pick).view(len(reward), -1) for x in both]


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_results(path: Path) -> list[dict]:
    """The rows of results.jsonl; ValueError if the file holds anything else."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise ValueError(f"{path}, line {number} is not a result; move the file away") from None
    return rows


def add_results(path: Path, rows: list[dict], made_by: dict) -> None:
    """Append rows to results.jsonl; one with the same settings as an older row takes its place."""
    names = ("method", "n", "beta", "beta_found", "seed", *made_by)
    kept = {json.dumps([row.get(name) for name in names]): row
            for row in read_results(path) + [row | made_by for row in rows]}
    write(path, "".join(json.dumps(row) + "\n" for row in kept.values()).encode())


def over_seeds(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows that differ in nothing but the seed: (n, method, β or None if it was found) -> rows."""
    groups = {}
    for row in rows:
        beta = None if row["beta_found"] else row["beta"]
        groups.setdefault((row["n"], row["method"], beta), []).append(row)
    return groups


def mean(rows: list[dict], name: str) -> tuple[float, float]:
    """Mean over seeds and its spread: standard deviation, or for one seed the standard error."""
    values = [row[name] for row in rows]
    return np.mean(values), (np.std(values, ddof=1) if len(values) > 1
                             else rows[0].get(name + "_se", 0.0))

# ----------------------------------------------------------------------- tables and the two planes

def print_table(rows: list[dict], m_eval: int) -> None:
    """Means over seeds and, under each N, what theory says."""
    print(f"\n{'':14}{'reward':>7}{'win rate':>13}{'KL to ref':>14}{'KL to BoN':>14}"
          f"{'pos.':>6}{'draws':>6}")
    groups = over_seeds(rows)
    for n in dict.fromkeys(row["n"] for row in rows):
        for (_, method, beta), group in ((k, v) for k, v in groups.items() if k[0] == n):
            cells = " ".join("{:.3f} ±{:.3f}".format(*mean(group, name)).rjust(13)
                             for name in ("win_rate", "kl_ref", "kl_bon"))
            print(f"{title(method, n):14}{mean(group, 'reward')[0]:7.2f}{cells}"
                  f"{mean(group, 'positive')[0]:6.2f}{group[0]['samples_per_answer']:6}"
                  + (f" β={mean(group, 'beta')[0]:.2g}" if group[0]["beta"] else ""))
        kl, win = vbon.bon_theory(n)
        print(f"{f'theory, N = {n}':21}{win:6.3f}{kl:14.3f}{0:14.3f}")
    seeds = len({row["seed"] for row in rows})
    print(f"± {f'deviation over {seeds} seeds' if seeds > 1 else 'standard error'}; KLs in nats; "
          f"a perfect policy's KL to BoN reads {-0.5 / m_eval:.3f}")


def print_comparison(rows: list[dict]) -> None:
    """How far trained policies are from their own optimum and from the frontier of each plane."""
    print(f"\n{'':17}{'own optimum':>14}{'win rate below the':>22}{'reward below the':>20}"
          f"\n{'':17}{'win':>7}{'KL':>7}{'highest: by aim, by training, each at its KL':>46}")
    for (n, method, beta), group in over_seeds(rows).items():
        cells = ""
        for plane in ("win_rate", "reward"):
            aim, both = (mean(group, f"{by}gap_{plane}")[0] for by in ("aim_", ""))
            cells += f"{aim:13.3f}{both - aim:7.3f}"
        print(f"{NAMES[method]:11} N={n:<4}{mean(group, 'aim_win_rate')[0]:7.3f}"
              f"{mean(group, 'aim_kl_ref')[0]:7.3f}{cells}" + (f" β={beta:g}" if beta else ""))
    print(f"\n{'on the Pareto frontier of its seed':36}{'win rate':>18}{'reward':>18}")
    shares = {plane: frontier_shares(rows, plane) for plane in ("win_rate", "reward")}
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = "".join("{:9.0%} [{:.0%}, {:.0%}]".format(*shares[plane][method]).rjust(18)
                        for plane in shares)
        points = sum(row["method"] == method for row in rows)
        print(f"{NAMES[method]:14}{points:4} points{'':11}{cells}")


def frontier_shares(rows: list[dict], plane: str) -> dict[str, tuple[float, float, float]]:
    """Per method, the share of its points that no other policy of the same seed beats in KL and
    `plane` both, and a 95 % bootstrap interval of it, over points within a seed."""
    rng, shares = random.Random(0), {}
    seeds = [[row for row in rows if row["seed"] == seed] for seed in {r["seed"] for r in rows}]
    for repeat in range(501):
        counts = {}
        for points in seeds:
            chosen = rng.choices(points, k=len(points)) if repeat else points
            for a in chosen:
                beaten = any(b["kl_ref"] <= a["kl_ref"] and b[plane] > a[plane] for b in chosen)
                counts.setdefault(a["method"], []).append(not beaten)
        for method, on in counts.items():
            shares.setdefault(method, []).append(np.mean(on))
    return {method: (x[0], *np.quantile(x, [0.025, 0.975])) for method, x in shares.items()}


STYLES = {"ref": ("s", "black"), "bon": ("o", "tab:blue"), "soft-bon": ("o", "tab:cyan"),
          "vbon": ("D", "tab:red"), "bound": ("^", "tab:orange"), "kl-rl": ("v", "tab:green"),
          "bon-sft": ("P", "tab:purple"), "bond": ("X", "tab:brown")}


def plot(rows: list[dict], ref_rewards: Tensor) -> bytes:
    """Win rate and reward against KL to the reference: theory as lines, measurements as points."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    reach = 1.15 * max(row["kl_ref"] for row in rows) + 0.1
    lines = {"tilt": ("k:", "optimum of the win rate: exp(t·F)"),
             "kl-rl": ("g--", "optimum of KL-RL: exp(r/β)"), "bon": ("b-", "best-of-N in theory")}
    base = {row["seed"]: row["reward"] for row in rows if row["method"] == "ref"}
    groups = over_seeds([row | dict(reward=row["reward"] - base[row["seed"]]) for row in rows])
    for ax, plane in zip(axes, ("win_rate", "reward")):
        for name, curve in theory(ref_rewards).items():
            near = curve["kl_ref"] < reach
            y = curve[plane] - (plane == "reward") * ref_rewards.mean().item()
            ax.plot(curve["kl_ref"][near], y[near], lines[name][0], lw=1, label=lines[name][1])
        for method, (marker, color) in STYLES.items():
            points = [group for key, group in groups.items() if key[1] == method]
            if points:
                (x, dx), (y, dy) = (zip(*[mean(group, name) for group in points])
                                    for name in ("kl_ref", plane))
                ax.errorbar(x, y, dy, dx, fmt=marker, color=color, ms=6, mfc="none", capsize=2,
                            lw=1, label=NAMES[method] + (", N draws" if "-of-" in NAMES[method]
                                                         else ""))
        ax.spines[["top", "right"]].set_visible(False)
        ax.set(xlabel="KL(policy ‖ reference), nats per response")
    axes[0].set(ylabel="win rate over the reference", title="what best-of-N aims for")
    axes[1].set(ylabel="reward, above the reference's", title="what KL-RL aims for")
    for n in dict.fromkeys(row["n"] for row in rows):
        axes[0].annotate(f"N = {n}", vbon.bon_theory(n), (-14, 10), textcoords="offset points",
                         ha="right", fontsize=9)
    axes[1].legend(loc="lower right", frameon=False, fontsize=8)
    return png(fig)


# --------------------------------------------------------------------- three questions, no training

def study_rewards(drawn: dict, ref: Tensor, targets: list[Target]) -> None:
    """Increasing transforms of the reward leave vBoN's target as it is, and nothing else."""
    logprob, reward, ref = (x.double() for x in (drawn["logprob"], drawn["reward"], ref))
    top = ref.quantile(0.97).item()
    transforms = {"the logit r": lambda r: r, "its probability σ(r)": torch.sigmoid,
                  "r³": lambda r: r ** 3, "the top 3 % raised by 20": lambda r: r + 20 * (r > top)}
    print(f"\n{'largest change of a log target':30}{'vBoN':>8}{'KL-RL':>8}"
          f"{f'optimum at β={targets[1].beta:g}: win':>26}{'KL':>7}")
    for name, f in transforms.items():
        less, equal, _ = vbon._ranks(reward, ref)
        if not all(map(torch.equal, vbon._ranks(f(reward), f(ref))[:2], (less, equal))):
            raise ArithmeticError(f"{name}: the ranks have changed")
        changes = []
        for target in targets:
            new, old = (vbon.log_target(target, logprob, g(reward), g(ref))
                        for g in (f, transforms["the logit r"]))
            change = new - old
            changes.append((change - change.mean(1, keepdim=True)).abs().max().item())
        best = optimum(targets[1], f(ref))
        print(f"  {name:28}{changes[0]:8.3g}{changes[1]:8.3g}{best['win_rate']:26.3f}"
              f"{best['kl_ref']:7.3f}")


def study_bound(drawn: dict, n: int) -> None:
    """How far (2) lies above its bound (3), by how probable a response is under π_ref."""
    logprob, reward = (drawn[name].double() for name in ("logprob", "reward"))
    log_cdf = vbon.empirical_cdf(reward, reward).log()
    gap = vbon.bon_logprob(logprob, log_cdf, n) - vbon.bon_logprob_bound(logprob, log_cdf, n)
    print(f"\nlog π_ref(y), nats   responses   exact (2) - bound (3) at N = {n}: mean, largest")
    edges = [0, -8, -12, -16, -20, -24, -math.inf]
    for high, low in zip(edges, edges[1:]):
        chosen = gap[(logprob <= high) & (logprob > low)]
        if len(chosen):
            print(f"  {low:6} to {high:4}{len(chosen):15}{chosen.mean().item():22.2g}"
                  f"{chosen.max().item():12.2g}")


def study_m(n: int, rows: list[dict]) -> bytes:
    """What M does: the error of log F̂, the same for any continuous reward, beside the DKW bound of
    F̂; and policies trained with it, as far as results.jsonl has them for this N."""
    g = torch.Generator().manual_seed(0)
    u, trained = torch.rand(4000, 32, generator=g).double(), {}
    ms = sorted({16, 32, 64, 128, 256, 512} | {row["m"] for row in rows})
    error, dkw = [], [math.sqrt(math.log(2 / 0.05) / (2 * m)) for m in ms]
    print(f"\n{'M':>5}{'RMSE of log F̂':>16}{'DKW, 95 %: ±':>14}{f'vBoN, N = {n}: win rate':>26}"
          f"{'KL to BoN':>16}")
    for m, bound in zip(ms, dkw):
        ref = torch.rand(4000, m, generator=g).double()
        error.append((vbon.empirical_cdf(u, ref).log() - u.log()).square().mean().sqrt().item())
        group = [row for row in rows if row["m"] == m]
        if group:
            trained[m] = mean(group, "kl_bon")
        cells = "".join("{:11.3f} ±{:.3f}".format(*mean(group, name)).rjust(20)
                        for name in ("win_rate", "kl_bon") if group)
        print(f"{m:5}{error[-1]:16.3f}{bound:14.3f}{cells}")
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    axes[0].loglog(ms, error, "o-", label="root mean square error of log F̂")
    axes[0].loglog(ms, dkw, "k:", label="95 % bound of sup |F̂ - F| (DKW)")
    axes[0].legend(frameon=False, fontsize=8)
    axes[0].set_yticks([0.1, 0.2, 0.4], [0.1, 0.2, 0.4])
    if trained:
        axes[1].errorbar(list(trained), *zip(*trained.values()), fmt="D-", color="tab:red",
                         capsize=2)
    axes[1].set(xscale="log", ylabel=f"KL to BoN after training, N = {n}", ylim=(0, None))
    for ax in axes:
        ax.set(xlabel="M, reference samples a prompt")
        ax.set_xticks(ms, ms)
        ax.minorticks_off()
    return png(fig)


def cost(layers: int, width: int, heads: int, vocab: int, updates: int = 3) -> None:
    """Time an update of 64·8 responses of 24 tokens by a GPT of random weights, on the CPU."""
    import resource                                                           # not on Windows
    g = torch.Generator().manual_seed(0)
    reference = GPT(vocab, 28, layers, heads, width, generator=g)
    policy = load_gpt(dict(config=reference.config, weights=reference.state_dict()), "cpu")
    optimizer = torch.optim.Adam(vbon.low_rank(policy, 4, g), lr=1e-4, fused=True)
    prompt, response = (torch.randint(vocab - 1, (64, *shape), generator=g)
                        for shape in ((4,), (64, 24)))
    seconds = []
    for _ in range(updates):
        start = time.time()
        vbon.update(policy, reference, optimizer, lambda x, y: (y % 7).double().mean(-1),
                    Target("vbon", 4), prompt, response, torch.randn(64, 64, generator=g), 8, g)
        seconds.append(time.time() - start)
    w = sum(p.numel() for name, p in reference.named_parameters() if "wpe" not in name)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6        # kB on Linux
    print(f"W = {w / 1e6:.2f} M: {min(seconds):.2f} s, "
          f"{10 * w * 64 * 8 * 24 / min(seconds) / 1e9:.0f} GFLOP/s, {memory:.2f} GB")


def png(fig) -> bytes:
    """A figure as a PNG."""
    picture = io.BytesIO()
    fig.savefig(picture, format="png", dpi=150)
    plt.close(fig)
    return picture.getvalue()


def answers(w: SimpleNamespace, policies: dict[Target, dict | None], prompt: Tensor) -> str:
    """For each N: the prompts (P, T0), each with an answer by the reference, best-of-n and the
    policies, unedited, behind its reward."""
    length, text = min(w.s["length"], w.reference.config["block_size"] - prompt.shape[1]), ""
    for n in dict.fromkeys(target.n for target in policies):
        lines = [f"{w.encoding.decode(ids)} ..." for ids in prompt.tolist()]
        for target, saved in ((t, saved) for t, saved in policies.items() if t.n == n):
            model = load_gpt(saved, w.device) if saved else w.reference
            response, _ = vbon.sample(model, prompt, draws(target), length,
                                      torch.Generator(w.device).manual_seed(w.seed % 2 ** 63))
            reward = w.reward_fn(prompt, response).cpu()
            best = vbon.best_of_n(reward, torch.Generator().manual_seed(0), target.beta)
            beta = f" {target.beta:g}" if w.args.beta and target.beta else ""
            for i, j in enumerate(best.tolist()):
                words = [x for x in response[i, j].tolist() if x != w.reference.eot]
                lines[i] += (f"\n  {title(target.method, n) + beta:<14}{reward[i, j]:+6.2f}  "
                             f"...{w.encoding.decode(words)}")
        text += f"\nN = {n}, seed {w.seed}\n\n" + "\n".join(lines) + "\n"
    return text


def report(out: Path, rows: list[dict], made_by: dict, ref_rewards: Tensor) -> None:
    """A table of this run; a comparison and pareto.png of all results with the same settings."""
    print_table(rows, made_by["m_eval"])
    rows = [row for row in read_results(out / "results.jsonl")
            if all(row.get(name) == value for name, value in made_by.items())]
    trained = [row for row in rows if row["method"] not in DECODED]
    if len({row["method"] for row in trained}) > 1:
        print_comparison(trained)
    write(out / "pareto.png", plot(rows, ref_rewards))


def main(argv: list[str] | None = None) -> None:
    """The three questions, for each N and the first seed of the arguments."""
    import train
    shared = train.prepare(argv)
    w, args = train.build_world(shared, shared.args.seed[0]), shared.args
    for n in args.n:
        *_, ours, rival = targets(["vbon", "kl-rl"], n, None, w.train["reward"])
        study_rewards(w.draws, w.held_rewards, [ours, rival])
        study_bound(w.train, n)
        rows = [row for row in read_results(w.out / "results.jsonl")
                if (row["method"], row["n"]) == ("vbon", n) and all(
                    row.get(k) == v for k, v in w.s.items() if k != "m")]
        write(w.out / f"m-n{n}.png", study_m(n, rows))


if __name__ == "__main__":
    main()
