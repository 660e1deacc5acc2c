"""train.py: from text to a policy whose one sample does the work of best-of-N.

    python train.py --n 4                              the main job: about a minute on two cores
    python train.py --n 4 --sample "i watched this"    your own words, answered three ways
    python train.py --n 4 --data DIR --init gpt2       your own reviews, OpenAI's weights

Five stages, in the order of `main`: text, reward, reference samples, fine-tuning, evaluation.
What they find goes to --out. A run that was stopped goes on when the same command is given again.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import math
import os
import random
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
import torch.distributed
from torch import Tensor

import vbon
from model import (PRETRAINED, GPT, UnusableInput, add_adapters, lm_loss, merge_adapters, read_json,
                   token_kl)
from reward import (RewardFile, builtin_reviews, decode, encode, load_reviews, load_reward,
                    pretrained_encoding, reward_of_texts, save_tokenizer, train_classifier,
                    train_tokenizer, try_reward)

# ------------------------------------------------------------------------------------- the settings

@dataclass(frozen=True)
class Settings:
    """The sizes of everything. These defaults belong to the built-in text."""
    # text: reviews, their tokens, the reference model
    reviews: int = 12_000           # reviews to learn from
    vocab: int = 768                # tokens in the vocabulary
    prompt_tokens: int = 4          # a prompt is the first tokens of a review
    length: int = 24                # a response has at most so many tokens
    layers: int = 2
    heads: int = 2
    width: int = 64
    lm_steps: int = 1000            # updates of the reference model
    lm_batch: int = 64              # reviews in one of them
    lm_lr: float = 6e-3
    # reward
    epochs: int = 4                 # times that the classifier sees each review
    # reference samples
    prompts: int = 512              # prompts to train on
    m: int = 64                     # M, reference samples to each of them
    held_prompts: int = 64          # other prompts, to evaluate on
    m_eval: int = 512               # M in the evaluation: large, so that F has a small error
    # fine-tuning
    steps: int = 90                 # updates of the policy
    batch: int = 64                 # prompts in one of them
    k: int = 8                      # K, responses to each of these prompts
    rank: int = 4                   # of the adapters
    lr: float = 5e-3
    # evaluation
    k_eval: int = 64                # K in the evaluation


def choose_settings(args: argparse.Namespace, n: int, data: list | None, given: "Given | None"
                    ) -> Settings:
    """The settings for this kind of text and model, and what the command line says."""
    s = Settings(prompt_tokens=args.prompt_tokens or 4, length=args.length or 24)
    if data is not None:
        # real text has more different words and sentences than the built-in one: more of everything
        s = dataclasses.replace(
            s,
            reviews=len(data),
            vocab=min(2048, max(512, len(data) // 4)),
            lm_steps=min(2000, len(data) // 3),         # some twenty times through the reviews
            lm_lr=3e-3,
            epochs=6,
            m=128,
            steps=600,
            lr=3e-3,
        )
    if given is not None:
        # GPT-2 knows English already, and one update of it takes minutes on two cores
        size = given.model.config
        s = dataclasses.replace(
            s,
            vocab=size["vocab_size"],
            layers=size["n_layer"],
            heads=size["n_head"],
            width=size["n_embd"],
            lm_steps=min(150, s.reviews // 50),         # about once through the reviews
            lm_lr=5e-5,
            prompts=256,
            m=64,
            held_prompts=32,
            steps=250,
            length=min(s.length, size["block_size"] - s.prompt_tokens),
        )
    if args.quick:
        s = dataclasses.replace(
            s, lm_steps=10, epochs=1, prompts=8, m=16, held_prompts=8, m_eval=64, steps=3, batch=4,
            k=4, k_eval=8)
        if given is None:
            s = dataclasses.replace(s, vocab=400, width=32)
        if data is None:
            s = dataclasses.replace(s, reviews=600)
    if n > 8:
        # For a large N, poor responses must become very improbable. The policy samples them ever
        # more seldom, so it learns this slowly.
        s = dataclasses.replace(s, steps=3 * s.steps)
    # last, what the command line says
    given_flags = {}
    for name in ("lm_steps", "steps", "m"):
        if getattr(args, name) is not None:
            given_flags[name] = getattr(args, name)
    return dataclasses.replace(s, **given_flags)


# --------------------------------------------------------------------------------------- the stages

def main(argv: list[str] | None = None) -> None:
    """One N, one seed: from text to a policy; then a table, a picture and samples of it."""
    began = time.time()
    args = parse_arguments(argv)
    n = args.n
    seed = args.seed
    out = Path(args.out)
    policy_folder = out / f"policy-n{n}-seed{seed}"
    reference_folder = out / f"reference-seed{seed}"
    inputs = read_inputs(args, [n], [policy_folder, reference_folder])
    device, judge, data, given = inputs                 # the last three: --reward, --data, --init
    settings = choose_settings(args, n, data, given)
    check_settings(settings, args, n)
    say = print if args.sample is None else silent      # --sample shows answers, and little else

    # ---- text: reviews, their tokens, and a language model of them, the reference π_ref
    text = make_text(data, given, settings, seed)
    question = encode_question(args.sample, text, settings, given)
    if judge is not None:
        try_reward(judge, text.encoding, text.tokens, settings.prompt_tokens)
    reference, perplexity = get_reference(out, text, given, settings, seed, device)
    say(f"text: {len(text.tokens)} {'built-in ' if data is None else ''}reviews; the reference "
        f"model has a perplexity of {perplexity:.1f}")

    # ---- reward: the logit of a sentiment classifier, or your own function
    reward, accuracy = get_reward(text, settings, seed, device, judge)
    if judge is None:
        say(f"reward: the classifier is right on {accuracy:.0%} of the reviews it has not seen")
    else:
        say(f"reward: {judge.path} will judge up to {count_rewards(text, settings, n)} responses")

    # ---- reference samples: F, the CDF of the reward, is estimated from their rewards
    samples, held, draws = get_samples(out, reference, reward, text, settings, seed)
    say(f"reference samples: {samples.reward.numel()} to train with, for "
        f"{len(text.prompts)} prompts; {held.reward.numel()} to\n  evaluate with, and "
        f"{draws.reward.numel()} for best of {n}, for {len(text.held_prompts)} other prompts")
    if share_of_ties(held.reward) == 1:
        say(NOTHING_TO_LEARN)

    # ---- fine-tuning: make one sample of the policy look like the best of n
    policy, history, seconds = get_policy(out, reference, reward, text.prompts, samples, n,
                                          settings, seed)
    models = [("reference", reference, 1), (f"best of {n}", reference, n), ("vBoN", policy, 1)]
    if question is not None:
        question = question.to(device)
        print(answers(text.encoding, question, reward.fn, models, settings, seed), end="")
        return

    # ---- evaluation: on prompts that vBoN was not trained on, with fresh reference samples
    held_prompts = text.held_prompts.to(device)
    policy_row, rewards = evaluate("vbon", policy, reference, reward.fn, held_prompts, held,
                                   n, settings, seed)
    policy_row["seconds"] += seconds
    rows = [reference_row(draws, held, n), best_of_n_row(draws, held, n, seed), policy_row]
    print_table(rows, held.reward)

    # ---- what stays: results, a picture, answers, the models
    made_by = describe(settings, text, inputs)
    # (some of the methods in experiments/ have a β)
    lines = [row | {"seed": seed, "beta": None} | made_by for row in rows]
    add_results(out, lines)
    draw_picture(out / "vbon.png", rows, draws, held, rewards, history, seed)
    report = answers(text.encoding, held_prompts[:8], reward.fn, models, settings, seed)
    write_whole(out / "samples.txt", report.encode("utf-8"))
    leave_model(reference_folder, reference, text.encoding, lines[0])
    leave_model(policy_folder, policy, text.encoding, lines[-1])
    print(f"\n{time.time() - began:.0f} s; {out}/ holds the picture vbon.png, answers in "
          f"samples.txt,\nthe policy in {policy_folder.name}, the reference in "
          f"{reference_folder.name}")


class Text(NamedTuple):
    """What the stage `text` makes."""
    encoding: tiktoken.Encoding
    tokens: Tensor                  # (R, T) reviews, cut or padded with end-of-text
    labels: Tensor                  # (R,) 1 positive, 0 negative
    n_unseen: int                   # the first n_unseen reviews are kept out of training
    prompts: Tensor                 # (P, T0) to train on
    held_prompts: Tensor            # (P', T0) to evaluate on; vBoN is not trained on any of them


class Reward(NamedTuple):
    """What the stage `reward` makes."""
    fn: Callable[[Tensor, Tensor], Tensor]      # prompt (P, T0), response (P, K, L) -> (P, K)
    depends_on: list                # goes into the file names of later stages


class Samples(NamedTuple):
    """Responses of the reference model to P prompts, M to each."""
    response: Tensor                # (P, M, L)
    logprob: Tensor                 # (P, M)
    reward: Tensor                  # (P, M)
    seconds: float


def make_text(data: list | None, given: "Given | None", settings: Settings, seed: int) -> Text:
    """Stage text: reviews, a tokenizer, and the prompts, which are beginnings of reviews."""
    reviews = list(data or builtin_reviews(settings.reviews, seed))
    random.Random(seed).shuffle(reviews)
    texts = [text for text, _ in reviews]
    labels = torch.tensor([label for _, label in reviews])
    if given is not None:
        encoding = given.encoding
    else:
        encoding = train_tokenizer(texts[:2000], settings.vocab)
    tokens = encode(encoding, texts, settings.prompt_tokens + settings.length)

    # beginnings of reviews, each once, in the order of the reviews
    beginnings = tokens[:, :settings.prompt_tokens].tolist()
    different = dict.fromkeys(tuple(ids) for ids in beginnings if encoding.eot_token not in ids)
    starts = torch.tensor(list(different))
    held = min(settings.held_prompts, len(starts) // 4)
    if held < 2:
        raise UnusableInput(f"want at least 8 different beginnings of {settings.prompt_tokens} "
                            f"tokens, got {len(starts)}; a shorter text has none")
    last = held + settings.prompts
    n_unseen = max(16, len(reviews) // 20)
    return Text(encoding, tokens, labels, n_unseen, starts[held:last], starts[:held])


def get_reference(out: Path, text: Text, given: "Given | None", settings: Settings, seed: int,
                  device: torch.device) -> tuple[GPT, float]:
    """The reference model, and its perplexity on reviews that it has not seen."""
    shape = dict(vocab_size=text.encoding.n_vocab, block_size=text.tokens.shape[1],
                 n_layer=settings.layers, n_head=settings.heads, n_embd=settings.width)
    start = given and weights(given.model)
    code = [source("model.py"), inspect.getsource(train_reference)]
    path = stage_path(out, f"reference-model-seed{seed}", code, text.tokens, text.n_unseen, shape,
                      start, settings.lm_steps, settings.lm_batch, settings.lm_lr, device.type,
                      seed)
    # calls train_reference(text, ...), unless the file is there
    saved = stored(path, train_reference, text, given, shape, settings, seed, device)
    return load_model(saved, device), math.exp(saved["nats"])


def train_reference(text: Text, given: "Given | None", shape: dict, settings: Settings, seed: int,
                    device: torch.device) -> dict:
    """Maximum likelihood on the reviews, from random weights or from GPT-2's."""
    if given is not None:
        model = copy.deepcopy(given.model)
    else:
        model = GPT(**shape, generator=random_numbers("cpu", "weights", seed))
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lm_lr, betas=(0.9, 0.95),
                                  weight_decay=0.01, fused=True)
    seen = text.tokens[text.n_unseen:]
    order = random_numbers("cpu", "reviews", seed)
    began = time.time()
    for step in range(settings.lm_steps):
        # the learning rate rises for 20 steps, then falls along a cosine
        warmup = (step + 1) / 20
        cosine = 0.5 * (1 + math.cos(math.pi * step / settings.lm_steps))
        optimizer.param_groups[0]["lr"] = settings.lm_lr * min(warmup, cosine)
        rows = torch.randint(len(seen), (settings.lm_batch,), generator=order)
        loss = lm_loss(model, seen[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        show_progress("reference model", step + 1, settings.lm_steps, began)
    with torch.no_grad():
        parts = text.tokens[:text.n_unseen].split(64)
        nats = [lm_loss(model, part.to(device)).item() for part in parts]
    # The policy will be a copy of this model. Input embedding and output head have been one matrix;
    # the policy's head must be able to change without changing how the model reads tokens.
    model.untie_head()
    return {"config": model.config, "weights": model.state_dict(), "nats": sum(nats) / len(nats)}


def get_reward(text: Text, settings: Settings, seed: int, device: torch.device,
               judge: RewardFile | None = None) -> tuple[Reward, float]:
    """Stage reward: a classifier's logit, and how often it is right on reviews it has not seen.

    It is trained anew at each start, on the CPU: that takes a second, and always ends the same.
    With --reward there is no classifier: its function judges, and the accuracy is nan.
    """
    if judge is not None:
        function = functools.partial(reward_of_texts, judge, text.encoding)
        return Reward(function, [judge.content, source("reward.py")]), math.nan
    classifier = train_classifier(
        text.tokens[text.n_unseen:], text.labels[text.n_unseen:], text.encoding.n_vocab,
        settings.epochs, random_numbers("cpu", "classifier", seed))
    says_positive = classifier(text.tokens[:text.n_unseen]) > 0
    is_right = says_positive == (text.labels[:text.n_unseen] == 1)
    depends_on = [weights(classifier), source("reward.py")]
    return Reward(classifier.to(device).reward, depends_on), is_right.float().mean().item()


def get_samples(out: Path, reference: GPT, reward: Reward, text: Text, settings: Settings, seed: int
                ) -> list[Samples]:
    """Stage reference samples: for training, for F in the evaluation, and for best-of-N there.

    The last two have the same prompts, but are drawn apart. If best-of-N chose among the draws that
    F is estimated from, the winner would be ranked against itself and those it has beaten.
    """
    device = reference.wte.weight.device
    code = [source("model.py"), inspect.getsource(draw_samples)]
    model = digest(weights(reference))                  # once: GPT-2 has half a gigabyte of them
    found = []
    for name, prompts, m in (("training", text.prompts, settings.m),
                             ("held-out", text.held_prompts, settings.m_eval),
                             ("draws", text.held_prompts, settings.m_eval)):
        path = stage_path(out, f"samples-{name}-seed{seed}", code, model, reward.depends_on,
                          prompts, m, settings.length, device.type, name, seed)
        saved = stored(path, draw_samples, reference, reward.fn, prompts.to(device), m,
                       settings.length, name, seed)
        found.append(Samples(**saved))
    return found


def draw_samples(model: GPT, reward_fn, prompts: Tensor, k: int, length: int, name: str, seed: int
                 ) -> dict:
    """k responses of a model to each prompt (P, T), with their log-probabilities and rewards.

    About a thousand responses at a time. Each part has its own random numbers, so that it does
    not matter which process draws it.
    """
    began = time.time()
    parts = prompts.split(max(1, 1024 // k))
    mine = {}
    for i in range(my_rank(), len(parts), world_size()):
        generator = random_numbers(prompts.device, "draw", name, seed, i)
        response, logprob = model.sample(parts[i], k, length, generator)
        reward = reward_fn(parts[i], response)
        mine[i] = (response.cpu(), logprob.cpu(), reward.cpu())
        show_progress(f"samples ({name})", i + 1, len(parts), began)
    done = from_all_processes(mine)
    columns = zip(*[done[i] for i in range(len(parts))])
    response, logprob, reward = [torch.cat(column) for column in columns]
    return {"response": response, "logprob": logprob, "reward": reward,
            "seconds": time.time() - began}


def get_policy(out: Path, reference: GPT, reward: Reward, prompts: Tensor, samples: Samples, n: int,
               settings: Settings, seed: int) -> tuple[GPT, list[dict], float]:
    """Stage fine-tuning: the policy, what was watched while it learned, and seconds."""
    device = reference.wte.weight.device
    path = stage_path(out, f"policy-vbon-n{n}-seed{seed}", *policy_depends_on(
        reference, reward, prompts, samples, settings), "vbon", n, seed)
    checkpoint = path.with_suffix(".checkpoint")
    # calls fine_tune(checkpoint, ...), unless the file is there
    saved = stored(path, fine_tune, checkpoint, reference, reward.fn, prompts.to(device),
                   samples.reward, n, settings, seed)
    checkpoint.unlink(missing_ok=True)
    return load_model(saved, device), saved["history"], saved["seconds"]


def policy_depends_on(reference: GPT, reward: Reward, prompts: Tensor, samples: Samples,
                      settings: Settings) -> list:
    """All that a fine-tuned policy depends on besides method, N and seed."""
    code = [source(file) for file in ("vbon.py", "train.py", "model.py")]
    return [code, weights(reference), reward.depends_on, prompts, samples.response,
            samples.reward, settings.length, settings.steps, settings.batch, settings.k,
            settings.rank, settings.lr, reference.wte.weight.device.type, world_size()]


def fine_tune(checkpoint: Path, reference: GPT, reward_fn, prompts: Tensor, ref_rewards: Tensor,
              n: int, settings: Settings, seed: int) -> dict:
    """vBoN: the reference, fine-tuned towards best-of-n on prompts (P, T), ref_rewards (P, M)."""
    policy = copy.deepcopy(reference)
    trained = add_adapters(policy, settings.rank, random_numbers("cpu", "adapters", seed))
    optimizer = torch.optim.Adam(trained, lr=settings.lr, betas=(0.9, 0.99), fused=True)
    average_gradients(optimizer)                        # from now on, in each optimizer.step()
    first, history, before = resume(checkpoint, trained, optimizer)
    began = time.time() - before
    for step in range(first, settings.steps):
        optimizer.param_groups[0]["lr"] = settings.lr * decay(step, settings.steps)
        # each step has its own random numbers: a run that goes on after a stop ends the same
        order = torch.randperm(len(prompts), generator=random_numbers("cpu", "batch", seed, step))
        rows = my_share(order[:settings.batch])            # of this process; usually all
        generator = random_numbers(prompts.device, "vbon", n, seed, step, my_rank())
        stats = vbon.update(
            policy, reference, optimizer, reward_fn, prompts[rows.to(prompts.device)],
            ref_rewards[rows], vbon.grow(n, step, settings.steps), settings.k, settings.length,
            generator, prompts_at_a_time(policy, settings))
        history.append(stats)
        save_checkpoint(checkpoint, step + 1, trained, optimizer, history, time.time() - began)
        show_progress(f"vBoN n={n}", step + 1, settings.steps, began, stats)
    merge_adapters(policy)
    return {"config": policy.config, "weights": policy.state_dict(), "history": history,
            "seconds": time.time() - began}


def decay(step: int, steps: int) -> float:
    """The learning rate, as a share of its start: 1 for half of the steps, then along a cosine."""
    progress = step / steps
    if progress <= 0.5:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (2 * progress - 1)))


def prompts_at_a_time(model: GPT, settings: Settings) -> int:
    """So many that the logits of their responses are at most 2^25 numbers, an eighth of a GB."""
    logits = settings.k * settings.length * model.config["vocab_size"]
    return max(1, 2 ** 25 // logits)

# ----------------------------------------------------------------------------------- the evaluation

def metrics(logprob: Tensor, ref_logprob: Tensor, reward: Tensor, ref_rewards: Tensor, n: int,
            kl_ref: Tensor | None = None) -> dict[str, float]:
    """Means and standard errors of all metrics, from responses of a policy; tensors are (P, K).

    `logprob` is the policy's own. kl_ref is log π_θ - log π_ref; for a trained policy, pass
    `token_kl`, which has the same mean and less noise.
    """
    if kl_ref is None:
        kl_ref = logprob - ref_logprob
    log_bon = vbon.bon_target(ref_logprob, reward, ref_rewards, n)
    columns = {
        "reward": reward,
        "win_rate": vbon.win_rate(reward, ref_rewards),
        "kl_ref": kl_ref,
        "kl_bon": logprob.double() - log_bon,
    }
    row = {}
    for name, x in columns.items():
        row[name], row[name + "_se"] = mean_and_error(x)
    row["positive"] = (reward > 0).double().mean().item()
    return row


def mean_and_error(x: Tensor) -> tuple[float, float]:  # (P, K) -> mean, standard error
    """Return the mean of a metric, and its standard error over prompts.

    Responses to one prompt are correlated. So a prompt counts as one observation: its mean.
    """
    per_prompt = x.double().mean(1)
    error = per_prompt.std() / math.sqrt(len(per_prompt))
    return per_prompt.mean().item(), error.item()


def reference_row(draws: Samples, held: Samples, n: int) -> dict:
    """The reference model itself, from all its draws."""
    row = metrics(draws.logprob, draws.logprob, draws.reward, held.reward, n)
    return {"method": "ref", "n": n} | row | {"samples_per_answer": 1, "seconds": draws.seconds}


def best_of_n_row(draws: Samples, held: Samples, n: int, seed: int) -> dict:
    """Best-of-N, really drawn: each n draws of the reference give one answer."""
    ref_logprob, reward = choose_best(draws, n, seed)
    # Its log-probability is known by the formula. So its KL to best-of-n is 0 by definition.
    log_bon = vbon.bon_target(ref_logprob, reward, held.reward, n)
    row = metrics(log_bon, ref_logprob, reward, held.reward, n)
    return {"method": "bon", "n": n} | row | {"samples_per_answer": n, "seconds": draws.seconds}


def choose_best(draws: Samples, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """The best of each n draws: its log-probability under the reference, and its reward (P, A)."""
    P, M = draws.reward.shape
    answers = M // n
    reward = draws.reward[:, :answers * n].reshape(-1, n)           # (P·A, n)
    logprob = draws.logprob[:, :answers * n].reshape(-1, n)
    best = vbon.best_of_n(reward, random_numbers("cpu", "best", n, seed))[:, None]
    return logprob.gather(1, best).view(P, answers), reward.gather(1, best).view(P, answers)


def evaluate(method: str, policy: GPT, reference: GPT, reward_fn, prompts: Tensor, held: Samples,
             n: int, settings: Settings, seed: int) -> tuple[dict, Tensor]:
    """The row of a trained policy, from its own responses to held-out prompts; their rewards."""
    began = time.time()
    drawn = draw_samples(policy, reward_fn, prompts, settings.k_eval, settings.length,
                         f"evaluation of {method}", seed)
    ref_logprob = []
    kl_ref = []
    with torch.no_grad():
        # one prompt at a time, since a large vocabulary makes large logits
        for prompt, response in zip(prompts.split(1), drawn["response"].split(1)):
            response = response.to(prompt.device)
            ref_logprob.append(reference.logprob(prompt, response).cpu())
            kl_ref.append(token_kl(policy, reference, prompt, response).cpu())
    row = metrics(drawn["logprob"], torch.cat(ref_logprob), drawn["reward"], held.reward, n,
                  torch.cat(kl_ref))
    row = {"method": method, "n": n} | row
    return row | {"samples_per_answer": 1, "seconds": time.time() - began}, drawn["reward"]

# ------------------------------------------------------------------------------- what a person sees

def title(method: str, n: int) -> str:
    """How a method is called in tables and pictures."""
    names = {"ref": "reference", "bon": f"best of {n}", "vbon": "vBoN"}
    return names.get(method, method)


def print_table(rows: list[dict], held_rewards: Tensor) -> None:
    """The rows, and what best-of-N attains in theory with the held-out rewards (P', M')."""
    print(f"\n{'':14}{'reward':>7}{'win rate':>13}{'KL to ref':>14}{'KL to BoN':>14}"
          f"{'positive':>9}{'samples':>8}")
    for row in rows:
        line = f"{title(row['method'], row['n']):13}{row['reward']:#8.3g}"
        for name, width in (("win_rate", 13), ("kl_ref", 14), ("kl_bon", 14)):
            cell = f"{row[name]:.3f} ±{row[name + '_se']:.3f}"
            line += cell.rjust(width)
        print(line + f"{row['positive']:9.2f}{row['samples_per_answer']:8}")
    n = rows[0]["n"]
    kl, win = vbon.bon_attains(held_rewards, n)
    print(f"{f'theory, n = {n}':21}{win:6.3f}{kl:14.3f}{0:14.3f}")
    ties = share_of_ties(held_rewards)
    if ties == 1:
        print("\n" + NOTHING_TO_LEARN)
        return
    if ties > 0.01:
        print(f"\nIn {ties:.0%} of all pairs of reference responses, both have the same reward.")
    print("\nKLs in nats per answer; ± standard error over prompts. vBoN has worked if its row\n"
          "is near that of best-of-N, and its KL to BoN near 0, with 1 sample for an answer.")


def share_of_ties(rewards: Tensor) -> float:  # (P, M)
    """Of all pairs of responses to the same prompt, the share that have the same reward."""
    m = rewards.shape[1]
    same = rewards[:, :, None] == rewards[:, None, :]
    # a response is no pair with itself
    return (same.double().sum((1, 2)) - m).mean().item() / (m * (m - 1))


NOTHING_TO_LEARN = "All rewards of a prompt are the same: there is nothing to learn."


def show_progress(label: str, done: int, total: int, began: float, stats: dict | None = None
                  ) -> None:
    """One line that changes in a terminal; four lines in all in a file."""
    spent = time.time() - began
    live = sys.stdout.isatty()
    quarter = done * 4 // total > (done - 1) * 4 // total
    if not live and not quarter:
        return
    line = f"  {label} {done}/{total}"
    for name, value in (stats or {}).items():
        line += f"  {name} {value:.2f}"
    line += f"  {spent:.0f} of {spent / done * total:.0f} s"
    if not live:
        print(line, flush=True)
    elif done < total:
        print(f"{line:79.79}", end="\r", flush=True)
    else:
        print(f"{line:79.79}", flush=True)


def answers(encoding: tiktoken.Encoding, prompts: Tensor, reward_fn, models: list,
            settings: Settings, seed: int) -> str:
    """Each prompt (P, T), and under it an answer of each model, with its reward, unedited.

    models: (title, model, tries); the best of so many responses is shown.
    """
    room = models[0][1].config["block_size"] - prompts.shape[1]
    length = min(settings.length, room)
    lines = [[decode(encoding, prompt) + " ..."] for prompt in prompts.tolist()]
    for name, model, tries in models:
        generator = random_numbers(prompts.device, "answers", seed)
        response, _ = model.sample(prompts, tries, length, generator)
        reward = reward_fn(prompts, response).cpu()
        best = vbon.best_of_n(reward, random_numbers("cpu", "answers", seed)).tolist()
        for i, j in enumerate(best):
            words = decode(encoding, response[i, j].tolist())
            lines[i].append(f"  {name:<12}{reward[i, j]:+6.2f}  ...{words}")
    return "\n".join("\n".join(block) for block in lines) + "\n"


def draw_picture(path: Path, rows: list[dict], draws: Samples, held: Samples, policy_reward: Tensor,
                 history: list[dict], seed: int) -> None:
    """Left, rewards on held-out prompts as histograms; right, the way of the policy in training."""
    pyplot = plain_pyplot()
    reference, best, policy = rows
    n = best["n"]
    _, best_reward = choose_best(draws, n, seed)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")

    shown = [("reference, 1 sample", "0.6", draws.reward, reference),
             (f"best of {n}, {n} samples", "tab:blue", best_reward, best),
             ("vBoN, 1 sample", "tab:red", policy_reward, policy)]
    low = draws.reward.min().item() - 0.1
    high = draws.reward.max().item() + 0.1
    bins = torch.linspace(low, high, 50, dtype=torch.float64).tolist()
    for label, color, reward, row in shown:
        left.hist(reward.flatten().tolist(), bins, density=True, histtype="step", lw=2, color=color,
                  label=label)
        left.axvline(row["reward"], color=color, ls=":", lw=2)
    left.set(xlabel="reward of an answer (dotted: mean)", ylabel="density",
             title="Rewards on held-out prompts")
    left.legend(frameon=False, loc="upper left")

    # best-of-n for every n, from the reference samples alone
    curve = [vbon.bon_attains(held.reward, i) for i in range(1, 3 * n + 1)]
    right.plot([kl for kl, _ in curve], [win for _, win in curve], ".-", color="tab:blue", lw=1,
               label="best of 1, 2, 3, ..., in theory")
    right.plot([step["kl_ref"] for step in history], [step["win_rate"] for step in history],
               color="tab:red", lw=1, alpha=0.5, label="vBoN, step by step")
    right.plot(policy["kl_ref"], policy["win_rate"], "D", color="tab:red", ms=7,
               label="vBoN, trained")
    right.plot(*curve[n - 1], "o", color="tab:blue", ms=10, mfc="none", mew=2, label=f"best of {n}")
    right.set(xlabel="KL to the reference, nats per answer", ylabel="win rate over the reference",
              title="The way of the policy in training",
              xlim=(-0.03, 1.7 * curve[n - 1][0] + 0.1))
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    pyplot.close(figure)
    write_whole(path, picture.getvalue())


def plain_pyplot():
    """matplotlib.pyplot, without a window and with its own defaults.

    A notebook or a matplotlibrc may have set others. It is imported here, so that --help need not
    wait for it.
    """
    os.environ["MPLBACKEND"] = "agg"
    from matplotlib import pyplot
    pyplot.rcdefaults()
    return pyplot

# -------------------------------------------------------- the command line: skip on a first reading

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises UnusableInput for a wrong one."""
    return make_parser(__doc__).parse_args(argv)


def make_parser(description: str, several: bool = False) -> argparse.ArgumentParser:
    """The flags that train.py and the experiments share; `several` N and seeds, or one of each."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    nargs = "+" if several else None
    parser.add_argument("--n", type=int, nargs=nargs, default=[4] if several else 4,
                        help="The N of best-of-N. A larger N means more reward, further away from "
                        "the reference. Above 8, training takes three times the steps. Default: 4.")
    parser.add_argument("--seed", type=int, nargs=nargs, default=[0] if several else 0,
                        help="Another seed repeats everything, the text too, with other random "
                        "numbers. Default: 0.")
    parser.add_argument("--steps", type=int, help="The number of updates in fine-tuning. With more "
                        "of them the policy comes closer to best-of-N. Default: 90 for the "
                        "built-in text, 600 with --data, 250 with --init.")
    parser.add_argument("--m", type=int, help="The number of reference samples to each training "
                        "prompt. With more of them F is known better. Default: 64, or 128 with "
                        "--data.")
    parser.add_argument("--data", metavar="DIR", help="A folder with your own labelled reviews: "
                        "pos.txt and neg.txt, one review a line, or pos/*.txt and neg/*.txt, one "
                        "review a file; with --reward, prompts.txt will do. Default: built-in "
                        "reviews.")
    parser.add_argument("--reward", metavar="FILE.py", help="A Python file that defines "
                        "reward(prompts, responses): two lists of texts in, one number for each "
                        "pair out. With it, --data may hold prompts.txt, one text a line, without "
                        "labels. Files that it imports are not noticed when they change. Default: "
                        "a sentiment classifier.")
    parser.add_argument("--init", metavar="GPT2", help="Start the reference model from gpt2, "
                        "gpt2-medium, gpt2-large or gpt2-xl, which are downloaded, or from a "
                        "Hugging Face folder of a GPT-2. Default: a new small model.")
    parser.add_argument("--lm-steps", type=int, metavar="S", help="The number of updates of the "
                        "reference model, before anything else. With 0, the model is taken as it "
                        "is. Default: 1000 for the built-in text, else by the size of the text.")
    parser.add_argument("--prompt-tokens", type=int, metavar="T", help="A prompt is so many first "
                        "tokens of a text. Default: 4.")
    parser.add_argument("--length", type=int, metavar="L", help="A response has at most so many "
                        "tokens. Default: 24.")
    parser.add_argument("--sample", metavar="TEXT", help="Print answers to TEXT, of the reference, "
                        "of best-of-N and of the policy. What is not trained yet is trained first.")
    parser.add_argument("--out", metavar="DIR", default="out", help="The folder for results, "
                        "pictures and finished stages. Default: out.")
    parser.add_argument("--device", default="auto", help="Compute on cpu, cuda or mps. Default: "
                        "cuda where there is one, else cpu.")
    parser.add_argument("--quick", action="store_true", help="Make everything tiny: a few seconds "
                        "that show that the program runs. The numbers mean nothing.")
    return parser


class Parser(argparse.ArgumentParser):
    """Raises UnusableInput where argparse would end the program."""

    def error(self, message: str) -> None:
        raise UnusableInput(message)


class Inputs(NamedTuple):
    """What the command line names."""
    device: torch.device
    judge: RewardFile | None        # of --reward
    data: list | None               # the reviews of --data
    given: "Given | None"           # of --init


def read_inputs(args: argparse.Namespace, ns: list[int], folders: list[Path]) -> Inputs:
    """Check the command line, and read what it names; the run will write `folders`."""
    for n in ns:
        check_arguments(args, n)
    read_results(Path(args.out))                        # if they are damaged, say so now
    check_folders(args, folders)
    device = start_processes(args.device)
    check_same_arguments(args)
    judge = load_reward(args.reward) if args.reward else None
    data = load_reviews(args.data, labelled=judge is None) if args.data else None
    return Inputs(device, judge, data, load_given(args.init))


class Given(NamedTuple):
    """What --init gives."""
    model: GPT
    encoding: tiktoken.Encoding


def load_given(init: str | None) -> Given | None:
    """The model and the tokenizer of --init."""
    if init is None:
        return None
    if init not in PRETRAINED and not Path(init).is_dir():
        raise UnusableInput(f"--init {init}: no such folder, and none of {', '.join(PRETRAINED)}")
    model = GPT.from_pretrained(init)
    encoding = pretrained_encoding(init)
    tokens = model.config["vocab_size"]
    if tokens != encoding.n_vocab:
        raise UnusableInput(f"--init {init}: the model has {tokens} tokens, its vocabulary "
                            f"{encoding.n_vocab}")
    return Given(model, encoding)


def check_arguments(args: argparse.Namespace, n: int) -> None:
    """Each rule about arguments, with its own message, before anything is read or downloaded."""
    if n < 1:
        raise UnusableInput(f"--n {n}: want at least 1")
    if args.lm_steps is not None and args.lm_steps < 0:
        raise UnusableInput(f"--lm-steps {args.lm_steps}: want at least 0")
    if args.prompt_tokens is not None and args.prompt_tokens < 1:
        raise UnusableInput(f"--prompt-tokens {args.prompt_tokens}: want at least 1")
    if args.length is not None and args.length < 1:
        raise UnusableInput(f"--length {args.length}: want at least 1")
    if args.steps is not None and args.steps < 1:
        raise UnusableInput(f"--steps {args.steps}: want at least 1")
    if args.m is not None and args.m < 1:
        raise UnusableInput(f"--m {args.m}: want at least 1")
    if args.sample is not None and not args.sample.strip():
        raise UnusableInput("--sample: want some words to answer")


def check_settings(settings: Settings, args: argparse.Namespace, n: int) -> None:
    """The rules that depend on the text and the model."""
    if n > settings.m_eval:
        raise UnusableInput(f"--n {n}: want at most {settings.m_eval}, the number of draws that "
                            f"best-of-N is evaluated with")
    if settings.length < 1:
        raise UnusableInput("--init: this model has no room for a prompt and a response")
    if args.length is not None and args.length > settings.length:
        raise UnusableInput(f"--length {args.length}: the model of --init has room for "
                            f"{settings.length}")


def count_rewards(text: Text, settings: Settings, n: int) -> int:
    """How many responses are judged in all, if no stage is finished yet."""
    tried = 2
    drawn = len(text.prompts) * settings.m + 2 * len(text.held_prompts) * settings.m_eval
    trained = settings.steps * min(settings.batch, len(text.prompts)) * settings.k
    evaluated = len(text.held_prompts) * settings.k_eval
    shown = min(8, len(text.held_prompts)) * (1 + n + 1)        # in samples.txt
    return tried + drawn + trained + evaluated + shown


def encode_question(sample: str | None, text: Text, settings: Settings, given: Given | None
                    ) -> Tensor | None:
    """The prompt of --sample (3, T), three times: each model answers three times."""
    if sample is None:
        return None
    ids = text.encoding.encode_ordinary(sample)
    room = text.tokens.shape[1] if given is None else given.model.config["block_size"]
    if len(ids) >= room:
        raise UnusableInput(f"--sample: want fewer than {room} tokens, got {len(ids)}")
    return torch.tensor(ids).repeat(3, 1)


def describe(settings: Settings, text: Text, inputs: Inputs) -> dict:
    """All that a result depends on besides method, N, β and seed: a part of its line."""
    device, judge, data, given = inputs
    code = [source(file) for file in ("vbon.py", "model.py", "reward.py", "train.py")]
    return dataclasses.asdict(settings) | {
        # a small text may have fewer tokens and prompts than the settings want
        "vocab": text.encoding.n_vocab,
        "prompts": len(text.prompts),
        "held_prompts": len(text.held_prompts),
        "data": data and digest(data),
        # of a model that a run left: the "weights" in its settings.json
        "init": given and digest(weights(given.model)),
        "init_vocabulary": given and digest(given.encoding.token_byte_values()),
        "reward_file": judge and digest(judge.content),
        "device": device.type,
        "processes": world_size(),
        "code": digest(code),
    }

# ------------------------------------------------------- results and files: skip on a first reading

KEYS = ("method", "n", "seed", "beta", "reward", "reward_se", "win_rate", "win_rate_se", "kl_ref",
        "kl_ref_se", "kl_bon", "kl_bon_se", "positive", "samples_per_answer", "seconds")
MEASURED = KEYS[4:]


def read_results(out: Path) -> list[dict]:
    """The lines of results.jsonl in the folder `out`, which is made if it is missing.

    Raises UnusableInput if one of the lines is no result.
    """
    path = out / "results.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise UnusableInput(f"--out {out}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not set(KEYS) <= row.keys():
            raise UnusableInput(f"{path}, line {number}: not a result; delete this line, or move "
                                f"the file away")
        rows.append(row)
    return rows


def add_results(out: Path, rows: list[dict]) -> None:
    """Append rows to results.jsonl. A row with the settings of an older one takes its place."""
    with lock(out):
        kept = {}
        for row in read_results(out) + rows:
            kept[json.dumps(settings_of(row), sort_keys=True)] = row
        lines = [json.dumps(row) + "\n" for row in kept.values()]
        write_whole(out / "results.jsonl", "".join(lines).encode("utf-8"))


def settings_of(row: dict) -> dict:
    """What made a row: all of it but what was measured."""
    return {name: value for name, value in row.items() if name not in MEASURED}


def check_folders(args: argparse.Namespace, folders: list[Path]) -> None:
    """Refuse, before any work, to write over a model that --init reads, or that is not ours."""
    if args.sample is not None:
        return                                          # it leaves no models
    for folder in folders:
        if not folder.exists():
            continue
        if args.init is not None and Path(args.init).resolve() == folder.resolve():
            raise UnusableInput(f"--init {args.init}: this run would write over it; give another "
                                f"--out")
        if not (folder / "settings.json").is_file():
            raise UnusableInput(f"{folder}: not made by this program; move it away")
        read_json(folder / "settings.json")             # if it is damaged, say so now


def leave_model(folder: Path, model: GPT, encoding: tiktoken.Encoding, row: dict) -> None:
    """A Hugging Face folder with model, tokenizer, and settings.json, which says what made it.

    It is made in another place. Once it is whole, it takes the place of an older one.
    """
    if my_rank() != 0:
        return
    new = out_of_sight(folder)
    model.save_pretrained(new)
    save_tokenizer(encoding, new)
    settings = settings_of(row) | {"weights": digest(weights(model))}
    content = json.dumps(settings, indent=2) + "\n"
    (new / "settings.json").write_text(content, encoding="utf-8")
    with lock(folder.parent):
        if folder.exists():
            if read_json(folder / "settings.json").get("weights") != settings["weights"]:
                print(f"  {folder} was made by other settings: it is replaced\n"
                      f"  (their command brings it back)")
            old = out_of_sight(folder)
            folder.replace(old)
            shutil.rmtree(old)
        new.replace(folder)


def out_of_sight(folder: Path) -> Path:
    """A new place for a folder that is not whole, in the cache, where all may be deleted."""
    return folder.parent / "cache" / f"{folder.name}.{uuid.uuid4().hex}.part"


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Let only one process at a time change the results of this folder.

    The lock is the operating system's, and dies with its process. Where there is none, go on
    without.
    """
    path = out / "cache" / "results.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        try:
            wait_for_lock(file)
        except OSError:                                 # some network folders have no locks
            pass
        yield


def wait_for_lock(file: io.TextIOWrapper) -> None:
    """Return once no other process holds the lock of this file."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX)
    except ImportError:                                 # Windows
        import msvcrt
        msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole, or not at all; of several processes, the first one writes."""
    if my_rank() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

# --------------------------------------------------------- finished stages: skip on a first reading
#
# What takes long is kept in a file, whose name tells all that it depends on: settings, data and the
# bytes of the code that makes it. So a stage is done again when one of them has changed, and only
# then. A run that was killed goes on from the last stage, or from the last step of fine-tuning.

def stage_path(out: Path, name: str, *depends_on: object) -> Path:
    """The file in which a stage keeps what it made."""
    return out / "cache" / f"{name}-{digest(torch.__version__, *depends_on)}.pt"


def stored(path: Path, build: Callable[..., dict], *args: object) -> dict:
    """What build(*args) returns, from the file if it was made before."""
    content = load(path)
    if content is None:
        save(path, build(*args))
        content = load(path)                            # so that old and new are the same
    return content


def save(path: Path, content: dict) -> None:
    """Write tensors, numbers and lists of them behind their checksum."""
    if my_rank() != 0:
        return
    buffer = io.BytesIO()
    torch.save(content, buffer)
    checksum = hashlib.sha256(buffer.getbuffer()).digest()
    write_whole(path, checksum + buffer.getvalue())


def load(path: Path) -> dict | None:
    """What `save` wrote; None if it is not there, or damaged. The first process reads for all."""
    content = b""
    if my_rank() == 0 and path.exists():
        content = path.read_bytes()
    content = from_first_process(content)
    checksum, data = content[:32], content[32:]
    if hashlib.sha256(data).digest() == checksum:
        return torch.load(io.BytesIO(data), "cpu", weights_only=True)
    if content:
        print(f"  damaged, it is made again: {path}", flush=True)
    return None


def save_checkpoint(path: Path, step: int, trained: list, optimizer: torch.optim.Optimizer,
                    history: list[dict], seconds: float) -> None:
    """Keep all that the next steps of fine-tuning need."""
    save(path, {"step": step, "trained": [p.detach() for p in trained],
                "optimizer": optimizer.state_dict(), "history": history, "seconds": seconds})


def resume(path: Path, trained: list, optimizer: torch.optim.Optimizer
           ) -> tuple[int, list[dict], float]:
    """Go on from a checkpoint, if there is one: the next step, history, and seconds so far."""
    saved = load(path)
    if saved is None:
        return 0, [], 0.0
    for p, x in zip(trained, saved["trained"], strict=True):
        p.data.copy_(x)
    optimizer.load_state_dict(saved["optimizer"])
    print(f"  going on after step {saved['step']}", flush=True)
    return saved["step"], saved["history"], saved["seconds"]


def load_model(saved: dict, device: torch.device) -> GPT:
    """A model from its config and weights."""
    model = GPT(**saved["config"])
    model.load_state_dict(saved["weights"])
    return model.to(device)


def weights(model: torch.nn.Module) -> list[Tensor]:
    """All numbers of a model."""
    return list(model.state_dict().values())


@functools.cache
def source(file: str) -> bytes:
    """The bytes of one of our files, as they were when they were first asked for."""
    return Path(__file__).parent.joinpath(file).read_bytes()


# Ask now: a file that is edited during a run must not give its new name to what the old one made.
for file_name in ("vbon.py", "model.py", "reward.py", "train.py"):
    source(file_name)


def digest(*parts: object) -> str:
    """A short name for tensors, bytes, and anything with a stable repr."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{part.dtype} {tuple(part.shape)}".encode("utf-8"))
            total.update(part.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(part, (list, tuple)):
            total.update(digest(*part).encode("utf-8"))
        else:
            total.update(repr(part).encode("utf-8") + b";")
    return total.hexdigest()[:12]


def random_numbers(device: torch.device | str, *names: object) -> torch.Generator:
    """A generator for one purpose: what else was drawn before does not matter."""
    return torch.Generator(device).manual_seed(int(digest(*names), 16))

# ------------------------------------------------------- several processes: skip on a first reading
#
# `torchrun --local_addr 127.0.0.1 --nproc_per_node 2 -- train.py --n 4` starts this program twice.
# The processes share the prompts of each update and all drawing; the first one reads and writes
# files.

TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start_processes(device: str) -> torch.device:
    """Choose the device; meet the other processes, if torchrun has started several."""
    given = {name: os.environ.get(name) for name in TORCHRUN}
    several = given["WORLD_SIZE"] not in (None, "", "1")
    if several and not all(given.values()):
        missing = ", ".join(name for name in TORCHRUN if not given[name])
        raise UnusableInput(f"WORLD_SIZE = {given['WORLD_SIZE']} announces several processes, but "
                            f"{missing} is not set; start them by torchrun, or unset WORLD_SIZE")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UnusableInput(f"--device {device}: want cpu, cuda or mps")
    if device == "cuda" and several:
        device = f"cuda:{given['LOCAL_RANK']}"
    try:
        chosen = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:     # PyTorch's answers to a wrong device
        raise UnusableInput(f"--device {device}: {str(error).splitlines()[0]}") from None
    if several:
        backend = "gloo"
        if chosen.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(chosen)
        try:
            torch.distributed.init_process_group(backend)
        except (ValueError, RuntimeError) as error:     # PyTorch's answers to odd numbers
            raise UnusableInput(f"torchrun's variables: {error}") from None
    if my_rank() != 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return chosen


def check_same_arguments(args: argparse.Namespace) -> None:
    """Refuse processes that were started with different arguments: they would wait for ever."""
    everyone = from_all_processes({my_rank(): vars(args)})
    for rank, others in everyone.items():
        if others != everyone[0]:
            raise UnusableInput(f"process {rank} has other arguments than process 0")


def world_size() -> int:
    """How many there are."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def my_rank() -> int:
    """The number of this one, from 0."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def my_share(rows: Tensor) -> Tensor:
    """This process's part of the rows; all parts are of one size."""
    size = len(rows) // world_size() * world_size()
    if size == 0:
        raise UnusableInput(f"{world_size()} processes cannot share {len(rows)} prompts")
    return rows[my_rank():size:world_size()]


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Before each step of the optimizer, replace gradients by their mean over all processes."""
    if world_size() > 1:
        optimizer.register_step_pre_hook(average_now)


def average_now(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Replace each gradient by its mean over all processes."""
    for p in optimizer.param_groups[0]["params"]:
        torch.distributed.all_reduce(p.grad)
        p.grad /= world_size()


def from_first_process(content: bytes) -> bytes:
    """What the first process holds."""
    box = [content]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]


def from_all_processes(mine: dict) -> dict:
    """The entries of all processes together."""
    boxes = [mine]
    if world_size() > 1:
        boxes = [{} for _ in range(world_size())]
        torch.distributed.all_gather_object(boxes, mine)
    together = {}
    for box in boxes:
        together |= box
    return together


def silent(*_: object) -> None:
    """Print nothing."""


def run(program: Callable[[], None], name: str) -> None:
    """Run a program, and end it as the shell expects: 2 for unusable input, 130 for Ctrl-C.

    Any other exception keeps its traceback, and ends with status 1: it may be a bug in these files.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")        # where ± cannot be shown, print ? instead
    try:
        program()
    except UnusableInput as error:
        message = str(error).splitlines()[0]
        print(f"{name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on after the last finished stage or update",
              file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(main, "train.py")
