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
import contextlib
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
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace as World

import torch
import torch.distributed as dist
from torch import Tensor

import vbon
from assets import figures
from model import GPT, lm_loss, load_gpt, train_lm
from reward import (Classifier, builtin_reviews, encode, load_reviews, pretrained_encoding,
                    train_classifier, train_tokenizer)
from vbon import Target

RANK, RANKS = (int(os.environ.get(name, i)) for i, name in enumerate(("RANK", "WORLD_SIZE")))

# ------------------------------------------------------------------------------------- the settings

def settings(args: argparse.Namespace, device: torch.device, reviews: list | None,
             start: tuple | None) -> dict:
    """All that a result depends on besides N, method and seed, in the order of the stages: a stage
    is done again when something up to its last setting has changed."""
    code = [Path(__file__).with_name(f"{name}.py") for name in ("vbon", "model", "reward", "train")]
    s = dict(code=digest(*code), device=device.type, ranks=RANKS, init=start and start[2],
             data=digest(reviews) if reviews else "built-in",
             vocab=768, width=64, layers=2, heads=2, prompt_tokens=4, length=24, reviews=12000,
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
    s["batch"] += -s["batch"] % RANKS                            # the same number for every process
    s |= {name: value for name in ("steps", "m") if (value := getattr(args, name))}
    if max(args.n) > s["m_eval"] and set(args.method) & set(figures.TILTED):
        usage_error(f"--n: want at most {s['m_eval']} with kl-rl or soft-bon")
    return s


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
    add("--beta", type=partial(positive, float), nargs="+", metavar="B", help="the β of kl-rl and "
        "soft-bon: smaller goes further (default: as far as best-of-N goes)")
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
    with contextlib.suppress(ValueError):
        if 0 < (value := kind(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"want {kind.__name__} > 0, got {text!r}")


def usage_error(message: object) -> None:
    """Wrong usage or unusable input: one line, status 2."""
    print(f"train.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def prepare(args: argparse.Namespace) -> tuple[torch.device, list | None, tuple | None]:
    """The device, the reviews of --data, the model and encoding of --init. What could be wrong with
    the command is looked at here, before any work."""
    name, out, start = args.device, Path(args.out), None
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
        if args.init:
            start = GPT.from_pretrained(args.init), pretrained_encoding(args.init)
            c, size = start[0].config, start[1].n_vocab
            if c["vocab_size"] != size or c["block_size"] < 32:
                raise ValueError(f"--init {args.init}: want 32 positions and {size} tokens, as in "
                                 f"the vocabulary, got {c['block_size']} and {c['vocab_size']}")
            start += digest(start[1].token_byte_values(), *start[0].state_dict().values()),
        for folder in (out / "cache", out / "policies"):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()                           # may we write?
        figures.read_results(out / "results.jsonl")
    except (OSError, ValueError) as error:
        usage_error(error)
    if RANKS > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    return device, reviews, start

# --------------------------------------------------- progress, randomness, the cache, several ranks

def track(label: str, steps: range, watch: dict | None = None) -> Iterator[int]:
    """The steps, reporting seconds so far and expected, and what stands in `watch`: one line that
    updates in a terminal, a line at each quarter in a file."""
    start, live, total = time.time(), sys.stdout.isatty(), steps.stop
    for done, i in enumerate(steps, 1):
        yield i
        spent, last = time.time() - start, done == len(steps)
        seen = "".join(f" {name} {value:.2f}" for name, value in (watch or {}).items())
        line = f"  {label} {i + 1}/{total}{seen}  {spent:.0f} of {spent / done * len(steps):.0f} s"
        if live or last or (i + 1) * 4 // total > i * 4 // total:
            print(f"\r{line:<79.79}" if live else line,
                  end="" if live and not last else "\n", flush=True)


def generator(device: torch.device | str, *names: object) -> torch.Generator:
    """Random numbers named by what they are for, whatever ran before."""
    return torch.Generator(device).manual_seed(int(digest(names), 16))


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
        figures.write(path, hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())


def load(path: Path) -> dict | None:
    """What `save` wrote, on every rank; None if it is not there or not whole."""
    box = [path.read_bytes() if RANK == 0 and path.exists() else b""]
    if RANKS > 1:
        dist.broadcast_object_list(box)
    if box[0] and hashlib.sha256(box[0][32:]).digest() == box[0][:32]:
        return torch.load(io.BytesIO(box[0][32:]), "cpu", weights_only=True)
    if box[0]:
        print(f"  corrupt, building it again: {path}", flush=True)


def cached(w: World, name: str, last: str, build: Callable[..., dict], *args: object) -> dict:
    """What `build(w, *args)` returns, kept in a file that is named by all it depends on: the seed
    and the settings up to `last`."""
    upto = list(w.s.items())[:list(w.s).index(last) + 1]
    path = w.out / f"{name}-{digest(w.seed, upto)}.pt"
    if found := load(path):
        print(f"  already there: {path.relative_to(w.out)}", flush=True)
        return found
    save(path, build(w, *args))
    return load(path)                           # what is read again is the same to the last bit


def average_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Before each step: the mean over ranks, each of which saw its share of the prompts."""
    for p in optimizer.param_groups[0]["params"]:
        dist.all_reduce(p.grad)
        p.grad /= RANKS

# --------------------------------------------------------------------------------------- the stages

def build_world(args: argparse.Namespace, s: dict, seed: int, device: torch.device,
                reviews: list | None, start: tuple | None) -> World:
    """Stages 1 to 3 for one seed: settings s, seed, device, out, encoding, reference, reward_fn,
    prompt (P, T0) and held (P', T0) to train and to evaluate on, train (reference samples to
    `prompt`: response (P, M, L), reward (P, M)) and held_rewards (P', M')."""
    reviews = list(reviews or builtin_reviews(s["reviews"], seed))
    random.Random(seed).shuffle(reviews)
    texts, labels = zip(*reviews)
    w = World(s=s, seed=seed, device=device, out=Path(args.out))

    print(f"1 text, tokenizer, reference model: {len(reviews)} reviews", flush=True)
    w.encoding = start[1] if start else train_tokenizer(texts[:2000], s["vocab"])
    tokens = encode(w.encoding, texts, s["prompt_tokens"] + s["length"]).to(device)
    apart = max(16, len(tokens) // 20)                       # reviews that nothing is trained on
    saved = cached(w, "cache/reference", "lm_lr", build_reference, tokens, apart,
                   start and start[0])
    w.reference = load_gpt(saved, device)
    print(f"  held-out text: {saved['nats']:.2f} nats per token, "
          f"perplexity {math.exp(saved['nats']):.1f}")

    print("2 reward: a sentiment classifier's logit", flush=True)
    saved = cached(w, "cache/reward", "epochs", build_reward, tokens, labels, apart)
    classifier = Classifier(w.encoding.n_vocab).to(device)
    classifier.load_state_dict(saved["weights"])
    w.reward_fn = classifier.reward                        # or any function of the same signature
    print(f"  held-out accuracy: {saved['accuracy']:.3f}")

    print("3 reference samples, for the CDF of the reward", flush=True)
    starts = dict.fromkeys(map(tuple, tokens[:, :s["prompt_tokens"]].tolist()))
    starts = [x for x in starts if w.encoding.eot_token not in x]        # no sequence twice
    held = min(s["held_prompts"], len(starts) // 4)
    if held < 2:
        usage_error(f"only {len(starts)} different beginnings of reviews; want at least 8")
    starts = torch.tensor(starts[:held + s["prompts"]], device=device)
    w.held, w.prompt = starts[:held], starts[held:]
    w.train = cached(w, "cache/training", "m", draw, w.reference, w.prompt, s["m"],
                     "training, part", "training")
    w.train["response"] = w.train["response"].long().to(device)
    w.held_rewards = held_out(w, 0)["reward"]
    return w


def build_reference(w: World, tokens: Tensor, apart: int, model: GPT | None) -> dict:
    """Stage 1: a new GPT, or GPT-2, trained on all reviews (R, T) but the first `apart`."""
    s = w.s
    model = copy.deepcopy(model) if model else GPT(
        w.encoding.n_vocab, tokens.shape[1], s["layers"], s["heads"], s["width"],
        generator=generator("cpu", w.seed, "init"))
    train_lm(model.to(w.device), tokens[apart:], s["lm_steps"], s["lm_batch"], s["lm_lr"],
             generator("cpu", w.seed, "lm"), track("step", range(s["lm_steps"])))
    with torch.no_grad():
        nats = [lm_loss(model, part).item() for part in tokens[:apart].split(64)]
    return dict(config=model.config, weights=model.state_dict(), nats=sum(nats) / len(nats))


def build_reward(w: World, tokens: Tensor, labels: tuple[int, ...], apart: int) -> dict:
    """Stage 2: the classifier, trained on all reviews (R, T) but the first `apart`."""
    labels = torch.tensor(labels, device=w.device)
    model = train_classifier(tokens[apart:], labels[apart:], w.encoding.n_vocab,
                             track("epoch", range(w.s["epochs"])),
                             generator("cpu", w.seed, "classifier"))
    with torch.no_grad():
        right = (model(tokens[:apart]) > 0) == (labels[:apart] > 0)
    return dict(weights=model.state_dict(), accuracy=right.float().mean().item())


def draw(w: World, model: GPT, prompt: Tensor, k: int, label: str, *name: object) -> dict:
    """k responses of a model to each prompt (P, T0), their log-probabilities and rewards (P, k); of
    a policy also ref_logprob and kl_ref. Ranks draw in turn, whatever their number the same."""
    start, chunks, mine = time.time(), prompt.split(max(1, 2048 // k)), {}
    for i in track(label, range(RANK, len(chunks), RANKS)):
        x = chunks[i]
        response, logprob = vbon.sample(model, x, k, w.s["length"],
                                        generator(w.device, w.seed, "draw", *name, i))
        part = dict(response=response.int(), logprob=logprob, reward=w.reward_fn(x, response))
        if model is not w.reference:
            with torch.no_grad():
                part |= dict(ref_logprob=vbon.response_logprob(w.reference, x, response),
                             kl_ref=vbon.response_kl(model, w.reference, x, response))
        mine[i] = {key: value.cpu() for key, value in part.items()}
    box = [mine] * RANKS
    if RANKS > 1:
        dist.all_gather_object(box, mine)
    parts = [box[i % RANKS][i] for i in range(len(chunks))]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]} | dict(
        seconds=time.time() - start)


def held_out(w: World, part: int) -> dict:
    """m_eval reference responses to each held-out prompt. Part 0 measures F; best-of-N chooses
    among the others."""
    return cached(w, f"cache/held-out-{part}", "m_eval", draw, w.reference, w.held,
                  w.s["m_eval"], "held-out, part", "held-out", part)


def fine_tuned(w: World, target: Target) -> dict:
    """Stage 4: the policy of a target, from its file or trained; kl-rl knows no N."""
    aim = target._replace(n=1) if target.method == "kl-rl" else target
    name = f"policies/{figures.label(aim)}-seed{w.seed}".replace(" ", "-")
    checkpoint = w.out / f"{name}-{digest(w.seed, w.s)}.checkpoint"
    saved = cached(w, name, "lr", build_policy, aim, checkpoint)
    checkpoint.unlink(missing_ok=True)
    return saved


def build_policy(w: World, target: Target, checkpoint: Path) -> dict:
    """The reference, fine-tuned towards a target. Goes on from the checkpoint, if any: every step
    has its own random numbers, so that the outcome is the same to the last bit."""
    s, began, watch = w.s, time.time(), {}
    steps = s["steps"] * (3 if target.n > 8 else 1)        # far from π_ref, what is poor is rare
    policy = copy.deepcopy(w.reference)
    trained = vbon.low_rank(policy, s["rank"], generator("cpu", w.seed, "low rank"))
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.99), fused=True)
    if RANKS > 1:
        optimizer.register_step_pre_hook(average_gradients)
    saved = load(checkpoint) or dict(step=0, seconds=0.0)
    seconds, due = saved["seconds"], began
    if saved["step"]:
        print(f"  {figures.label(target)}: on from step {saved['step']}", flush=True)
        optimizer.load_state_dict(saved["optimizer"])
        for p, x in zip(trained, saved["trained"]):
            p.data.copy_(x)
    for step in track(figures.label(target), range(saved["step"], steps), watch):
        late = max(0.0, 2 * step / steps - 1)                    # flat, then half a cosine
        optimizer.param_groups[0]["lr"] = s["lr"] * (1 + math.cos(math.pi * late)) / 2
        order = torch.randperm(len(w.prompt), generator=generator("cpu", w.seed, *target, step))
        rows = order[:min(s["batch"], len(order) // RANKS * RANKS)][RANK::RANKS]
        watch |= vbon.update(policy, w.reference, optimizer, w.reward_fn,
                             vbon.grow(target, step, steps), w.prompt[rows.to(w.device)],
                             w.train["response"][rows.to(w.device)], w.train["reward"][rows],
                             s["k"], generator(w.device, w.seed, *target, step, RANK))
        now = time.time()
        seconds = saved["seconds"] + now - began
        if RANK == 0 and now > due:                      # at most a twentieth of the time for it
            save(checkpoint, dict(step=step + 1, seconds=seconds, optimizer=optimizer.state_dict(),
                                  trained=[p.data for p in trained]))
            due = time.time() + 20 * (time.time() - now)
    weights = {name: attrgetter(name)(policy).detach() for name in w.reference.state_dict()}
    return dict(config=policy.config, weights=weights, seconds=seconds)    # W + B A, merged


def evaluate(w: World, policies: dict[Target, dict], curves: dict) -> list[dict]:
    """Stage 5: a row for each target of one N, on held-out prompts."""
    rows, n, m = [], next(iter(policies)).n, w.s["m_eval"]
    parts = max(1, min(n // 8, 4), math.ceil(n / m))               # draws for 16 answers or more
    drawn = [held_out(w, 1 + part) for part in range(parts)]
    draws = [torch.cat([d[name] for d in drawn], 1)[:, :m * parts // n * n]
             for name in ("logprob", "reward")]
    for target, saved in policies.items():
        if saved is None:
            x, reward = decode(target, *draws, generator("cpu", w.seed, *target))
            own = dict(logprob=vbon.log_target(target, x, reward, w.held_rewards), ref_logprob=x,
                       reward=reward, seconds=sum(d["seconds"] for d in drawn))
        else:
            own = draw(w, load_gpt(saved, w.device), w.held, w.s["samples"], figures.label(target),
                       "evaluate", *target)
            own["seconds"] += saved["seconds"]
        row = target._asdict() | vbon.metrics(n, own["logprob"], own["ref_logprob"], own["reward"],
                                              w.held_rewards, own.get("kl_ref"))
        rows.append(row | figures.gaps(target, row, w.held_rewards, curves) | dict(
            samples_per_answer=figures.draws(target), seconds=own["seconds"]))
    return rows


def decode(target: Target, logprob: Tensor, reward: Tensor, g: torch.Generator) -> list[Tensor]:
    """(P, A·N) -> (P, A): each N draws give one answer, the first of them for "ref"."""
    draws = reward.reshape(-1, target.n)[:, :figures.draws(target)]
    pick = vbon.best_of_n(draws, g, target.beta)[:, None]                                 # (P·A, 1)
    return [x.reshape(-1, target.n).gather(1, pick).view(len(x), -1) for x in (logprob, reward)]


def main(argv: list[str] | None = None) -> None:
    """The five stages for each seed, straight down, then what was found."""
    args, began = parse(argv), time.time()
    out, (device, reviews, start) = Path(args.out), prepare(args)
    s = settings(args, device, reviews, start)
    methods = [m for m in figures.NAMES if m in {"ref", "bon", *args.method}
               or m == "soft-bon" and "kl-rl" in args.method]
    rows, text, pool = [], "", []
    for seed in dict.fromkeys(args.seed):
        w = build_world(args, s, seed, device, reviews, start)
        print("4 fine-tuning: policies that do the work of best-of-N", flush=True)
        policies = {n: {target: None if target.method in figures.DECODED else fine_tuned(w, target)
                        for target in figures.targets(methods, n, args.beta, w.train["reward"])}
                    for n in dict.fromkeys(args.n)}
        if args.sample is not None:
            prompt = torch.tensor([w.encoding.encode_ordinary(args.sample)] * 3, device=device)
            if prompt.shape[1] >= (limit := w.reference.config["block_size"]):
                usage_error(f"--sample: want fewer than {limit} tokens")
            for n in policies:
                print("\n" + figures.answers(w, policies[n], prompt), end="")
            continue
        print("5 evaluation on held-out prompts", flush=True)
        curves = figures.theory(w.held_rewards)
        new = [row | dict(seed=seed, beta_found=args.beta is None and row["beta"] is not None)
               for n in policies for row in evaluate(w, policies[n], curves)]
        text += "\n".join(f"N = {n}, seed {seed}\n\n" + figures.answers(w, policies[n], w.held[:8])
                          for n in policies)
        rows, pool = rows + new, pool + [w.held_rewards]
        if RANK == 0:
            figures.add_results(out / "results.jsonl", new, s)
            figures.write(out / "samples.txt", text.encode())
    if rows and RANK == 0:
        figures.report(out, rows, s, torch.cat(pool))
        print(f"{time.time() - began:.0f} s in all; "
              f"see {out}/: pareto.png, samples.txt, results.jsonl")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; finished stages are kept", file=sys.stderr)
        sys.exit(130)
