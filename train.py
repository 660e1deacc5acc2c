"""train.py: from text to a policy whose one sample does the work of best-of-N, in five stages.

    python train.py --n 4                             the main job
    python train.py --n 2 4 8 16                      several N; stages 1 to 3 are shared
    python train.py --n 4 --data DIR                  your own labelled reviews
    python train.py --n 4 --sample "i watched this"   your own words, answered three ways

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

import tiktoken
import torch
from torch import Tensor

import vbon
from model import GPT, encode, lm_loss, make_encoding, train_lm, train_tokenizer
from reward import Classifier, builtin_reviews, load_reviews, train_classifier

METHODS = {"vbon": "vBoN", "bound": "vBoN bound"}

# ------------------------------------------------------------------------------------- the settings

def settings(args: argparse.Namespace) -> dict:
    """What a result depends on besides N, method and seed, in the order of the stages."""
    s = dict(vocab=768, width=64, layers=2, heads=2, prompt_tokens=4, length=24, reviews=12000,
             lm_steps=1000, lm_batch=64, lm_lr=6e-3,                      # 1 reference model
             epochs=4,                                                    # 2 reward
             held_prompts=64, m_eval=512, prompts=512, m=64,              # 3 reference samples
             steps=100, batch=64, k=8, lr=7e-4,                           # 4 vBoN
             samples=64, answers=128)                                     # 5 evaluation
    if args.data:
        s |= dict(vocab=2048, length=28, lm_steps=2500, lm_lr=3e-3, epochs=6, m=128,
                  steps=250, lr=3e-4)
    if args.quick:
        s |= dict(vocab=400, width=32, reviews=600, lm_steps=10, epochs=1, held_prompts=8,
                  m_eval=64, prompts=8, m=16, steps=3, batch=4, k=4, samples=8, answers=8)
    return s | {name: value for name in ("steps", "m") if (value := getattr(args, name))}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; a wrong one ends the program with status 2 and one line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage_error
    group = parser.add_argument_group("the method")
    group.add_argument("--n", type=at_least_one, nargs="+", default=[4], metavar="N",
                       help="the N of best-of-N: more reward, further from π_ref (default: 4)")
    group.add_argument("--method", nargs="+", default=["vbon"], choices=METHODS,
                       help="vbon: the exact log π_bon; bound: its lower bound (default: vbon)")
    group.add_argument("--steps", type=at_least_one,
                       help="updates of a policy: more land closer to π_bon")
    group.add_argument("--m", type=at_least_one,
                       help="reference samples per training prompt: more make a better F")
    group = parser.add_argument_group("the text")
    group.add_argument("--data", metavar="DIR", help="pos.txt and neg.txt, one review a line, or "
                       "pos/*.txt and neg/*.txt, one review a file (default: built-in reviews)")
    group.add_argument("--seed", type=int, default=0, help="another seed: another repetition")
    group = parser.add_argument_group("the run")
    group.add_argument("--sample", metavar="TEXT", help="print answers to TEXT by reference, "
                       "best-of-N and policy; trains only what is not there yet")
    group.add_argument("--out", default="out", metavar="DIR",
                       help="folder of results and cache (default: out)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    group.add_argument("--quick", action="store_true", help="all tiny: a smoke test of seconds")
    return parser.parse_args(argv)


def at_least_one(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"want an integer of at least 1, got {text!r}")
    return int(text)


def usage_error(message: object) -> None:
    """Wrong usage or unusable input: one line, status 2."""
    print(f"train.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def prepare(args: argparse.Namespace, s: dict) -> tuple[torch.device, list]:
    """The device and the shuffled reviews. What could be wrong with the command is looked at here,
    before any work."""
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
        reviews = (load_reviews(args.data) if args.data
                   else builtin_reviews(s["reviews"], args.seed))
        for folder in ("cache", "policies"):
            (out / folder).mkdir(parents=True, exist_ok=True)
            write(out / folder / ".writable", b"")
            (out / folder / ".writable").unlink()
        if (out / "results.jsonl").exists():
            read_results(out / "results.jsonl")
    except (OSError, ValueError) as error:
        usage_error(error)
    random.Random(args.seed).shuffle(reviews)
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
    encoding: tiktoken.Encoding
    eot: int
    reference: GPT
    reward_fn: vbon.Reward
    key: str                                 # names all of the above in the cache
    prompt: Tensor                           # (P, T0) for training
    held: Tensor                             # (P', T0) for evaluation, none of them among `prompt`
    ref_rewards: Tensor | None = None        # (P, M)
    held_rewards: Tensor | None = None       # (P', M')


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
    train_lm(model, tokens[held:], encoding.eot_token, s["lm_steps"], s["lm_batch"], s["lm_lr"],
             generator("cpu", seed, "lm"), track("step", s["lm_steps"]))
    with torch.no_grad():
        nats = lm_loss(model, tokens[:held], encoding.eot_token).item()
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


def draw(w: World, prompt: Tensor, k: int, *name: object) -> dict[str, Tensor]:
    """Stage 3: k reference responses to each prompt; their log-probabilities and rewards (P, k)."""
    g, parts = generator(w.device, w.seed, "draw", *name), []
    chunks = prompt.split(max(1, 2048 // k))
    for i in track(f"{name[0]}, part", len(chunks)):
        response, logprob = vbon.sample(w.reference, chunks[i], k, w.s["length"], w.eot, g)
        parts.append((logprob.cpu(), w.reward_fn(chunks[i], response).cpu()))
    logprob, reward = (torch.cat(part) for part in zip(*parts))
    return dict(logprob=logprob, reward=reward)


def stages_1_to_3(args: argparse.Namespace, s: dict, device: torch.device, reviews: list) -> World:
    """Text to reference samples, each stage from the cache if it is there."""
    seed, cache, here = args.seed, Path(args.out) / "cache", Path(__file__).parent
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
    w = World(s, seed, device, encoding, encoding.eot_token, reference, classifier.reward,
              digest(key, here / "vbon.py"), *pick_prompts(s, reviews, encoding, device))
    test = cached(cache / f"held-out-{digest(w.key, upto(s, 'm_eval'))}.pt",
                  lambda: draw(w, w.held, s["m_eval"], "held-out"))
    train = cached(cache / f"training-{digest(w.key, upto(s, 'm'))}.pt",
                   lambda: draw(w, w.prompt, s["m"], "training"))
    return w._replace(ref_rewards=train["reward"], held_rewards=test["reward"])


def build_policy(w: World, method: str, n: int) -> dict:
    """Stage 4: the reference, fine-tuned towards best-of-n."""
    s, start, watch = w.s, time.time(), {}
    policy = load_gpt(dict(config=w.reference.config, weights=w.reference.state_dict()), w.device)
    optimizer = torch.optim.Adam(policy.parameters(), betas=(0.9, 0.99), fused=True)
    responses = generator(w.device, w.seed, "train", method, n)
    prompts = generator("cpu", w.seed, "prompts", method, n)
    for step in track(f"{method} n={n}", s["steps"], watch):
        late = max(0.0, 2 * step / s["steps"] - 1)                    # flat, then half a cosine
        optimizer.param_groups[0]["lr"] = s["lr"] * (1 + math.cos(math.pi * late)) / 2
        rows = torch.randperm(len(w.prompt), generator=prompts)[:s["batch"]]
        watch |= vbon.update(policy, w.reference, optimizer, w.reward_fn, method,
                             vbon.grow_n(n, step, s["steps"]), w.prompt[rows.to(w.device)],
                             w.ref_rewards[rows], s["k"], s["length"], w.eot, responses)
    return dict(config=policy.config, weights=policy.state_dict(), seconds=time.time() - start)


def evaluate(w: World, n: int, policies: dict[str, dict]) -> list[dict]:
    """Stage 5: the rows of one N, on held-out prompts: reference, best-of-n, then the policies."""
    s, start = w.s, time.time()
    answers = max(8, min(s["answers"], 4096 // n))              # for large N, fewer but dearer ones
    draws = draw(w, w.held, answers * n, f"best of {n}")
    alone = {name: x[:, :answers] for name, x in draws.items()}
    ref = vbon.evaluate_reference(**alone, ref_rewards=w.held_rewards, n=n)
    bon = vbon.evaluate_bon(**draws, ref_rewards=w.held_rewards, n=n,
                            generator=generator("cpu", w.seed, "ties", n))
    seconds = time.time() - start
    rows = [dict(method="ref", n=n, **ref, samples_per_answer=1, seconds=seconds / n),
            dict(method="bon", n=n, **bon, samples_per_answer=n, seconds=seconds)]
    for method, saved in policies.items():
        start, policy = time.time(), load_gpt(saved, w.device)
        g, parts = generator(w.device, w.seed, "evaluate", method, n), []
        size = max(1, 1024 // s["samples"])
        chunks = list(zip(w.held.split(size), w.held_rewards.split(size)))
        for i in track(f"{method} n={n}, part", len(chunks)):
            parts.append(vbon.evaluate_policy(policy, w.reference, w.reward_fn, *chunks[i], n,
                                              s["samples"], s["length"], w.eot, g))
        reward, kl_ref, kl_bon = (torch.cat(part) for part in zip(*parts))
        rows.append(dict(method=method, n=n, **vbon.metrics(reward, w.held_rewards, kl_ref, kl_bon),
                         samples_per_answer=1, seconds=saved["seconds"] + time.time() - start))
    return rows


def show_answers(w: World, n: int, policies: dict[str, dict], prompt: Tensor) -> str:
    """The prompts (P, T0), each with an answer by the reference, best-of-n and the policies,
    unedited, behind its reward."""
    length = min(w.s["length"], w.reference.config["block_size"] - prompt.shape[1])
    eot, g = w.eot, generator(w.device, w.seed, "show", n)
    answers = {}
    for name, model, k in [("reference", w.reference, 1), (f"best of {n}", w.reference, n)] + [
            (METHODS[method], load_gpt(saved, w.device), 1) for method, saved in policies.items()]:
        response, _ = vbon.sample(model, prompt, k, length, eot, g)
        reward = w.reward_fn(prompt, response)
        best = vbon.best_of_n(reward.cpu(), generator("cpu", w.seed, "ties", n)).to(w.device)
        rows = torch.arange(len(prompt), device=w.device)
        answers[name] = response[rows, best], reward[rows, best]
    lines = []
    for i, ids in enumerate(prompt.tolist()):
        lines.append(f"{w.encoding.decode(ids)} ...")
        for name, (response, reward) in answers.items():
            words = [t for t in response[i].tolist() if t != eot]
            lines.append(f"  {name:<11}{reward[i].item():+6.2f}  ...{w.encoding.decode(words)}")
    return "\n".join(lines) + "\n"

# -------------------------------------------------------------------------------------- the results

def print_table(rows: list[dict], m_eval: int) -> None:
    """The rows with their standard errors and, under each N, what theory says."""
    print(f"\n{'':14}{'reward':>7}{'win rate':>13}{'KL to ref':>14}{'KL to BoN':>14}"
          f"{'pos.':>6}{'draws':>6}")
    for n in dict.fromkeys(row["n"] for row in rows):
        names = dict(ref="reference", bon=f"best of {n}", **METHODS)
        for row in (row for row in rows if row["n"] == n):
            cells = " ".join(f"{row[k]:7.3f} ±{row[k + '_se']:.3f}"[-13:].rjust(13)
                             for k in ("win_rate", "kl_ref", "kl_bon"))
            print(f"{names[row['method']]:14}{row['reward']:7.2f}{cells}"
                  f"{row['positive']:6.2f}{row['samples_per_answer']:6}")
        kl, win = vbon.bon_theory(n)
        print(f"{f'theory, N = {n}':21}{win:6.3f}{kl:14.3f}{0:14.3f}")
    print(f"± standard error; KLs in nats; a perfect policy's KL to BoN reads "
          f"{-0.5 / m_eval:.3f}")


def read_results(path: Path) -> list[dict]:
    """The rows of results.jsonl; ValueError if the file holds anything else."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise ValueError(f"{path}, line {number} is not a result; move the file away") from None
    return rows


def add_results(path: Path, rows: list[dict]) -> None:
    """Append rows to results.jsonl; one with the same settings as an older row takes its place."""
    measured = ("reward", "win_rate", "kl_ref", "kl_bon", "positive", "seconds")
    kept = {}
    for row in (read_results(path) if path.exists() else []) + rows:
        made_by = {k: v for k, v in row.items() if k.removesuffix("_se") not in measured}
        kept[json.dumps(made_by, sort_keys=True)] = row
    write(path, "".join(json.dumps(row) + "\n" for row in kept.values()).encode())


def plot(path: Path, rows: list[dict]) -> None:
    """Win rate against KL to the reference: theory as lines, measurements as points."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
    reach = 1.2 * max(row["kl_ref"] for row in rows) + 0.1
    kl, win = vbon.optimal_frontier(torch.logspace(-3, 2.5, 500, dtype=torch.float64))
    ax.plot(kl[kl < reach], win[kl < reach], "k:", lw=1.3, label="highest possible at this KL")
    n = torch.logspace(0, 5, 500, dtype=torch.float64)
    kl, win = n.log() - (n - 1) / n, n / (n + 1)
    ax.plot(kl[kl < reach], win[kl < reach], color="0.6", lw=1.3, label="best-of-N in theory")
    styles = dict(ref=("s", "black", "reference"),
                  bon=("o", "tab:blue", "best-of-N, N samples an answer"),
                  vbon=("D", "tab:red", "vBoN, one sample an answer"),
                  bound=("^", "tab:orange", "vBoN bound, one sample an answer"))
    for method, (marker, color, label) in styles.items():
        points = [row for row in rows if row["method"] == method]
        if points:
            x, y, dx, dy = ([row[k] for row in points]
                            for k in ("kl_ref", "win_rate", "kl_ref_se", "win_rate_se"))
            ax.errorbar(x, y, [2 * e for e in dy], [2 * e for e in dx], fmt=marker, color=color,
                        ms=6, mfc="none", capsize=2, lw=1, label=label)
    for n in dict.fromkeys(row["n"] for row in rows):
        ax.annotate(f"N = {n}", vbon.bon_theory(n), (-14, 10), textcoords="offset points",
                    ha="right", fontsize=9)
    ax.set(xlabel="KL(policy ‖ reference), nats per response", ylabel="win rate over the reference",
           title="Held-out prompts, ±2 standard errors")
    ax.legend(loc="lower right", frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    fig.savefig(picture, format="png", dpi=150)
    plt.close(fig)
    write(path, picture.getvalue())


def main(argv: list[str] | None = None) -> None:
    """The five stages, straight down."""
    args, began = parse(argv), time.time()
    s, out = settings(args), Path(args.out)
    device, reviews = prepare(args, s)
    w = stages_1_to_3(args, s, device, reviews)

    room = w.reference.config["block_size"]
    if args.sample and len(w.encoding.encode_ordinary(args.sample)) >= room:
        usage_error(f"--sample: want fewer than {room} tokens")

    print("4 vBoN: policies that do the work of best-of-N", flush=True)
    policies = {n: {} for n in args.n}
    for n in policies:
        for method in dict.fromkeys(args.method):
            key = digest(w.key, upto(s, "lr"), method, n)
            policies[n][method] = cached(out / "policies" / f"{method}-n{n}-seed{w.seed}-{key}.pt",
                                         lambda: build_policy(w, method, n))

    if args.sample is not None:
        prompt = torch.tensor([w.encoding.encode_ordinary(args.sample)] * 3, device=device)
        for n in policies:
            print("\n" + show_answers(w, n, policies[n], prompt), end="")
        return

    print("5 evaluation on held-out prompts", flush=True)
    made_by = dict(seed=w.seed, beta=None, device=device.type,
                   data=digest(reviews) if args.data else "built-in", **s)
    rows = [row | made_by for n in policies for row in evaluate(w, n, policies[n])]
    add_results(out / "results.jsonl", rows)
    plot(out / "pareto.png", rows)
    text = "\n".join(f"N = {n}\n\n" + show_answers(w, n, policies[n], w.held[:8]) for n in policies)
    write(out / "samples.txt", text.encode())
    print_table(rows, s["m_eval"])
    print(f"{time.time() - began:.0f} s in all; see {out}/: pareto.png, samples.txt, results.jsonl")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; finished stages are kept", file=sys.stderr)
        sys.exit(130)
