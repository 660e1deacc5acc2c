"""train.py: from text to a policy whose one sample does the work of best-of-N, in five stages.

    python train.py --n 4                             the main job: a minute on two cores
    python train.py --n 2 4 8 --seed 0 1 2            several N, several repetitions
    python train.py --n 4 --method vbon kl-rl         or bound, bon-sft, bond, soft-bon: see README
    python train.py --n 4 --data DIR --init gpt2      your own labelled reviews, OpenAI's weights
    python train.py --n 4 --sample "i watched this"   your own words, answered three ways
    torchrun --nproc_per_node 2 -- train.py --n 4     on several GPUs, or machines

All it finds goes to --out; the same command, or another N, goes on from there, after a crash too.
"""
import argparse
import copy
import hashlib
import io
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace as World

import torch
import torch.distributed as dist
from torch import Tensor

import vbon
from assets import figures
from model import GPT, lm_loss, load_gpt, train_lm
from reward import (builtin_reviews, encode, load_reviews, pretrained_encoding, train_classifier,
                    train_tokenizer)
from vbon import Target

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# -------------------------------------------------------------------- the command and its settings

def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with defaults in brackets; a wrong one ends with status 2 and one line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage_error
    add = parser.add_argument_group("the method").add_argument
    add("--n", type=int, nargs="+", default=[4], help="of best-of-N: more reward, further away (4)")
    add("--method", nargs="+", default=["vbon"], choices=figures.NAMES, metavar="M", help="(vbon)")
    add("--beta", type=float, nargs="+", help="of kl-rl, soft-bon (as far away as best-of-N)")
    add("--steps", type=int, help="updates: more land closer to best-of-N (tripled for N > 8)")
    add("--m", type=int, help="reference samples to a training prompt: more make a better F")
    add = parser.add_argument_group("the text, the model, the run").add_argument
    add("--data", help="a folder with pos.txt and neg.txt, or pos/*.txt and neg/*.txt (built-in)")
    add("--init", help="gpt2, gpt2-medium, -large, -xl, or a Hugging Face folder (a new model)")
    add("--seed", type=int, nargs="+", default=[0], help="each is a repetition of everything (0)")
    add("--sample", metavar="TEXT", help="print answers to TEXT; trains only what is missing")
    add("--out", default="out", metavar="DIR", help="folder of results and cache (out)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    add("--quick", action="store_true", help="all tiny: a smoke test of seconds")
    return parser.parse_args(argv)


def usage_error(message: object) -> None:
    """Wrong usage or unusable input: one line, status 2."""
    print("train.py: error:", f"{message}".partition("\n")[0], file=sys.stderr)
    raise SystemExit(2)


def prepare(argv: list[str] | None) -> World:
    """What all seeds share: args, out, device, reviews (--data), model and encoding (--init), and
    s, the settings. Most of what can be wrong with a command shows here, before any work."""
    args = parse(argv)
    w = World(args=args, out=Path(args.out), model=None, encoding=None)
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        name += f":{os.environ['LOCAL_RANK']}" if name == "cuda" and RANKS > 1 else ""
        w.device = torch.zeros(1, device=name).device
        w.reviews = load_reviews(args.data) if args.data else None
        if args.init:
            w.model, w.encoding = GPT.from_pretrained(args.init), pretrained_encoding(args.init)
            if (size := w.model.config["vocab_size"]) != w.encoding.n_vocab:
                raise ValueError(f"{args.init}: {size} tokens, {w.encoding.n_vocab} in vocab.json")
        w.s = settings(w)
        numbers = [x for x in (*args.n, *(args.beta or []), args.steps, args.m) if x is not None]
        most = w.s["m_eval" if args.beta or not {*args.method} & {*figures.TILTED} else "m"]
        if (max(args.n) > most or not all(1e-9 < x < 1e9 for x in numbers)
                or args.sample is not None and not args.sample.split()):
            raise ValueError(f"want 1 <= n <= {most}; beta, steps, m above 0; words to sample")
        figures.add_results(w.out / "results.jsonl", [], w.s)          # can be read and written
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        usage_error(error)
    if RANKS > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if w.device.type == "cuda" else "gloo")
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    return w


def settings(w: World) -> dict:
    """All that a result depends on besides N, method and seed, in the order of the stages: a stage
    is done again when something up to its last setting has changed."""
    code = [Path(__file__).with_name(f"{x}.py").read_text() for x in ("vbon", "model", "reward")]
    s = dict(code=digest(code + [Path(__file__).read_text()]), device=w.device.type, ranks=RANKS,
             init=w.model and digest((w.model.config, w.encoding.token_byte_values(),
                                      [x.sum().item() for x in w.model.parameters()])),
             data=w.reviews and digest(w.reviews), reviews=len(w.reviews or range(12000)),
             vocab=768, width=64, layers=2, heads=2, prompt_tokens=4, length=24,
             lm_steps=1000, lm_batch=64, lm_lr=6e-3, epochs=4,        # 1 reference model, 2 reward
             held_prompts=64, m_eval=512, prompts=512, m=64,          # 3 reference samples
             steps=90, batch=64, k=8, rank=4, lr=5e-3, samples=64)    # 4 fine-tuning, 5 evaluation
    if w.reviews:                            # real text has more entropy: more of everything
        s |= dict(vocab=min(2048, max(512, s["reviews"] // 4)), lm_lr=3e-3,
                  lm_steps=min(2000, s["reviews"] // 3), epochs=6, m=128, steps=600, lr=3e-3)
    if w.model:                              # GPT-2 knows English already
        s |= dict(lm_steps=min(150, s["reviews"] // 50), lm_lr=5e-5, held_prompts=32, prompts=256,
                  m=64, steps=250, length=min(24, w.model.config["block_size"] - 4))
    if w.args.quick:
        s |= dict(vocab=400, width=32, reviews=600, lm_steps=10, epochs=1, held_prompts=8,
                  m_eval=64, prompts=8, m=16, steps=3, batch=4, k=4, samples=8)
    s["batch"] += -s["batch"] % RANKS                            # the same number for every process
    return s | {name: value for name in ("steps", "m") if (value := getattr(w.args, name))}

# --------------------------------------------------- progress, randomness, the cache, several ranks

def track(label: str, steps: range, watch: dict | None = None) -> Iterator[int]:
    """The steps. Prints what stands in `watch`, and seconds so far and expected."""
    start, live, total = time.time(), sys.stdout.isatty(), steps.stop
    for done, i in enumerate(steps, 1):
        yield i
        spent, last = time.time() - start, done == len(steps)
        seen = "".join(f" {name} {value:.2f}" for name, value in (watch or {}).items())
        line = f"  {label} {i + 1}/{total}{seen}  {spent:.0f} of {spent / done * len(steps):.0f} s"
        if live or last or (i + 1) * 4 // total > i * 4 // total:
            print(f"{line:79.79}" if live else line, end="\r" if live > last else "\n", flush=True)


def generator(device: torch.device | str, *names: object) -> torch.Generator:
    """Random numbers named by what they are for, whatever ran before."""
    return torch.Generator(device).manual_seed(int(digest(names), 16))


def digest(x: object) -> str:
    """A short name for what prints the same twice."""
    return hashlib.sha256(f"{torch.__version__}{x!r}".encode()).hexdigest()[:12]


def save(path: Path, content: dict) -> None:
    """Write tensors and numbers, from rank 0, behind their checksum."""
    if RANK == 0:
        torch.save(content, buffer := io.BytesIO())
        figures.write(path, hashlib.sha256(buffer.getbuffer()).digest() + buffer.getvalue())


def load(path: Path) -> dict | None:
    """What `save` wrote, on every rank; None if it is not there or not whole."""
    box = [path.read_bytes() if RANK == 0 and path.exists() else b""]
    if RANKS > 1:
        dist.broadcast_object_list(box)
    if hashlib.sha256(box[0][32:]).digest() == box[0][:32]:
        return torch.load(io.BytesIO(box[0][32:]), "cpu", weights_only=True)
    if box[0]:
        print(f"  corrupt, building it again: {path}", flush=True)


def cached(w: World, name: str, last: str, build: Callable[..., dict], *args: object) -> dict:
    """What `build(w, *args)` returns, kept in a file that is named by all it depends on: the seed
    and the settings up to `last`. Meanwhile, w.checkpoint is there to go on from."""
    upto = [*w.s.items()][:[*w.s].index(last) + 1]
    path = w.out / f"{name}-seed{w.seed}-{digest(upto)}.pt".replace(" ", "-")
    w.checkpoint = path.with_suffix(".checkpoint")
    if found := load(path):
        print(f"  already there: {path.relative_to(w.out)}", flush=True)
    else:
        save(path, build(w, *args))
        found = load(path)                      # what is read again is the same to the last bit
    w.checkpoint.unlink(missing_ok=True)
    return found


def average_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Before each step: the mean over ranks, each of which saw its share of the prompts."""
    for p in optimizer.param_groups[0]["params"]:
        dist.all_reduce(p.grad, dist.ReduceOp.AVG)

# --------------------------------------------------------------------------------------- the stages

def build_world(shared: World, seed: int) -> World:
    """Stages 1 to 3 for one seed. To what `prepare` found come: seed, reference, reward_fn, prompt
    (P, T0) and held (P', T0) to train and to evaluate on, train (reference samples to `prompt`:
    response (P, M, L), reward (P, M)), draws (others, to `held`), held_rewards (P', M')."""
    w = World(**vars(shared), seed=seed)
    reviews = list(w.reviews or builtin_reviews(w.s["reviews"], seed))
    random.Random(seed).shuffle(reviews)
    texts, labels = zip(*reviews)
    labels = torch.tensor(labels, device=w.device)

    print(f"1 text, tokenizer, reference model: {len(reviews)} reviews", flush=True)
    w.encoding = w.encoding or train_tokenizer(texts[:2000], w.s["vocab"])
    tokens = encode(w.encoding, texts, w.s["prompt_tokens"] + w.s["length"]).to(w.device)
    apart = max(16, len(tokens) // 20)                       # reviews that no model is trained on
    saved = cached(w, "cache/reference", "lm_lr", build_reference, tokens, apart)
    w.reference = load_gpt(saved, w.device)
    print(f"  held-out perplexity: {math.exp(saved['nats']):.1f} a token")

    print("2 reward: a sentiment classifier's logit", flush=True)
    classifier = train_classifier(
        tokens[apart:], labels[apart:], w.encoding.n_vocab, track("epoch", range(w.s["epochs"])),
        generator("cpu", seed, "classifier"))
    w.reward_fn = classifier.reward                        # or any function of the same signature
    right = (classifier(tokens[:apart]) > 0) == (labels[:apart] > 0)
    print(f"  held-out accuracy: {right.float().mean().item():.3f}")

    print("3 reference samples, for the CDF of the reward", flush=True)
    starts = dict.fromkeys(map(tuple, tokens[:, :w.s["prompt_tokens"]].tolist()))
    starts = [x for x in starts if w.encoding.eot_token not in x]        # no sequence twice
    if (held := min(w.s["held_prompts"], len(starts) // 4)) < 2:
        usage_error(f"only {len(starts)} different beginnings of reviews; want at least 8")
    starts = torch.tensor(starts[:held + w.s["prompts"]], device=w.device)
    w.held, w.prompt = starts[:held], starts[held:]
    w.train = cached(w, "cache/training", "m", draw, w.reference, w.prompt, w.s["m"], "training")
    first, w.draws = (cached(w, f"cache/held-out-{part}", "m_eval", draw, w.reference, w.held,
                             w.s["m_eval"], "held-out", part) for part in (0, 1))
    w.held_rewards = first["reward"]
    return w


def build_reference(w: World, tokens: Tensor, apart: int) -> dict:
    """Stage 1: a new GPT, or GPT-2, trained on all reviews (R, T) but the first `apart`."""
    s, g = w.s, generator("cpu", w.seed, "init")
    shape = w.encoding.n_vocab, tokens.shape[1], s["layers"], s["heads"], s["width"]
    model = copy.deepcopy(w.model) if w.model else GPT(*shape, generator=g)
    train_lm(model.to(w.device), tokens[apart:], s["lm_steps"], s["lm_batch"], s["lm_lr"],
             generator("cpu", w.seed, "lm"), track("step", range(s["lm_steps"])))
    with torch.no_grad():
        nats = [lm_loss(model, part).item() for part in tokens[:apart].split(64)]
    return dict(config=model.config, weights=model.state_dict(), nats=sum(nats) / len(nats))


def draw(w: World, model: GPT, prompt: Tensor, k: int, *name: object) -> dict:
    """k responses of a model to each prompt (P, T0), their log-probabilities and rewards (P, k); of
    a policy also ref_logprob and kl_ref. Whatever rank draws part i, its random numbers are i's."""
    start, chunks, mine = time.time(), prompt.split(max(1, 2048 // k)), {}
    for i in track(f"{' '.join(map(str, name[:3]))}, part", range(RANK, len(chunks), RANKS)):
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


def build_policy(w: World, target: Target) -> dict:
    """Stage 4: the reference, fine-tuned towards a target; flat learning rate, then half a cosine.
    Each step has its own random numbers: on from a checkpoint, it ends the same to the last bit."""
    s, began, watch = w.s, time.time(), {}
    target = target._replace(n=1) if target.method == "kl-rl" else target            # one for all N
    steps = s["steps"] * (3 if target.n > 8 else 1)        # far from π_ref, what is poor is rare
    policy = copy.deepcopy(w.reference)
    trained = vbon.low_rank(policy, s["rank"], generator("cpu", w.seed, "low rank"))
    optimizer = torch.optim.Adam(trained, betas=(0.9, 0.99), fused=True)
    if RANKS > 1:
        optimizer.register_step_pre_hook(average_gradients)
    if saved := load(w.checkpoint):
        print(f"  {figures.label(target)}: on from step {saved['step']}", flush=True)
        began -= saved["seconds"]
        optimizer.load_state_dict(saved["optimizer"])
        for p, x in zip(trained, saved["trained"]):
            p.data.copy_(x)
    for step in track(figures.label(target), range(saved["step"] if saved else 0, steps), watch):
        optimizer.param_groups[0]["lr"] = s["lr"] * math.sin(math.pi * max(0.5, step / steps)) ** 2
        order = torch.randperm(len(w.prompt), generator=generator("cpu", w.seed, *target, step))
        rows = order[:min(s["batch"], len(order) // RANKS * RANKS)][RANK::RANKS]
        watch |= vbon.update(policy, w.reference, optimizer, w.reward_fn,
                             vbon.grow(target, step, steps), w.prompt[rows.to(w.device)],
                             w.train["response"][rows].long().to(w.device), w.train["reward"][rows],
                             s["k"], generator(w.device, w.seed, *target, step, RANK))
        save(w.checkpoint, dict(step=step + 1, seconds=time.time() - began, trained=trained,
                                optimizer=optimizer.state_dict()))
    weights = {name: attrgetter(name)(policy).detach() for name in w.reference.state_dict()}
    return dict(config=policy.config, weights=weights, seconds=time.time() - began)     # with B A


def main(argv: list[str] | None = None) -> None:
    """The five stages for each seed, straight down, then what was found."""
    began, shared = time.time(), prepare(argv)
    args, out, rows, text, pool = shared.args, shared.out, [], "", []
    for seed in dict.fromkeys(args.seed):
        w = build_world(shared, seed)
        prompt = torch.tensor([w.encoding.encode_ordinary(args.sample or "")], device=w.device)
        if prompt.shape[1] >= (limit := w.reference.config["block_size"]):
            usage_error(f"--sample: want fewer than {limit} tokens, got {prompt.shape[1]}")
        print("4 fine-tuning: policies that do the work of best-of-N", flush=True)
        policies = {target: None if target.method in figures.DECODED else
                    cached(w, f"policies/{figures.label(target)}", "lr", build_policy, target)
                    for n in args.n
                    for target in figures.targets(args.method, n, args.beta, w.train["reward"])}
        if args.sample is not None:
            print(figures.answers(w, policies, prompt.repeat(3, 1)), end="")
            continue
        print("5 evaluation on held-out prompts", flush=True)
        w.curves = figures.theory(w.held_rewards)
        new = []
        for target, saved in policies.items():
            drawn = draw(w, load_gpt(saved, w.device), w.held, w.s["samples"],
                         "evaluate", *target) if saved else w.draws
            new.append(figures.result(w, target, drawn, saved, generator("cpu", seed, *target)))
        rows, pool = rows + new, pool + [w.held_rewards]
        text += figures.answers(w, policies, w.held[:8])
        if RANK == 0:
            figures.add_results(out / "results.jsonl", new, w.s)
            figures.write(out / "samples.txt", text.lstrip().encode())
    if rows and RANK == 0:
        figures.report(out, rows, shared.s, torch.cat(pool))
        print(f"{time.time() - began:.0f} s; see pareto.png, samples.txt, results.jsonl in {out}/")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; finished stages are kept", file=sys.stderr)
        sys.exit(130)
