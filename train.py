"""train.py: from text to a policy whose one sample does the work of best-of-N.

    python train.py --n 4                              the main job: one to two minutes
    python train.py --n 4 --data DIR --init gpt2       your own reviews, OpenAI's weights
    python train.py --n 4 --sample "i watched this"    responses of a finished run to your prompt

The stages: text, reward, reference model, reference samples (all in `prepare`), fine-tuning and
evaluation (in `main`). What takes long is kept in files: a stopped run continues when its command
is given again. `vbon_gradient` is the algorithm of the paper, `fine_tune` the training loop.
"""
import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Before PyTorch starts: let its threads sleep while they wait. By default they spin, and beside
# other work two threads take longer than one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

import vbon
from model import GPT, add_adapters, merge_adapters, prompts_at_a_time
from reward import accuracy, train_classifier
from support import options, report, results
from support.inputs import Inputs, read_inputs
from support.kept import keep, resume, save_checkpoint
from support.own_reward import OwnReward
from support.reference_model import train_reference
from support.sampling import compute_rewards, sample_responses, score_responses, seeded_generator
from support.settings import choose_settings, setting
from support.statistics import mean_and_error
from support.text import Text, make_text

# ------------------------------------------------------------------------------------- the settings
# Each is a flag: --lm-steps 500. Other texts have other defaults: support/settings.py.

@dataclass(frozen=True)
class TextSettings:
    """Reviews, their tokens and prompts, and the classifier of reviews."""
    reviews: int = setting(12_000, "number of built-in reviews")
    vocab: int = setting(768, "tokens in the vocabulary", least=257)
    prompt_tokens: int = setting(4, "tokens at the start of a review that form its prompt")
    length: int = setting(24, "largest number of tokens in a response; all costs grow with it")
    prompts: int = setting(512, "prompts to train on")
    held_prompts: int = setting(64, "held-out prompts, for the evaluation", least=2)
    epochs: int = setting(4, "passes over the reviews, to train the classifier")


@dataclass(frozen=True)
class ReferenceSettings:
    """The reference model and its training on the reviews."""
    layers: int = setting(2, "blocks of the GPT-2")
    heads: int = setting(2, "attention heads in a block")
    width: int = setting(64, "size of the residual stream")
    lm_steps: int = setting(1000, "updates; with 0, the model of --init is used as it is", least=0)
    lm_batch: int = setting(64, "reviews in an update")
    lm_lr: float = setting(6e-3, "largest learning rate", least=0)


@dataclass(frozen=True)
class SampleSettings:
    """Reference samples, from which F is estimated, and samples for the evaluation."""
    m: int = setting(64, "M, reference samples for each training prompt")
    m_eval: int = setting(512, "M for each held-out prompt; best-of-N chooses among as many others")
    k_eval: int = setting(64, "responses of the policy to each held-out prompt")


@dataclass(frozen=True)
class TuningSettings:
    """Fine-tuning of the policy."""
    steps: int = setting(90, "updates; with more, the policy comes closer to best-of-N")
    batch: int = setting(64, "prompts in an update")
    k: int = setting(8, "K, responses to each of these prompts", least=2)
    rank: int = setting(4, "rank of the adapters")
    lr_scale: float = setting(0.54, "learning rate times √(number of trained parameters)", least=0)


@dataclass(frozen=True)
class Settings:
    """All settings, in the order of the stages."""
    text: TextSettings = TextSettings()
    reference: ReferenceSettings = ReferenceSettings()
    samples: SampleSettings = SampleSettings()
    tuning: TuningSettings = TuningSettings()


# The modules whose code makes the numbers of a stage: an edit of one of them runs it again.
SAMPLING = ("model", "support.sampling")
JUDGING = (*SAMPLING, "reward", "support.own_reward", "support.tokenizer")
TUNING = (*JUDGING, "train", "vbon")

# ----------------------------------------------------------------------------------------- the run

@torch.random.fork_rng(devices=[])                      # leaves a caller's random numbers alone
def main(argv: list[str] | None = None) -> "Run | None":
    """One N, one seed: from text to a policy, then a table, a picture and samples of it.

    Returns all of it; None with --sample. Raises UnusableInput for wrong arguments and inputs.
    """
    began = time.monotonic()
    args = options.make_parser(__doc__, Settings()).parse_args(argv)
    if args.sample is not None:
        print(results.sample_run(args), end="")
        return None
    n = args.n
    seed = args.seed
    out = Path(args.out)
    inputs = read_inputs(args)
    results.read_results(out)                           # if they are damaged, say so now
    settings = choose_settings(Settings(), args, n, inputs)

    # ---- text, reward, reference model, reference samples
    world = prepare(inputs, settings, out / "cache", seed)

    # ---- fine-tuning: make one sample of the policy as good as the best of n
    method = Method(f"vBoN n={n}", ("vbon", n), vbon_gradient)
    tuned = keep(out / "cache", f"policy-vbon-n{n}-seed{seed}", fine_tune, method, n,
                 world.reference, world.reward, world.samples, settings.tuning, seed, code=TUNING,
                 resumable=True)
    policy = tuned["policy"].to(inputs.device)

    # ---- evaluation: on held-out prompts, with other reference samples
    evaluated = keep(out / "cache", f"evaluation-vbon-n{n}-seed{seed}", evaluate, policy,
                     world.reference, world.reward, world.held_out.prompt, settings.samples.k_eval,
                     world.text.length, "evaluation of vbon", seed, code=TUNING)
    rows = [reference_row(world, n), best_of_n_row(world, n, seed),
            policy_row("vbon", world, evaluated, n, tuned["seconds"])]
    report.print_table(rows, world.held_out.reward, world.text.length)

    # ---- what stays: results, a picture, responses, the models
    run = Run(n, seed, rows, policy, world, evaluated, tuned["history"])
    best = world.candidates.reward.gather(1, choose_best(world.candidates, n, seed))
    results.leave(args, run, best, results.describe(settings, world.text, inputs, args.quick))
    print(f"{time.monotonic() - began:.0f} s")
    return run


class Samples(NamedTuple):
    """M responses of the reference model to each of P prompts."""
    prompt: Tensor                  # (P, T0)
    response: Tensor                # (P, M, L)
    logprob: Tensor                 # (P, M)
    reward: Tensor                  # (P, M)
    seconds: float

    def depends_on(self) -> tuple:
        """Return the values that `keep` compares: others give another policy."""
        return self.prompt, self.response, self.reward


class World(NamedTuple):
    """What fine-tuning and evaluation start from."""
    text: Text
    reference: GPT
    reward: Callable[[Tensor, Tensor], Tensor]      # prompt (P, T0), response (P, K, L) -> (P, K)
    samples: Samples                # for the training prompts
    held_out: Samples               # for the held-out prompts: estimate F in the evaluation
    candidates: Samples             # for the held-out prompts: best-of-N chooses among these


class Run(NamedTuple):
    """What `main` returns."""
    n: int
    seed: int
    rows: list[dict]                # of the table
    policy: GPT
    world: World
    evaluated: dict                 # the policy's responses to the held-out prompts: see `evaluate`
    history: list[dict]             # what was watched in each update

    def __repr__(self) -> str:
        return f"Run(n={self.n}, seed={self.seed}, win_rate={self.rows[-1]['win_rate']:.3f})"


def prepare(inputs: Inputs, settings: Settings, cache: Path, seed: int) -> World:
    """Run the first stages: text, reward, reference model, reference samples."""
    device = inputs.device

    # ---- text: reviews, their tokens, and prompts
    text = make_text(inputs.reviews, inputs.pretrained, settings.text, seed)

    # ---- reward: your own function, or the logit of a classifier (trained again in each run)
    if inputs.own_reward is not None:
        reward = OwnReward(inputs.own_reward, text.encoding, cache)
        reward.try_out(text.tokens, settings.text.prompt_tokens)
    else:
        classifier = train_classifier(text.tokens, text.labels, text.encoding.n_vocab,
                                      settings.text.epochs,
                                      seeded_generator("cpu", "classifier", seed))
        share = accuracy(classifier, text.unseen_tokens, text.unseen_labels)
        print(f"reward: the classifier is right on {share:.0%} of the reviews it has not seen")
        reward = classifier.to(device).reward

    # ---- reference model: a language model of the reviews
    initial = inputs.pretrained.model if inputs.pretrained is not None else None
    trained = keep(cache, f"reference-model-seed{seed}", train_reference, initial,
                   text.encoding.n_vocab, text.tokens, text.unseen_tokens, settings.reference, seed,
                   device.type, code=(*SAMPLING, "support.reference_model"))
    reference = trained["model"].to(device)
    print(f"reference model: a perplexity of {math.exp(trained['nats']):.1f} on unseen reviews")

    # ---- reference samples: F, the CDF of the reward, is estimated from their rewards
    # Best-of-N gets samples of its own, the candidates. Otherwise F would be estimated from samples
    # that include the winner and those that it has beaten.
    found = []
    for name, prompts, m in (("training", text.prompts, settings.samples.m),
                             ("held-out", text.held_prompts, settings.samples.m_eval),
                             ("draws", text.held_prompts, settings.samples.m_eval)):
        sampled = keep(cache, f"samples-{name}-seed{seed}", sample_responses, reference, prompts, m,
                       text.length, name, seed, code=SAMPLING)
        judged = keep(cache, f"rewards-{name}-seed{seed}", compute_rewards, reward, prompts,
                      sampled["response"], name, device.type, code=JUDGING)
        found.append(Samples(prompts, sampled["response"], sampled["logprob"], judged["reward"],
                             sampled["seconds"] + judged["seconds"]))
    return World(text, reference, reward, *found)

# ------------------------------------------------------------------------------------- fine-tuning

class Batch(NamedTuple):
    """The prompts of one update, with the reference's samples for them."""
    step: int                       # number of the update, from 0
    prompt: Tensor                  # (P, T0)
    ref_response: Tensor            # (P, M, L)
    ref_rewards: Tensor             # (P, M)


class Method(NamedTuple):
    """One way to fine-tune a policy; experiments/methods.py has others."""
    label: str                      # in progress lines
    names: tuple                    # seed the random numbers of each update
    gradient: Callable              # takes the arguments of `vbon_gradient`

    def depends_on(self) -> tuple:
        """Return the values that `keep` compares: others give another policy."""
        return self.names


def watch(batch: Batch, rollout: vbon.Rollout, logprob: Tensor) -> dict[str, float]:
    """Return the means over a batch that are worth watching; the loss itself means nothing."""
    return {
        "win_rate": vbon.win_rate(rollout.reward, batch.ref_rewards).mean().item(),
        "kl_ref": (logprob - rollout.ref_logprob).mean().item(),
    }


def vbon_gradient(policy: GPT, reference: GPT, reward_fn, batch: Batch, n: int,
                  settings: TuningSettings, generator: torch.Generator) -> dict[str, float]:
    """Add an estimate of minus (6) to the policy's .grad: steps (a) to (e) of an update."""
    n = vbon.grow(n, batch.step, settings.steps)            # from best-of-2 to best-of-n
    length = batch.ref_response.shape[2]
    part = prompts_at_a_time(policy, settings.k, length)
    # (a), (b): sample K responses from the policy; compute their rewards and log π_ref
    rollout = vbon.roll_out(policy, reference, reward_fn, batch.prompt, settings.k, length,
                            generator, part)
    # (c): log π_bon, the target of training
    log_target = vbon.bon_target(rollout.ref_logprob, rollout.reward, batch.ref_rewards, n)
    # (d), (e): compute log π_θ with gradients, and add the estimate of minus (6)
    logprob = vbon.reinforce(policy, batch.prompt, rollout.response, log_target, part)
    return watch(batch, rollout, logprob) | {"kl_target": (logprob - log_target).mean().item()}


def fine_tune(checkpoint: Path, method: Method, n: int, reference: GPT, reward_fn, samples: Samples,
              settings: TuningSettings, seed: int) -> dict:
    """Fine-tune a copy of the reference towards the method's target; called by `keep`."""
    policy = copy.deepcopy(reference)
    trained = add_adapters(policy, settings.rank, seeded_generator("cpu", "adapters", seed))
    # Adam moves each parameter by about lr in an update, however small its gradient is. Near the
    # target most of this is noise, which adds a KL ∝ lr² · (number of trained parameters).
    lr = settings.lr_scale / math.sqrt(sum(p.numel() for p in trained))
    optimizer = torch.optim.Adam(trained, lr=lr, betas=(0.9, 0.99), fused=True)
    first, history, before = resume(checkpoint, trained, optimizer)
    began = time.monotonic() - before
    for step in range(first, settings.steps):
        optimizer.param_groups[0]["lr"] = lr * decay(step, settings.steps)
        batch = choose_batch(samples, step, settings.batch, seed, policy.wte.weight.device)
        # each update has its own random numbers: a resumed run ends with the same policy
        generator = seeded_generator(batch.prompt.device, *method.names, seed, step, 0)
        optimizer.zero_grad()
        stats = method.gradient(policy, reference, reward_fn, batch, n, settings, generator)
        optimizer.step()
        history.append(stats)
        save_checkpoint(checkpoint, step + 1, trained, optimizer, history, time.monotonic() - began)
        report.show_progress(method.label, step + 1, settings.steps, began, stats)
    merge_adapters(policy)
    return {"policy": policy, "history": history, "seconds": time.monotonic() - began}


def choose_batch(samples: Samples, step: int, size: int, seed: int, device: torch.device) -> Batch:
    """Choose the prompts of one update at random."""
    order = torch.randperm(len(samples.prompt),
                           generator=seeded_generator("cpu", "batch", seed, step))
    rows = order[:size]
    return Batch(step, samples.prompt[rows].to(device), samples.response[rows].to(device),
                 samples.reward[rows])


def decay(step: int, steps: int) -> float:
    """Return the factor of the learning rate: 1 for half of the steps, then along a cosine to 0."""
    progress = step / steps
    if progress <= 0.5:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (2 * progress - 1)))

# -------------------------------------------------------------------------------------- evaluation

def evaluate(policy: GPT, reference: GPT, reward_fn, prompts: Tensor, k: int, length: int,
             name: str, seed: int) -> dict:
    """Sample responses of the policy to held-out prompts (P, T), and score them; for `keep`."""
    began = time.monotonic()
    sampled = sample_responses(policy, prompts, k, length, name, seed)
    judged = compute_rewards(reward_fn, prompts, sampled["response"], name,
                             policy.wte.weight.device.type)
    scored = score_responses(policy, reference, prompts, sampled["response"])
    return sampled | judged | scored | {"seconds": time.monotonic() - began}


def metrics(logprob: Tensor, ref_logprob: Tensor, reward: Tensor, ref_rewards: Tensor, n: int,
            kl_ref: Tensor) -> dict[str, float]:
    """Return means and standard errors of all metrics, from a policy's responses (P, K).

    logprob is the policy's own. kl_ref: log π_θ - log π_ref, or `token_kl`, which is less noisy.
    """
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


def reference_row(world: World, n: int) -> dict:
    """Return the row of the reference itself, from all candidates."""
    c = world.candidates
    everyone = torch.arange(c.reward.shape[1]).expand_as(c.reward)
    return decoded_row("ref", world, n, everyone, c.logprob) | {"samples_per_answer": 1}


def best_of_n_row(world: World, n: int, seed: int) -> dict:
    """Return the row of best-of-N itself, really sampled: n candidates give one response."""
    c = world.candidates
    best = choose_best(c, n, seed)
    # Its log-probability is known by the formula. So its KL to best-of-n is 0 by definition.
    ref_logprob = c.logprob.gather(1, best)
    reward = c.reward.gather(1, best)
    log_bon = vbon.bon_target(ref_logprob, reward, world.held_out.reward, n)
    return decoded_row("bon", world, n, best, log_bon)


def choose_best(candidates: Samples, n: int, seed: int) -> Tensor:
    """Return the index (P, G) of the best in each of G groups of n candidates (P, M)."""
    P, M = candidates.reward.shape
    G = M // n
    groups = candidates.reward[:, :G * n].reshape(P * G, n)
    best = vbon.best_of_n(groups, seeded_generator("cpu", "best", n, seed))
    # from the index in a group to that among all M
    return best.view(P, G) + n * torch.arange(G)


def decoded_row(method: str, world: World, n: int, chosen: Tensor, logprob: Tensor) -> dict:
    """Return the row of a method that chooses one of n candidates: `chosen` (P, G) of them, with
    the log-probabilities (P, G) that they have under the method."""
    c = world.candidates
    ref_logprob = c.logprob.gather(1, chosen)
    row = metrics(logprob, ref_logprob, c.reward.gather(1, chosen), world.held_out.reward, n,
                  logprob - ref_logprob)
    rows = torch.arange(len(chosen))[:, None]
    return {"method": method, "n": n} | row | {
        "samples_per_answer": n, "cut": share_cut(c.response[rows, chosen], world),
        "seconds": c.seconds}


def policy_row(method: str, world: World, evaluated: dict, n: int, seconds: float) -> dict:
    """Return the row of a trained policy; `seconds` is the time that its training took."""
    row = metrics(evaluated["logprob"], evaluated["ref_logprob"], evaluated["reward"],
                  world.held_out.reward, n, evaluated["token_kl"])
    return {"method": method, "n": n} | row | {
        "samples_per_answer": 1, "cut": share_cut(evaluated["response"], world),
        "seconds": seconds + evaluated["seconds"]}


def share_cut(response: Tensor, world: World) -> float:  # (P, K, L)
    """Return the share of responses that do not end, but are cut at the largest length."""
    return (response != world.text.encoding.eot_token).all(-1).double().mean().item()


if __name__ == "__main__":
    options.run(main, "train.py")
