"""train.py: from text to a policy whose one sample does the work of best-of-N, in five stages.

    python train.py --n 4                             the main job
    python train.py --n 2 4 8 --seed 0 1 2            several N, several repetitions
    python train.py --n 4 --method vbon kl-rl         beside other methods, see below
    python train.py --n 4 --data DIR                  your own labelled reviews
    python train.py --n 4 --data DIR --init gpt2      from OpenAI's weights
    python train.py --n 4 --sample "i watched this"   your own words, answered three ways
    torchrun --nproc_per_node 2 -- train.py --n 4     on several GPUs, or machines

Methods, what each minimises, and its paper:
    vbon      KL(policy || best-of-N), exact                           arXiv 2407.06057, eq. (2)
    bound     the same, with a lower bound of best-of-N's log-prob     arXiv 2407.06057, eq. (3)
    kl-rl     β KL(policy || reference) - reward, the RLHF objective   arXiv 1909.08593
    bon-sft   KL(best-of-N || policy): imitate best-of-N's answers     arXiv 2304.06767
    bond      half vbon, half bon-sft (Jeffreys divergence)            arXiv 2407.14622
    bon       no training: the best of N draws; always shown           arXiv 2009.01325
    soft-bon  no training: one of N draws, with odds exp(reward/β)     arXiv 2505.03156

Writes results.jsonl, pareto.png, samples.txt and the trained policies to --out. The same command
again, or another N, goes on from what is there, after a crash too.
"""
import argparse
import copy
import hashlib
import io
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vbon
from assets import figures
from assets.figures import DECODED, write
from model import GPT, lm_loss, train_lm
from reward import (Classifier, builtin_reviews, encode, load_reviews, make_encoding,
                    pretrained_encoding, train_classifier, train_tokenizer)
from vbon import Target

TILTED = ("kl-rl", "soft-bon")                                          # the methods with a β
RANK, RANKS = (int(os.environ.get(name, i)) for i, name in enumerate(("RANK", "WORLD_SIZE")))

# ------------------------------------------------------------------------------------- the settings

def settings(args: argparse.Namespace, reviews: list | None) -> dict:
    """What a result depends on besides N, method and seed, in the order of the stages."""
    s = dict(vocab=768, width=64, layers=2, heads=2, prompt_tokens=4, length=24, reviews=12000,
             lm_steps=1000, lm_batch=64, lm_lr=6e-3,                      # 1 reference model
             epochs=4,                                                    # 2 reward
             held_prompts=64, m_eval=512, prompts=512, m=64,              # 3 reference samples
             steps=90, batch=64, k=8, rank=4, lr=5e-3,                    # 4 fine-tuning
             samples=64)                                                  # 5 evaluation
    if reviews:                              # real text has more entropy: more of everything
        count = len(reviews)
        s |= dict(reviews=count, vocab=min(2048, max(512, count // 4)), lm_lr=3e-3,
                  lm_steps=min(2000, count // 3), epochs=6, m=128, steps=600, lr=3e-3)
    if args.init:                            # GPT-2 knows English already
        s |= dict(lm_steps=min(150, s["reviews"] // 50), lm_lr=5e-5, held_prompts=32, prompts=256,
                  m=64, steps=250)
    if args.quick:
        s |= dict(vocab=400, width=32, reviews=600, lm_steps=10, epochs=1, held_prompts=8,
                  m_eval=64, prompts=8, m=16, steps=3, batch=4, k=4, samples=8)
    return s | {name: value for name in ("steps", "m") if (value := getattr(args, name))}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; a wrong one ends the program with status 2 and one line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage_error
    add = parser.add_argument_group("the method").add_argument
    add("--n", type=partial(positive, int), nargs="+", default=[4], metavar="N",
        help="the N of best-of-N: more reward, further from π_ref (default: 4)")
    add("--method", nargs="+", default=["vbon"], choices=list(figures.NAMES)[1:], metavar="METHOD",
        help="one or more of those above (default: vbon)")
    add("--beta", type=partial(positive, float), nargs="+", metavar="B",
        help="the β of kl-rl and soft-bon: smaller goes further (default: for each N the "
        "one that takes kl-rl as far as best-of-N)")
    add("--steps", type=partial(positive, int),
        help="updates of a policy: more land closer to π_bon (tripled for N > 8)")
    add("--m", type=partial(positive, int),
        help="reference samples per training prompt: more make a better F")
    add = parser.add_argument_group("the text and the model").add_argument
    add("--data", metavar="DIR", help="pos.txt and neg.txt, one review a line, or pos/*.txt and "
        "neg/*.txt, one review a file (default: built-in reviews)")
    add("--init", metavar="GPT2", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl (a download), or a "
        "Hugging Face folder of a GPT-2; then fine-tuned on the text (default: a small new model)")
    add("--seed", type=int, nargs="+", default=[0],
        help="each seed is a repetition of everything (default: 0)")
    add = parser.add_argument_group("the run").add_argument
    add("--sample", metavar="TEXT", help="print answers to TEXT by reference, best-of-N and "
        "policy; trains only what is not there yet")
    add("--out", default="out", metavar="DIR", help="folder of results and cache (default: out)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--quick", action="store_true", help="all tiny: a smoke test of seconds")
    return parser.parse_args(argv)


def positive(kind: type, text: str) -> float:
    """A finite number above 0, for argparse."""
    if not 0 < (value := kind(text)) < math.inf:
        raise ValueError
    return value


def usage_error(message: object) -> None:
    """Wrong usage or unusable input: one line, status 2."""
    print(f"train.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def prepare(args: argparse.Namespace) -> tuple[torch.device, list | None, tuple | None]:
    """The device, the reviews of --data, the model and vocabulary of --init and a short name for
    them. What could be wrong with the command is looked at here, before any work."""
    out, name = Path(args.out), args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and RANKS > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        usage_error(f"--device {name}: not to be had here; try --device cpu")
    try:
        if args.sample is not None and not args.sample.strip():
            raise ValueError("--sample: want a few words to continue")
        reviews = load_reviews(args.data) if args.data else None
        start = None
        if args.init:
            model, encoding = GPT.from_pretrained(args.init), pretrained_encoding(args.init)
            sizes = model.config["vocab_size"], encoding.n_vocab
            if sizes[0] != sizes[1] or model.config["block_size"] < 32:
                raise ValueError(f"--init {args.init}: want 32 positions, and the same number of "
                                 f"tokens in model and vocabulary, got {sizes}")
            name = digest(encoding.token_byte_values(), *model.state_dict().values())
            start = model, encoding, name
        for folder in ("cache", "policies"):
            (out / folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out / folder).close()                     # may we write?
        figures.read_results(out / "results.jsonl")
    except (OSError, ValueError) as error:
        usage_error(error)
    if RANKS > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    return device, reviews, start

# --------------------------------------------------- progress, randomness, the cache, several ranks

def track(label: str, steps: range, watch: dict[str, float] | None = None) -> Iterator[int]:
    """The steps, reporting elapsed and expected seconds and what stands in `watch`: one line that
    updates in a terminal, a line at each quarter in a file."""
    start, live, total = time.time(), sys.stdout.isatty(), steps.stop
    for done, i in enumerate(steps, 1):
        yield i
        last = done == len(steps)
        if live or last or (i + 1) * 4 // total > i * 4 // total:
            spent = time.time() - start
            seen = "".join(f" {name} {value:.2f}" for name, value in (watch or {}).items())
            expected = spent / done * len(steps)
            line = f"  {label} {i + 1}/{total}{seen}  {spent:.0f} of {expected:.0f} s"
            print(f"\r{line:<79.79}" if live else line,
                  end="" if live and not last else "\n", flush=True)


def generator(device: torch.device | str, *names: object) -> torch.Generator:
    """Random numbers named by what they are for, whatever ran before."""
    name = "/".join(map(str, names)).encode()
    seed = int.from_bytes(hashlib.sha256(name).digest()[:7], "big")
    return torch.Generator(device).manual_seed(seed)


def digest(*parts: object) -> str:
    """A short name for what prints the same twice; a file and a tensor count by their content."""
    sha = hashlib.sha256(torch.__version__.encode())
    for x in parts:
        sha.update(x.read_bytes() if isinstance(x, Path) else
                   x.numpy().tobytes() if isinstance(x, Tensor) else repr(x).encode())
    return sha.hexdigest()[:12]


def save(path: Path, content: dict) -> None:
    """Write tensors and numbers behind their checksum."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    if RANK == 0:
        write(path, hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())


def load(path: Path) -> dict | None:
    """What `save` wrote, on every rank; None if it is not there or not whole."""
    content = path.read_bytes() if RANK == 0 and path.exists() else b""
    if content and hashlib.sha256(content[32:]).digest() != content[:32]:
        print(f"  corrupt, building it again: {path}", flush=True)
        content = b""
    content = from_rank_0(content)
    return torch.load(io.BytesIO(content[32:]), "cpu", weights_only=True) if content else None


def cached(path: Path, build: Callable[[], dict]) -> dict:
    """What `build` returns, kept in a file."""
    found = load(path)
    if found is None:
        save(path, build())
        return load(path)                       # what is read again is the same to the last bit
    print(f"  already there: {path.parent.name}/{path.name}", flush=True)
    return found


def from_rank_0(value: object) -> object:
    """Rank 0's value."""
    box = [value]
    if RANKS > 1:
        dist.broadcast_object_list(box)
    return box[0]


def from_all_ranks(parts: dict) -> dict:
    """The union of all ranks' dicts."""
    box = [parts] * RANKS
    if RANKS > 1:
        dist.all_gather_object(box, parts)
    return {key: value for part in box for key, value in part.items()}


def average_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Before each step: the mean over ranks, each of which saw its share of the prompts."""
    for p in optimizer.param_groups[0]["params"]:
        dist.all_reduce(p.grad)
        p.grad /= RANKS

# --------------------------------------------------------------------------------------- the stages

class World(SimpleNamespace):
    """What stages 1 to 3 make: s (settings), seed, device, cache (folder), key (names all of it),
    encoding, reference, reward_fn, prompt (P, T0), held (P', T0), train (reference samples to
    `prompt`: response (P, M, L), reward (P, M)), held_rewards (P', M')."""


def build_reference(s: dict, seed: int, device: torch.device, texts: list[str],
                    start: tuple | None) -> dict:
    """Stage 1: a tokenizer learned from the reviews and a new GPT, or GPT-2's, trained on them."""
    model, encoding = copy.deepcopy(start[:2]) if start else (
        None, train_tokenizer(texts[:2000], s["vocab"]))
    tokens = encode(encoding, texts, s["prompt_tokens"] + s["length"]).to(device)
    if model is None:
        model = GPT(encoding.n_vocab, tokens.shape[1], s["layers"], s["heads"], s["width"],
                    generator=generator("cpu", seed, "init"))
    held = max(16, len(tokens) // 20)
    train_lm(model.to(device), tokens[held:], s["lm_steps"], s["lm_batch"], s["lm_lr"],
             generator("cpu", seed, "lm"), track("step", range(s["lm_steps"])))
    with torch.no_grad():
        nats = [lm_loss(model, part).item() for part in tokens[:held].split(64)]
    ranks = map(encoding.decode_single_token_bytes, range(encoding.eot_token))
    return dict(ranks=[part.decode("latin1") for part in ranks], pattern=encoding._pat_str,
                config=model.config, weights=model.state_dict(), nats=sum(nats) / len(nats))


def load_gpt(saved: dict, device: torch.device) -> GPT:
    """A GPT from its configuration and weights."""
    model = GPT(**saved["config"])
    model.load_state_dict(saved["weights"])
    return model.to(device)


def build_reward(s: dict, seed: int, device: torch.device, reviews: list, encoding) -> dict:
    """Stage 2: the classifier, and its accuracy on reviews that it was not trained on."""
    texts, labels = zip(*reviews)
    tokens = encode(encoding, texts, s["prompt_tokens"] + s["length"]).to(device)
    labels = torch.tensor(labels, device=device)
    held = max(16, len(tokens) // 20)
    model = train_classifier(tokens[held:], labels[held:], encoding.n_vocab,
                             track("epoch", range(s["epochs"])),
                             generator("cpu", seed, "classifier"))
    with torch.no_grad():
        right = (model(tokens[:held]) > 0) == (labels[:held] > 0)
    return dict(weights=model.state_dict(), accuracy=right.double().mean().item())


def build_world(args: argparse.Namespace, s: dict, seed: int, device: torch.device,
                reviews: list | None, start: tuple | None) -> World:
    """Stages 1 to 3, text to reference samples, each from the cache if it is there."""
    cache, here = Path(args.out) / "cache", Path(__file__).parent
    reviews = list(reviews or builtin_reviews(s["reviews"], seed))
    random.Random(seed).shuffle(reviews)
    upto = {last: list(s.items())[:list(s).index(last) + 1] for last in ("lm_lr", "epochs", "m")}
    code = [here / name for name in ("model.py", "reward.py", "train.py")]
    key = digest(seed, device.type, reviews, start and start[2], *code)

    print(f"1 text, tokenizer, reference model: {len(reviews)} reviews", flush=True)
    saved = cached(cache / f"reference-{digest(key, upto['lm_lr'])}.pt",
                   lambda: build_reference(s, seed, device, [text for text, _ in reviews], start))
    encoding = make_encoding({part.encode("latin1"): i for i, part in enumerate(saved["ranks"])},
                             saved["pattern"])
    reference = load_gpt(saved, device)
    print(f"  held-out text: {saved['nats']:.2f} nats per token, "
          f"perplexity {math.exp(saved['nats']):.1f}")

    print("2 reward: a sentiment classifier's logit", flush=True)
    saved = cached(cache / f"reward-{digest(key, upto['epochs'])}.pt",
                   lambda: build_reward(s, seed, device, reviews, encoding))
    classifier = Classifier(encoding.n_vocab).to(device)
    classifier.load_state_dict(saved["weights"])
    print(f"  held-out accuracy: {saved['accuracy']:.3f}")

    print("3 reference samples, for the CDF of the reward", flush=True)
    w = World(s=s, seed=seed, device=device, cache=cache, encoding=encoding, reference=reference,
              reward_fn=classifier.reward, key=digest(key, RANKS, here / "vbon.py"))
    w.prompt, w.held = pick_prompts(s, reviews, encoding, device)
    w.train = cached(cache / f"training-{digest(w.key, upto['m'])}.pt",
                     lambda: draw(w, reference, w.prompt, s["m"], "training, part", "training"))
    w.train["response"] = w.train["response"].long().to(device)
    w.held_rewards = held_out(w, 0)["reward"]
    return w


def pick_prompts(s: dict, reviews: list, encoding, device: torch.device) -> tuple[Tensor, Tensor]:
    """Training and held-out prompts (P, T0): how reviews begin, no sequence twice."""
    ids = [tuple(encoding.encode_ordinary(text)[:s["prompt_tokens"]]) for text, _ in reviews]
    distinct = list(dict.fromkeys(x for x in ids if len(x) == s["prompt_tokens"]))
    held = min(s["held_prompts"], len(distinct) // 4)
    if held < 2:
        usage_error(f"only {len(distinct)} different beginnings of reviews; want at least 8")
    prompts = torch.tensor(distinct[:held + s["prompts"]], device=device)
    return prompts[held:], prompts[:held]


def draw(w: World, model: GPT, prompt: Tensor, k: int, label: str, *name: object) -> dict:
    """k responses of a model to each prompt (P, T0), their log-probabilities and rewards (P, k); of
    a policy also ref_logprob and kl_ref. Ranks draw in turn, whatever their number the same."""
    start, chunks, mine = time.time(), prompt.split(max(1, 2048 // k)), {}
    for i in track(label, range(RANK, len(chunks), RANKS)):
        x = chunks[i]
        response, logprob = vbon.sample(model, x, k, w.s["length"],
                                        generator(w.device, w.seed, "draw", *name, i))
        mine[i] = dict(response=response.int(), logprob=logprob, reward=w.reward_fn(x, response))
        if model is not w.reference:
            with torch.no_grad():
                mine[i] |= dict(ref_logprob=vbon.response_logprob(w.reference, x, response),
                                kl_ref=vbon.response_kl(model, w.reference, x, response))
        mine[i] = {name: value.cpu() for name, value in mine[i].items()}
    parts = from_all_ranks(mine)
    drawn = {name: torch.cat([parts[i][name] for i in range(len(chunks))]) for name in parts[0]}
    return drawn | dict(seconds=time.time() - start)


def held_out(w: World, part: int) -> dict:
    """Stage 3: m_eval reference responses to each held-out prompt. Part 0 measures F; best-of-N
    chooses among the others."""
    m = w.s["m_eval"]
    return cached(w.cache / f"held-out-{part}-{digest(w.key, w.s['held_prompts'], m)}.pt",
                  lambda: draw(w, w.reference, w.held, m, "held-out, part", "held-out", part))


def targets(methods: list[str], n: int, betas: list[float] | None, ref_rewards: Tensor
            ) -> list[Target]:
    """What the methods aim at for one N. Without a β given, the β whose optimum is as far from
    π_ref as best-of-n: found by bisection, two digits."""
    if betas is None and set(methods) & set(TILTED):
        low, high = 1e-3, 1e6
        for _ in range(50):
            beta = math.sqrt(low * high)
            far = vbon.optimum(Target("kl-rl", n, beta), ref_rewards)["kl_ref"]
            low, high = (beta, high) if far > vbon.bon_theory(n)[0] else (low, beta)
        betas = [float(f"{beta:.2g}")]
    return [Target(method, n, beta) for method in methods
            for beta in (betas if method in TILTED else [None])]


def label(target: Target) -> str:
    """A short name for progress lines and files."""
    return target.method + (f" n={target.n}" if target.n > 1 or target.beta is None else "") + (
        f" beta={target.beta:g}" if target.beta else "")


class LowRank(nn.Module):
    """A weight W plus a trained product B A of low rank (LoRA, arXiv 2106.09685). The noise of
    REINFORCE costs KL in proportion to the number of parameters; few go a long way."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns, generator=generator) / math.sqrt(columns))
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def low_rank(model: GPT, rank: int, generator: torch.Generator) -> list[nn.Parameter]:
    """Make all matrices but the positions' trainable in a few directions only; what to train."""
    model.requires_grad_(False)
    added = []
    for module in [model.wte, *(m for m in model.modules() if isinstance(m, nn.Linear))]:
        added.append(LowRank(module.weight, rank, generator).to(module.weight.device))
        parametrize.register_parametrization(module, "weight", added[-1])
    return [p for module in added for p in module.parameters()]


def merge(model: GPT) -> dict[str, Tensor]:
    """The weights of a plain GPT, with W + B A in the place of W."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    return model.state_dict()


def build_policy(w: World, target: Target, checkpoint: Path) -> dict:
    """Stage 4: the reference, fine-tuned towards a target. Goes on from the checkpoint, if any:
    every step has its own random numbers, so that the outcome is the same to the last bit."""
    s, start, watch = w.s, time.time(), {}
    steps = s["steps"] * (3 if target.n > 8 else 1)        # far from π_ref, what is poor is rare
    policy = load_gpt(dict(config=w.reference.config, weights=w.reference.state_dict()), w.device)
    trained = low_rank(policy, s["rank"], generator("cpu", w.seed, "low rank"))
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.99), fused=True)
    if RANKS > 1:
        optimizer.register_step_pre_hook(average_gradients)
    saved = load(checkpoint) or dict(step=0, seconds=0.0)
    if saved["step"]:
        for p, x in zip(trained, saved["trained"]):
            p.data.copy_(x)
        optimizer.load_state_dict(saved["optimizer"])
        print(f"  {label(target)}: on from step {saved['step']}", flush=True)
    due = time.time()
    for step in track(label(target), range(saved["step"], steps), watch):
        late = max(0.0, 2 * step / steps - 1)                    # flat, then half a cosine
        optimizer.param_groups[0]["lr"] = s["lr"] * (1 + math.cos(math.pi * late)) / 2
        order = torch.randperm(len(w.prompt), generator=generator("cpu", w.seed, *target, step))
        rows = order[:s["batch"]][RANK::RANKS]
        watch |= vbon.update(policy, w.reference, optimizer, w.reward_fn,
                             vbon.grow(target, step, steps), w.prompt[rows.to(w.device)],
                             w.train["response"][rows.to(w.device)], w.train["reward"][rows],
                             s["k"], generator(w.device, w.seed, *target, step, RANK))
        now = time.time()
        if RANK == 0 and now > due:                      # at most a twentieth of the time for it
            save(checkpoint, dict(step=step + 1, seconds=saved["seconds"] + now - start,
                                  trained=[p.data for p in trained],
                                  optimizer=optimizer.state_dict()))
            due = time.time() + 20 * (time.time() - now)
    return dict(config=policy.config, weights=merge(policy),
                seconds=saved["seconds"] + time.time() - start)


def evaluate(w: World, policies: dict[Target, dict], curves: dict) -> list[dict]:
    """Stage 5: a row for each target of one N, on held-out prompts."""
    rows = []
    n, m = next(iter(policies)).n, w.s["m_eval"]
    parts = max(min(max(1, n // 8), 4), math.ceil(n / m))          # draws for 16 answers or more
    drawn = [held_out(w, 1 + part) for part in range(parts)]
    draws = [torch.cat([d[name] for d in drawn], 1)[:, :m * parts // n * n]
             for name in ("logprob", "reward")]
    for target, saved in policies.items():
        if target.method in DECODED:
            picked = decode(target, *draws, generator("cpu", w.seed, *target))
            own = vbon.log_target(target, *picked, w.held_rewards)
            row = vbon.metrics(n, own, *picked, w.held_rewards)
            row |= dict(samples_per_answer=1 if target.method == "ref" else n,
                        seconds=sum(d["seconds"] for d in drawn))
        else:
            own = draw(w, load_gpt(saved, w.device), w.held, w.s["samples"], label(target),
                       "evaluate", *target)
            row = vbon.metrics(n, own["logprob"], own["ref_logprob"], own["reward"],
                               w.held_rewards, own["kl_ref"])
            row |= dict(samples_per_answer=1, seconds=saved["seconds"] + own["seconds"])
        rows.append(target._asdict() | row | figures.gaps(target, row, w.held_rewards, curves))
    return rows


def decode(target: Target, logprob: Tensor, reward: Tensor, g: torch.Generator) -> list[Tensor]:
    """(P, A·N) -> (P, A): each N draws give one answer, the first of them for "ref"."""
    draws = reward.reshape(-1, target.n)[:, :1 if target.method == "ref" else None]
    pick = vbon.best_of_n(draws, g, target.beta)[:, None]                                 # (P·A, 1)
    return [x.reshape(-1, target.n).gather(1, pick).view(len(x), -1) for x in (logprob, reward)]


def main(argv: list[str] | None = None) -> None:
    """The five stages for each seed, straight down, then what was found."""
    args, began = parse(argv), time.time()
    out, (device, reviews, start) = Path(args.out), prepare(args)
    s = settings(args, reviews)
    if s["batch"] % RANKS:
        usage_error(f"{s['batch']} prompts a step cannot be shared by {RANKS} processes")
    made_by = dict(device=device.type, ranks=RANKS, init=start and start[2],
                   data=digest(reviews) if args.data else "built-in", **s)
    methods = [m for m in figures.NAMES if m in {"ref", "bon", *args.method}
               or m == "soft-bon" and "kl-rl" in args.method]
    rows, text, held_rewards = [], "", []
    for seed in dict.fromkeys(args.seed):
        w = build_world(args, s, seed, device, reviews, start)
        print("4 fine-tuning: policies that do the work of best-of-N", flush=True)
        policies = {}
        for n in dict.fromkeys(args.n):
            for target in targets(methods, n, args.beta, w.train["reward"]):
                aim = target._replace(n=1) if target.method == "kl-rl" else target
                name = label(aim).replace(" ", "-")
                file = out / "policies" / f"{name}-seed{seed}-{digest(w.key, s)}.pt"
                policies.setdefault(n, {})[target] = None if target.method in DECODED else cached(
                    file, lambda: build_policy(w, aim, file.with_suffix(".checkpoint")))
                file.with_suffix(".checkpoint").unlink(missing_ok=True)

        if args.sample is not None:
            prompt = torch.tensor([w.encoding.encode_ordinary(args.sample)] * 3, device=device)
            if prompt.shape[1] >= w.reference.config["block_size"]:
                usage_error(f"--sample: want fewer than {w.reference.config['block_size']} tokens")
            for n in policies:
                print("\n" + show_answers(w, policies[n], prompt), end="")
            continue

        print("5 evaluation on held-out prompts", flush=True)
        curves = figures.theory(w.held_rewards)
        new = [row | dict(seed=seed, beta_found=args.beta is None and row["beta"] is not None)
               for n in policies for row in evaluate(w, policies[n], curves)]
        rows += new
        held_rewards.append(w.held_rewards)
        text += "\n".join(f"N = {n}, seed {seed}\n\n" + show_answers(w, policies[n], w.held[:8])
                          for n in policies)
        if RANK == 0:
            figures.add_results(out / "results.jsonl", new, made_by)
            write(out / "samples.txt", text.encode())
    if rows and RANK == 0:
        figures.report(out, rows, made_by, torch.cat(held_rewards))
        print(f"{time.time() - began:.0f} s in all; "
              f"see {out}/: pareto.png, samples.txt, results.jsonl")


def show_answers(w: World, policies: dict[Target, dict], prompt: Tensor) -> str:
    """The prompts (P, T0), each with an answer by the reference, best-of-n and the policies,
    unedited, behind its reward."""
    length = min(w.s["length"], w.reference.config["block_size"] - prompt.shape[1])
    lines = [f"{w.encoding.decode(ids)} ..." for ids in prompt.tolist()]
    for target, saved in policies.items():
        model = load_gpt(saved, w.device) if saved else w.reference
        k = target.n if target.method in ("bon", "soft-bon") else 1
        response, _ = vbon.sample(model, prompt, k, length,
                                  generator(w.device, w.seed, "show", target.n))
        reward = w.reward_fn(prompt, response).cpu()
        best = vbon.best_of_n(reward, generator("cpu", w.seed, "show", *target), target.beta)
        for i, j in enumerate(best.tolist()):
            words = [x for x in response[i, j].tolist() if x != w.reference.eot]
            lines[i] += (f"\n  {figures.title(target.method, target.n):<14}{reward[i, j]:+6.2f}  "
                         f"...{w.encoding.decode(words)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; finished stages are kept", file=sys.stderr)
        sys.exit(130)
