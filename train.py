"""train.py: from text to a policy whose one sample does the work of best-of-N, in five stages.

    python train.py --n 4                             the main job
    python train.py --n 2 4 8 --seed 0 1 2            several N, several repetitions
    python train.py --n 4 --method vbon kl-rl         beside other methods, see below
    python train.py --n 4 --data DIR                  your own labelled reviews
    python train.py --n 4 --sample "i watched this"   your own words, answered three ways

Methods, what each minimises, and its paper:
    vbon      KL(policy || best-of-N), exact                           arXiv 2407.06057, eq. (2)
    bound     the same, with a lower bound of best-of-N's log-prob     arXiv 2407.06057, eq. (3)
    kl-rl     β KL(policy || reference) - reward, the RLHF objective   arXiv 1909.08593
    bon-sft   KL(best-of-N || policy): imitate best-of-N's answers     arXiv 2304.06767
    bond      half vbon, half bon-sft (Jeffreys divergence)            arXiv 2407.14622
    bon       no training: the best of N draws; always shown           arXiv 2009.01325
    soft-bon  no training: one of N draws, with odds exp(reward/β)     arXiv 2505.03156

Writes results.jsonl, pareto.png, samples.txt and the trained policies to --out, and keeps finished
stages in --out/cache: the same command again, or another N, goes on from there.
"""
import argparse
import hashlib
import io
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from torch import Tensor

import vbon
from model import GPT, encode, lm_loss, make_encoding, train_lm, train_tokenizer
from reward import Classifier, builtin_reviews, load_reviews, train_classifier
from vbon import Target

NAMES = {"ref": "reference", "bon": "best-of-N", "soft-bon": "soft best-of-N", "vbon": "vBoN",
         "bound": "vBoN bound", "kl-rl": "KL-RL", "bon-sft": "BoN-SFT", "bond": "BOND"}
DECODED, TILTED = ("ref", "bon", "soft-bon"), ("kl-rl", "soft-bon")     # no training; with a β

# ------------------------------------------------------------------------------------- the settings

def settings(args: argparse.Namespace) -> dict:
    """What a result depends on besides N, method and seed, in the order of the stages."""
    s = dict(vocab=768, width=64, layers=2, heads=2, prompt_tokens=4, length=24, reviews=12000,
             lm_steps=1000, lm_batch=64, lm_lr=6e-3,                      # 1 reference model
             epochs=4,                                                    # 2 reward
             held_prompts=64, m_eval=512, prompts=512, m=64,              # 3 reference samples
             steps=90, batch=64, k=8, lr=7e-4,                            # 4 fine-tuning
             samples=64)                                                  # 5 evaluation
    if args.data:
        s |= dict(vocab=2048, length=28, lm_steps=2500, lm_lr=3e-3, epochs=6, m=128,
                  steps=250, lr=3e-4)
    if args.quick:
        s |= dict(vocab=400, width=32, reviews=600, lm_steps=10, epochs=1, held_prompts=8,
                  m_eval=64, prompts=8, m=16, steps=3, batch=4, k=4, samples=8)
    return s | {name: value for name in ("steps", "m") if (value := getattr(args, name))}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; a wrong one ends the program with status 2 and one line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage_error
    group = parser.add_argument_group("the method")
    group.add_argument("--n", type=positive_int, nargs="+", default=[4], metavar="N",
                       help="the N of best-of-N: more reward, further from π_ref (default: 4)")
    group.add_argument("--method", nargs="+", default=["vbon"], choices=list(NAMES)[1:],
                       metavar="METHOD", help="one or more of those above (default: vbon)")
    group.add_argument("--beta", type=positive_float, nargs="+", metavar="B",
                       help="the β of kl-rl and soft-bon: smaller goes further from π_ref "
                       "(default: for each N the one that takes kl-rl as far as best-of-N)")
    group.add_argument("--steps", type=positive_int,
                       help="updates of a policy: more land closer to π_bon (tripled for N > 8)")
    group.add_argument("--m", type=positive_int,
                       help="reference samples per training prompt: more make a better F")
    group.add_argument("--study", action="store_true", help="train nothing; print what the scale "
                       "of the reward, the bound and M do, and draw m-n*.png")
    group = parser.add_argument_group("the text")
    group.add_argument("--data", metavar="DIR", help="pos.txt and neg.txt, one review a line, or "
                       "pos/*.txt and neg/*.txt, one review a file (default: built-in reviews)")
    group.add_argument("--seed", type=int, nargs="+", default=[0],
                       help="each seed is a repetition of everything (default: 0)")
    group = parser.add_argument_group("the run")
    group.add_argument("--sample", metavar="TEXT", help="print answers to TEXT by reference, "
                       "best-of-N and policy; trains only what is not there yet")
    group.add_argument("--out", default="out", metavar="DIR",
                       help="folder of results and cache (default: out)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    group.add_argument("--quick", action="store_true", help="all tiny: a smoke test of seconds")
    return parser.parse_args(argv)


def positive_int(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above 0, for argparse."""
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


def usage_error(message: object) -> None:
    """Wrong usage or unusable input: one line, status 2."""
    print(f"train.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def prepare(args: argparse.Namespace) -> tuple[torch.device, list | None]:
    """The device, and the reviews of --data. What could be wrong with the command is looked at
    here, before any work."""
    out, name = Path(args.out), args.device
    try:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.zeros(1, device=name).device
        except (RuntimeError, AssertionError, NotImplementedError):
            raise ValueError(f"--device {name}: not to be had here; try --device cpu") from None
        if args.sample is not None and not args.sample.strip():
            raise ValueError("--sample: want a few words to continue")
        reviews = load_reviews(args.data) if args.data else None
        for folder in ("cache", "policies"):
            (out / folder).mkdir(parents=True, exist_ok=True)
            write(out / folder / ".writable", b"")
            (out / folder / ".writable").unlink()
        read_results(out / "results.jsonl")
    except (OSError, ValueError) as error:
        usage_error(error)
    return device, reviews

# ------------------------------------------------------------------ progress, randomness, the cache

def track(label: str, total: int, watch: dict[str, float] | None = None) -> Iterator[int]:
    """range(total), reporting elapsed and expected seconds and what stands in `watch`: one line
    that updates in a terminal, a line at each quarter in a file."""
    start, live = time.time(), sys.stdout.isatty()
    for i in range(total):
        yield i
        last = i + 1 == total
        if live or last or (i + 1) * 4 // total > i * 4 // total:
            spent = time.time() - start
            seen = "".join(f" {name} {value:.2f}" for name, value in (watch or {}).items())
            expected = spent / (i + 1) * total
            line = f"  {label} {i + 1}/{total}{seen}  {spent:.0f} of {expected:.0f} s"
            print(f"\r{line:<79.79}" if live else line,
                  end="" if live and not last else "\n", flush=True)


def generator(device: torch.device | str, *names: object) -> torch.Generator:
    """Random numbers of its own for each stage, N, method and seed, whatever ran before."""
    name = "/".join(map(str, names)).encode()
    seed = int.from_bytes(hashlib.sha256(name).digest()[:7], "big")
    return torch.Generator(device).manual_seed(seed)


def digest(*parts: object) -> str:
    """A short name for what prints the same twice; a Path stands for the file's content."""
    sha = hashlib.sha256(torch.__version__.encode())
    for part in parts:
        sha.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
    return sha.hexdigest()[:12]


def upto(s: dict, last: str) -> list:
    """The settings up to `last`: those that a stage depends on."""
    return list(s.items())[:list(s).index(last) + 1]


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def cached(path: Path, build: Callable[[], dict]) -> dict:
    """What `build` returns, kept in a file behind its checksum; read from there if that fits."""
    if path.exists():
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            print(f"  already there: {path.parent.name}/{path.name}", flush=True)
            return torch.load(io.BytesIO(content[32:]), weights_only=True)
        print(f"  corrupt, building it again: {path}", flush=True)
    buffer = io.BytesIO()
    torch.save(build(), buffer)
    content = buffer.getvalue()
    write(path, hashlib.sha256(content).digest() + content)
    return torch.load(io.BytesIO(content), weights_only=True)

# --------------------------------------------------------------------------------------- the stages

class World(NamedTuple):
    """What stages 1 to 3 make and stages 4 and 5 use."""
    s: dict
    seed: int
    device: torch.device
    cache: Path
    encoding: tiktoken.Encoding
    reference: GPT
    reward_fn: vbon.Reward
    key: str                           # names all of the above in the cache
    prompt: Tensor                     # (P, T0) for training
    held: Tensor                       # (P', T0) for evaluation, none of them among `prompt`
    train: dict | None = None          # reference samples to `prompt`: response (P, M, L), reward
    held_rewards: Tensor | None = None                                                   # (P', M')


def load_gpt(saved: dict, device: torch.device) -> GPT:
    """A GPT from its configuration and weights."""
    model = GPT(**saved["config"])
    model.load_state_dict(saved["weights"])
    return model.to(device)


def build_reference(s: dict, seed: int, device: torch.device, reviews: list) -> dict:
    """Stage 1: a tokenizer learned from the reviews, and a GPT trained on them."""
    texts = [text for text, _ in reviews]
    encoding = train_tokenizer(texts[:2000], s["vocab"])
    tokens = encode(encoding, texts, s["prompt_tokens"] + s["length"]).to(device)
    held = max(16, len(tokens) // 20)
    model = GPT(encoding.n_vocab, tokens.shape[1], s["layers"], s["heads"], s["width"],
                generator=generator("cpu", seed, "init")).to(device)
    train_lm(model, tokens[held:], s["lm_steps"], s["lm_batch"], s["lm_lr"],
             generator("cpu", seed, "lm"), track("step", s["lm_steps"]))
    with torch.no_grad():
        nats = lm_loss(model, tokens[:held]).item()
    ranks = map(encoding.decode_single_token_bytes, range(encoding.eot_token))
    return dict(ranks=[part.decode("latin1") for part in ranks],
                config=model.config, weights=model.state_dict(), nats=nats)


def build_reward(s: dict, seed: int, device: torch.device, reviews: list, encoding) -> dict:
    """Stage 2: the classifier, and its accuracy on reviews that it was not trained on."""
    texts, labels = zip(*reviews)
    tokens = encode(encoding, texts, s["prompt_tokens"] + s["length"]).to(device)
    labels = torch.tensor(labels, device=device)
    held = max(16, len(tokens) // 20)
    model = train_classifier(tokens[held:], labels[held:], encoding.eot_token,
                             track("epoch", s["epochs"]), generator("cpu", seed, "classifier"))
    with torch.no_grad():
        right = (model(tokens[:held]) > 0) == (labels[:held] > 0)
    return dict(weights=model.state_dict(), accuracy=right.double().mean().item())


def pick_prompts(s: dict, reviews: list, encoding, device) -> tuple[Tensor, Tensor]:
    """Training and held-out prompts (P, T0): how reviews begin, no sequence twice."""
    ids = [tuple(encoding.encode_ordinary(text)[:s["prompt_tokens"]]) for text, _ in reviews]
    distinct = list(dict.fromkeys(x for x in ids if len(x) == s["prompt_tokens"]))
    held = min(s["held_prompts"], len(distinct) // 4)
    if held < 2:
        usage_error(f"only {len(distinct)} different beginnings of reviews; want at least 8")
    prompts = torch.tensor(distinct[:held + s["prompts"]], device=device)
    return prompts[held:], prompts[:held]


def draw(w: World, model: GPT, prompt: Tensor, k: int, label: str, *name: object) -> dict:
    """k responses of a model to each prompt (P, T0), their log-probabilities and rewards (P, k)."""
    start, g, parts = time.time(), generator(w.device, w.seed, "draw", *name), []
    chunks = prompt.split(max(1, 2048 // k))
    for i in track(label, len(chunks)):
        response, logprob = vbon.sample(model, chunks[i], k, w.s["length"], g)
        parts.append((response.int().cpu(), logprob.cpu(), w.reward_fn(chunks[i], response).cpu()))
    drawn = dict(zip(("response", "logprob", "reward"), map(torch.cat, zip(*parts))))
    return drawn | dict(seconds=time.time() - start)


def held_out(w: World, part: int) -> dict:
    """Stage 3: m_eval reference responses to each held-out prompt. Part 0 measures F; best-of-N
    chooses among the others."""
    m = w.s["m_eval"]
    return cached(w.cache / f"held-out-{part}-{digest(w.key, upto(w.s, 'm_eval'))}.pt",
                  lambda: draw(w, w.reference, w.held, m, "held-out, part", "held-out", part))


def stages_1_to_3(args: argparse.Namespace, s: dict, seed: int, device: torch.device,
                  reviews: list | None) -> World:
    """Text to reference samples, each stage from the cache if it is there."""
    cache, here = Path(args.out) / "cache", Path(__file__).parent
    reviews = list(reviews or builtin_reviews(s["reviews"], seed))
    random.Random(seed).shuffle(reviews)
    code = [here / name for name in ("model.py", "reward.py", "train.py")]
    key = digest(seed, device.type, reviews, *code)

    print(f"1 text, tokenizer, reference model: {len(reviews)} reviews", flush=True)
    saved = cached(cache / f"reference-{digest(key, upto(s, 'lm_lr'))}.pt",
                   lambda: build_reference(s, seed, device, reviews))
    encoding = make_encoding({part.encode("latin1"): i for i, part in enumerate(saved["ranks"])})
    reference = load_gpt(saved, device)
    print(f"  held-out text: {saved['nats']:.2f} nats per token")

    print("2 reward: a sentiment classifier's logit", flush=True)
    saved = cached(cache / f"reward-{digest(key, upto(s, 'epochs'))}.pt",
                   lambda: build_reward(s, seed, device, reviews, encoding))
    classifier = Classifier(encoding.eot_token).to(device)
    classifier.load_state_dict(saved["weights"])
    print(f"  held-out accuracy: {saved['accuracy']:.3f}")

    print("3 reference samples, for the CDF of the reward", flush=True)
    w = World(s, seed, device, cache, encoding, reference, classifier.reward,
              digest(key, here / "vbon.py"), *pick_prompts(s, reviews, encoding, device))
    train = cached(cache / f"training-{digest(w.key, upto(s, 'm'))}.pt",
                   lambda: draw(w, reference, w.prompt, s["m"], "training, part", "training"))
    train["response"] = train["response"].long().to(device)
    return w._replace(train=train, held_rewards=held_out(w, 0)["reward"])


def targets(w: World, methods: list[str], n: int, betas: list[float] | None) -> list[Target]:
    """What the methods aim at for one N. Without a β given, the β whose optimum is as far from
    π_ref as best-of-n: found by bisection, two digits."""
    if betas is None and set(methods) & set(TILTED):
        low, high = 1e-3, 1e6
        for _ in range(50):
            beta = math.sqrt(low * high)
            far = vbon.optimum(Target("kl-rl", n, beta), w.train["reward"])["kl_ref"]
            low, high = (beta, high) if far > vbon.bon_theory(n)[0] else (low, beta)
        betas = [float(f"{beta:.2g}")]
    return [Target(method, n, beta) for method in methods
            for beta in (betas if method in TILTED else [None])]


def title(method: str, n: int) -> str:
    """How a method is called in a table."""
    return NAMES[method].replace("-of-N", f" of {n}")


def label(target: Target) -> str:
    """A short name for progress lines and files."""
    return target.method + (f" n={target.n}" if target.n > 1 or target.beta is None else "") + (
        f" β={target.beta:g}" if target.beta else "")


def build_policy(w: World, target: Target) -> dict:
    """Stage 4: the reference, fine-tuned towards a target."""
    s, start, watch = w.s, time.time(), {}
    steps = s["steps"] * (3 if target.n > 8 else 1)        # far from π_ref, what is poor is rare
    policy = load_gpt(dict(config=w.reference.config, weights=w.reference.state_dict()), w.device)
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.99), fused=True)
    responses = generator(w.device, w.seed, "train", *target)
    prompts = generator("cpu", w.seed, "prompts", *target)
    for step in track(label(target), steps, watch):
        late = max(0.0, 2 * step / steps - 1)                    # flat, then half a cosine
        optimizer.param_groups[0]["lr"] = s["lr"] * (1 + math.cos(math.pi * late)) / 2
        rows = torch.randperm(len(w.prompt), generator=prompts)[:s["batch"]]
        watch |= vbon.update(policy, w.reference, optimizer, w.reward_fn,
                             vbon.grow(target, step, steps), w.prompt[rows.to(w.device)],
                             w.train["response"][rows], w.train["reward"][rows], s["k"], responses)
    return dict(config=policy.config, weights=policy.state_dict(), seconds=time.time() - start)


def evaluate(w: World, policies: dict[Target, dict], curves: dict) -> list[dict]:
    """Stage 5: a row for each target of one N, on held-out prompts."""
    rows = []
    n, m = next(iter(policies)).n, w.s["m_eval"]
    parts = max(min(max(1, n // 8), 4), math.ceil(n / m))          # draws for 16 answers or more
    drawn = [held_out(w, 1 + part) for part in range(parts)]
    used = m * parts // n * n
    logprob, reward = (torch.cat([d[name] for d in drawn], 1)[:, :used]
                       for name in ("logprob", "reward"))
    seconds = sum(d["seconds"] for d in drawn)
    for target, saved in policies.items():
        if target.method in DECODED:
            picked = decode(target, logprob, reward, generator("cpu", w.seed, *target))
            own = vbon.log_target(target, *picked, w.held_rewards)
            row = vbon.metrics(n, own, *picked, w.held_rewards)
            row |= dict(samples_per_answer=1 if target.method == "ref" else n, seconds=seconds)
        else:
            policy = load_gpt(saved, w.device)
            own = draw(w, policy, w.held, w.s["samples"], label(target), "evaluate", *target)
            response = own["response"].long().to(w.device)
            with torch.no_grad():
                kl_ref = vbon.response_kl(policy, w.reference, w.held, response)
                ref_logprob = vbon.response_logprob(w.reference, w.held, response)
            row = vbon.metrics(n, own["logprob"], ref_logprob, own["reward"], w.held_rewards,
                               kl_ref)
            row |= dict(samples_per_answer=1, seconds=saved["seconds"] + own["seconds"])
        aim = vbon.optimum(target, w.held_rewards)
        row |= {f"aim_{name}": value for name, value in aim.items()}
        for plane, best in (("win_rate", curves["tilt"]), ("reward", curves["kl-rl"])):
            for by in ("", "aim_"):
                highest = np.interp(row[by + "kl_ref"], best["kl_ref"], best[plane])
                row[f"{by}gap_{plane}"] = float(highest) - row[by + plane]
        rows.append(target._asdict() | row)
    return rows


def decode(target: Target, logprob: Tensor, reward: Tensor, g: torch.Generator) -> list[Tensor]:
    """(P, A·N) -> (P, A): each N draws give one answer, the first of them for "ref"."""
    draws = reward.reshape(-1, target.n)[:, :1 if target.method == "ref" else None]
    pick = vbon.best_of_n(draws, g, target.beta)[:, None]                                 # (P·A, 1)
    return [x.reshape(-1, target.n).gather(1, pick).view(len(x), -1) for x in (logprob, reward)]


def theory(ref_rewards: Tensor) -> dict[str, dict[str, np.ndarray]]:
    """Curves in both planes, from reference rewards (P, M) alone: the highest win rate at a KL
    (tilt), best-of-N for every N, the optima of KL-RL for every β, which have the highest reward at
    a KL. Each ends where fewer than 16 effective samples are left."""
    cdf = vbon.empirical_cdf(ref_rewards, ref_rewards)
    strength = [0, *np.geomspace(1e-3, 100, 40)]
    curves = {"tilt": [vbon.tilt(t * cdf, ref_rewards) for t in strength],
              "kl-rl": [vbon.tilt(t * ref_rewards, ref_rewards) for t in strength],
              "bon": [vbon.tilt((n - 1) * cdf.log(), ref_rewards) for n in np.geomspace(1, 64, 24)]}
    return {name: {key: np.array([point[key] for point in curve if point["ess"] >= 16])
                   for key in ("kl_ref", "win_rate", "reward")} for name, curve in curves.items()}


def show_answers(w: World, policies: dict[Target, dict], prompt: Tensor) -> str:
    """The prompts (P, T0), each with an answer by the reference, best-of-n and the policies,
    unedited, behind its reward."""
    length = min(w.s["length"], w.reference.config["block_size"] - prompt.shape[1])
    answers = {}
    for target, saved in policies.items():
        model = load_gpt(saved, w.device) if saved else w.reference
        g, k = generator(w.device, w.seed, "show", target.n), 1
        if target.method in ("bon", "soft-bon"):
            k = target.n
        response, _ = vbon.sample(model, prompt, k, length, g)
        reward = w.reward_fn(prompt, response)
        best = vbon.best_of_n(reward.cpu(), generator("cpu", w.seed, "show", *target),
                              target.beta).to(w.device)
        rows = torch.arange(len(prompt), device=w.device)
        answers[target] = response[rows, best], reward[rows, best]
    lines = []
    for i, ids in enumerate(prompt.tolist()):
        lines.append(f"{w.encoding.decode(ids)} ...")
        for target, (response, reward) in answers.items():
            words = [x for x in response[i].tolist() if x != w.reference.eot]
            lines.append(f"  {title(target.method, target.n):<14}{reward[i].item():+6.2f}  "
                         f"...{w.encoding.decode(words)}")
    return "\n".join(lines) + "\n"

# -------------------------------------------------------------------------------------- the results

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
    names = ("method", "n", "beta", "seed", *made_by)
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


def print_table(rows: list[dict], m_eval: int) -> None:
    """Means over seeds and, under each N, what theory says."""
    print(f"\n{'':14}{'reward':>7}{'win rate':>13}{'KL to ref':>14}{'KL to BoN':>14}"
          f"{'pos.':>6}{'draws':>6}")
    groups = over_seeds(rows)
    for n in dict.fromkeys(row["n"] for row in rows):
        for (_, method, beta), group in ((k, v) for k, v in groups.items() if k[0] == n):
            cells = " ".join("{:7.3f} ±{:.3f}".format(*mean(group, name))[-13:].rjust(13)
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
              f"{mean(group, 'aim_kl_ref')[0]:7.3f}{cells}")
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


def plot(path: Path, rows: list[dict], ref_rewards: Tensor) -> None:
    """Win rate and reward against KL to the reference: theory as lines, measurements as points."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
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
    save(fig, path)


def study_rewards(w: World, n: int) -> None:
    """Increasing transforms of the reward leave vBoN's target as it is, and nothing else."""
    drawn = held_out(w, 1)
    logprob, reward, ref = (x.double() for x in (drawn["logprob"], drawn["reward"], w.held_rewards))
    top = ref.quantile(0.97).item()
    transforms = {"the logit r": lambda r: r, "its probability σ(r)": torch.sigmoid,
                  "r³": lambda r: r ** 3, "the top 3 % raised by 20": lambda r: r + 20 * (r > top)}
    vbon_target, = targets(w, ["vbon"], n, None)
    rl_target, = targets(w, ["kl-rl"], n, None)
    print(f"\n{'largest change of a log target':30}{'vBoN':>8}{'KL-RL':>8}"
          f"{f'optimum at β={rl_target.beta:g}: win':>26}{'KL':>7}")
    for name, f in transforms.items():
        less, equal, _ = vbon._ranks(reward, ref)
        if not all(map(torch.equal, vbon._ranks(f(reward), f(ref))[:2], (less, equal))):
            raise ArithmeticError(f"{name}: the ranks have changed")
        changes = []
        for target in (vbon_target, rl_target):
            new, old = (vbon.log_target(target, logprob, g(reward), g(ref))
                        for g in (f, transforms["the logit r"]))
            change = new - old
            changes.append((change - change.mean(1, keepdim=True)).abs().max().item())
        best = vbon.optimum(rl_target, f(ref))
        print(f"  {name:28}{changes[0]:8.3g}{changes[1]:8.3g}{best['win_rate']:26.3f}"
              f"{best['kl_ref']:7.3f}")


def study_bound(w: World, n: int) -> None:
    """How far (2) lies above its bound (3), by how probable a response is under π_ref."""
    logprob, reward = (w.train[name].double() for name in ("logprob", "reward"))
    log_cdf = vbon.empirical_cdf(reward, reward).log()
    gap = vbon.bon_logprob(logprob, log_cdf, n) - vbon.bon_logprob_bound(logprob, log_cdf, n)
    print(f"\nlog π_ref(y), nats   responses   exact (2) - bound (3) at N = {n}: mean, largest")
    edges = [0, -8, -12, -16, -20, -24, -math.inf]
    for high, low in zip(edges, edges[1:]):
        chosen = gap[(logprob <= high) & (logprob > low)]
        if len(chosen):
            print(f"  {low:6} to {high:4}{len(chosen):15}{chosen.mean().item():22.2g}"
                  f"{chosen.max().item():12.2g}")


def study_m(n: int, rows: list[dict], path: Path) -> None:
    """What M does: the error of log F̂, the same for any continuous reward, beside the DKW bound of
    F̂; and policies trained with it, as far as results.jsonl has them for this N."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    u, trained = torch.rand(4000, 32, generator=generator("cpu", "uniform")).double(), {}
    ms = sorted({16, 32, 64, 128, 256, 512} | {row["m"] for row in rows})
    error, dkw = [], [math.sqrt(math.log(2 / 0.05) / (2 * m)) for m in ms]
    print(f"\n{'M':>5}{'RMSE of log F̂':>16}{'DKW, 95 %: ±':>14}{f'vBoN, N = {n}: win rate':>26}"
          f"{'KL to BoN':>16}")
    for m, bound in zip(ms, dkw):
        ref = torch.rand(4000, m, generator=generator("cpu", "uniform", m)).double()
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
    save(fig, path)


def save(fig, path: Path) -> None:
    """A figure as a PNG, whole or not at all."""
    picture = io.BytesIO()
    fig.savefig(picture, format="png", dpi=150)
    write(path, picture.getvalue())


def main(argv: list[str] | None = None) -> None:
    """The five stages for each seed, straight down, then what was found."""
    args, began = parse(argv), time.time()
    s, out = settings(args), Path(args.out)
    device, reviews = prepare(args)
    made_by = dict(device=device.type, data=digest(reviews) if args.data else "built-in", **s)
    methods = [m for m in NAMES if m in {"ref", "bon", *args.method}
               or m == "soft-bon" and "kl-rl" in args.method]
    rows, text, held_rewards = [], "", []
    for seed in dict.fromkeys(args.seed):
        w = stages_1_to_3(args, s, seed, device, reviews)
        room = w.reference.config["block_size"]
        if args.sample and len(w.encoding.encode_ordinary(args.sample)) >= room:
            usage_error(f"--sample: want fewer than {room} tokens")

        if args.study:
            for n in dict.fromkeys(args.n):
                study_rewards(w, n)
                study_bound(w, n)
                study_m(n, [row for row in read_results(out / "results.jsonl")
                            if (row["method"], row["n"]) == ("vbon", n) and all(
                                row.get(k) == v for k, v in made_by.items() if k != "m")],
                        out / f"m-n{n}.png")
            continue

        print("4 fine-tuning: policies that do the work of best-of-N", flush=True)
        policies = {}
        for n in dict.fromkeys(args.n):
            for target in targets(w, methods, n, args.beta):
                aim = target._replace(n=1) if target.method == "kl-rl" else target
                name = f"{label(aim).replace(' ', '-')}-seed{seed}-{digest(w.key, upto(s, 'lr'))}"
                policies.setdefault(n, {})[target] = None if target.method in DECODED else cached(
                    out / "policies" / f"{name}.pt", lambda: build_policy(w, aim))

        if args.sample is not None:
            prompt = torch.tensor([w.encoding.encode_ordinary(args.sample)] * 3, device=device)
            for n in policies:
                print("\n" + show_answers(w, policies[n], prompt), end="")
            continue

        print("5 evaluation on held-out prompts", flush=True)
        curves = theory(w.held_rewards)
        new = [row | dict(seed=seed, beta_found=args.beta is None and row["beta"] is not None)
               for n in policies for row in evaluate(w, policies[n], curves)]
        add_results(out / "results.jsonl", new, made_by)
        rows += new
        held_rewards.append(w.held_rewards)
        text += "\n".join(f"N = {n}, seed {seed}\n\n" + show_answers(w, policies[n], w.held[:8])
                          for n in policies)
        write(out / "samples.txt", text.encode())
    if not rows:
        return
    print_table(rows, s["m_eval"])
    rows = [row for row in read_results(out / "results.jsonl")
            if all(row.get(name) == value for name, value in made_by.items())]
    trained = [row for row in rows if row["method"] not in DECODED]
    if len({row["method"] for row in trained}) > 1:
        print_comparison(trained)
    plot(out / "pareto.png", rows, torch.cat(held_rewards))
    print(f"{time.time() - began:.0f} s in all; see {out}/: pareto.png, samples.txt, results.jsonl")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; finished stages are kept", file=sys.stderr)
        sys.exit(130)
