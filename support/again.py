"""--sample alone: responses of the models that a folder holds, without the other flags of the run.

A run keeps in its cache what sampling needs beside the exported models: the reward, the largest
length, and which tokens its texts have.
"""
import argparse
import tempfile
from pathlib import Path

import tiktoken
import torch

from model import GPT
from reward import Classifier
from support.huggingface import load_model
from support.files import UnusableInput, read_json
from support.inputs import Inputs, encode_prompt
from support.kept import load, save
from support.own_reward import OwnReward, RewardFile
from support.report import name_models, sample_text
from support.tokenizer import pretrained_encoding

MODELS = ("--out", "--sample", "--n", "--seed", "--device")     # flags that only choose a run


def keep_run(out: Path, n: int, seed: int, world, inputs: Inputs) -> None:
    """Keep what `find_run` and `sample_again` need."""
    content = {"length": world.settings.text.length, "seen": seen_tokens(world.text)}
    if inputs.own_reward is not None:
        content["reward_path"] = str(inputs.own_reward.path)
        content["reward_source"] = inputs.own_reward.source
    else:
        classifier = world.reward.__self__
        content["classifier"] = classifier.state_dict()
    save(_path(out, n, seed), content)


def _path(out: Path, n: int, seed: int) -> Path:
    return out / "cache" / f"run-n{n}-seed{seed}.pt"


def find_run(args: argparse.Namespace) -> tuple[int, int] | None:
    """Return n and seed of the run that --sample means, or None if other flags name one.

    Raises UnusableInput if the folder holds several, or if --sample stands alone and there is none.
    """
    if args.sample is None or not set(args.given) <= set(MODELS):
        return None
    found = []
    for folder in sorted(Path(args.out).glob("policy-n*-seed*")):
        settings = read_json(folder / "settings.json")
        n = settings["n"]
        seed = settings["seed"]
        chosen = ("--n" not in args.given or n == args.n) and (
            "--seed" not in args.given or seed == args.seed)
        if chosen and _path(Path(args.out), n, seed).exists():
            found.append((n, seed))
    if len(found) > 1:
        names = "; ".join(f"--n {n} --seed {seed}" for n, seed in found)
        raise UnusableInput(f"--sample: {args.out} holds several runs; add one of: {names}")
    if found:
        return found[0]
    kept = any((Path(args.out) / "cache").glob("*.pt"))
    if set(args.given) <= {"--sample", "--out"} and not kept:
        # to train for minutes is not what this command looks like
        raise UnusableInput(f"--sample: {args.out} holds no finished run; name its folder by "
                            f"--out, or add the flags of a run, such as --n 4")
    return None


def sample_again(args: argparse.Namespace, n: int, seed: int, device: torch.device) -> str:
    """Return three responses of each model of a run to the prompt of --sample."""
    out = Path(args.out)
    kept = load(_path(out, n, seed))
    if kept is None:
        raise UnusableInput(f"--sample: {_path(out, n, seed)} is damaged; give all flags of the "
                            f"run, and it is made again")
    folder = out / f"policy-n{n}-seed{seed}"
    encoding = pretrained_encoding(folder)
    policy = load_model(folder).to(device)
    reference = load_model(out / f"reference-seed{seed}").to(device)
    prompt = encode_prompt(args.sample, encoding, policy.config["block_size"])
    reward_fn = _reward(kept, encoding, out / "cache", device)
    models = name_models(n, reference, policy)
    text = sample_text(encoding, prompt.to(device), reward_fn, models, kept["length"], seed)
    return unseen_note(args.sample, encoding, kept["seen"]) + text


def _reward(kept: dict, encoding: tiktoken.Encoding, cache: Path, device: torch.device):
    """Return the reward of the run: its file, or a copy if that has changed, or its classifier."""
    if "classifier" in kept:
        classifier = Classifier(encoding.n_vocab)
        classifier.load_state_dict(kept["classifier"])
        return classifier.to(device).reward
    path = Path(kept["reward_path"])
    if not path.is_file() or path.read_text(encoding="utf-8") != kept["reward_source"]:
        path = Path(tempfile.mkdtemp(), path.name)
        path.write_text(kept["reward_source"], encoding="utf-8")
    return OwnReward(RewardFile(path), encoding, cache)


def respond(prompt: str, world, models: list, seed: int) -> str:
    """Return three responses of each model to the prompt of --sample, with the models in memory."""
    encoding = world.text.encoding
    device = world.reference.wte.weight.device
    text = sample_text(encoding, world.prompt.to(device), world.reward, models,
                       world.settings.text.length, seed)
    return unseen_note(prompt, encoding, seen_tokens(world.text)) + text


def seen_tokens(text) -> torch.Tensor:
    """Return whether each token (V,) occurs in the texts that the reference was trained on."""
    seen = torch.zeros(text.encoding.n_vocab, dtype=torch.bool)
    seen[text.tokens.flatten()] = True
    return seen


def unseen_note(prompt: str, encoding: tiktoken.Encoding, seen: torch.Tensor) -> str:
    """Return a line with the words that have a token which is not in the texts; else nothing."""
    unseen = []
    for i, word in enumerate(prompt.split()):
        ids = encoding.encode_ordinary(word if i == 0 else f" {word}")
        if not seen[ids].all():
            unseen.append(word)
    if not unseen:
        return ""
    return f"Never seen in the texts: {', '.join(unseen)}\n"
