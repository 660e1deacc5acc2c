"""What a run leaves in its folder: lines of results, responses, models; and sampling from these."""
import argparse
import json
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

import vbon
from model import GPT
from reward import Classifier
from support.files import UnusableInput, write_json, write_lines, write_whole
from support.huggingface import load_model, save_model
from support.inputs import Inputs, choose_device
from support.kept import SOURCES, digest, load, save
from support.own_reward import OwnReward, RewardFile
from support.report import plot_run
from support.reviews import normalise
from support.sampling import seeded_generator
from support.settings import flat
from support.text import Text
from support.tokenizer import decode, pretrained_encoding, save_tokenizer

# the numbers in a line of results.jsonl that were measured; the others are settings
METRICS = ("reward", "reward_se", "win_rate", "win_rate_se", "kl_ref", "kl_ref_se", "kl_bon",
           "kl_bon_se", "positive", "samples_per_answer", "seconds", "cut", "decoded_win_rate",
           "decoded_win_rate_se")


def leave(args: argparse.Namespace, run, best: Tensor, made_by: dict) -> None:
    """Write everything that stays of a run of train.py, and print where it is.

    best (P, G): the rewards of best-of-n. made_by: the settings for the lines of results.jsonl.
    """
    out = Path(args.out)
    world = run.world
    encoding = world.text.encoding
    name = f"n{run.n}-seed{run.seed}"
    # the column beta is for methods in experiments/
    lines = [row | {"seed": run.seed, "beta": None} | made_by for row in run.rows]
    add_results(out, lines)
    rewards = [world.candidates.reward, best, run.evaluated["reward"]]
    plot_run(out / "vbon.png", run.rows, rewards, world.held_out.reward, run.history)

    # ---- responses: some to read, all to compute with
    prompts = world.held_out.prompt[:8].to(world.reference.wte.weight.device)
    some = sample_text(encoding, prompts, world.reward, world.reference, run.policy, run.n,
                       world.text.length, run.seed)
    text = f"The number before a response is its reward.\n\n{some}"
    write_whole(out / "samples.txt", text.encode("utf-8"))
    write_reference(out, world, run.seed)
    write_policy(out, f"policy-{name}", "vbon", world, run.evaluated)
    write_lines(out / f"history-{name}.jsonl",
                [{"step": i + 1} | stats for i, stats in enumerate(run.history)])

    # ---- the models, and what `sample_run` needs beside them
    kept = {"length": world.text.length}
    if args.reward is not None:
        kept["reward"] = str(Path(args.reward).resolve())
    else:
        kept["classifier"] = world.reward.__self__.state_dict()
    save(out / "cache" / f"run-{name}.pt", kept)
    given = {"given": {"data": args.data, "reward": args.reward, "init": args.init}}
    export_model(out / f"reference-seed{run.seed}", world.reference, encoding, lines[0] | given)
    export_model(out / f"policy-{name}", run.policy, encoding, lines[-1] | given)
    if args.quick:
        print("\n--quick shows only that the program runs: its models are hardly trained.")
    print(f"\n{out}/ holds the picture vbon.png, some responses in samples.txt and all in "
          f"responses-*.jsonl,\nthe policy in policy-{name}, the reference in "
          f"reference-seed{run.seed}")


def read_results(out: Path) -> list[dict]:
    """Return the lines of results.jsonl in the folder `out`, if any. Raises UnusableInput."""
    path = out / "results.jsonl"
    if not path.exists():
        return []
    try:
        # what follows the last line break is empty, or a line that was cut short
        return [dict(json.loads(line)) for line in path.read_bytes().split(b"\n")[:-1]]
    except (ValueError, TypeError):
        raise UnusableInput(f"{path}: a line is damaged; delete it, or move the file") from None


def add_results(out: Path, rows: list[dict]) -> None:
    """Add those rows to results.jsonl whose settings are not there already."""
    before = read_results(out)
    known = [settings_of(row) for row in before]
    new = [row for row in rows if settings_of(row) not in known]
    write_lines(out / "results.jsonl", before + new)


def settings_of(row: dict) -> dict:
    """Return the settings that made a row: everything but its metrics."""
    return {name: value for name, value in row.items() if name not in METRICS}


def describe(settings, text: Text, inputs: Inputs, quick: bool) -> dict:
    """Return all that a result depends on besides method, N, β and seed: a part of its line."""
    pretrained = inputs.pretrained
    return flat(settings) | {
        "data": inputs.reviews and digest(inputs.reviews),
        # of a model that a run left: the "weights" in its settings.json
        "init": pretrained and digest(pretrained.model.state_dict()),
        "init_vocabulary": pretrained and digest(pretrained.encoding),
        "reward_file": inputs.own_reward and digest(inputs.own_reward),
        "device": inputs.device.type,
        # a small text may have fewer tokens and prompts than the settings ask for
        "vocab": text.encoding.n_vocab, "length": text.length,
        "prompts": len(text.prompts), "held_prompts": len(text.held_prompts),
        "quick": quick, "code": digest(SOURCES),
    }


def write_reference(out: Path, world, seed: int) -> None:
    """Write the reference's responses to the held-out prompts."""
    rows = []
    for use, samples in (("estimates F", world.held_out), ("candidate", world.candidates)):
        more = {"ref_logprob": samples.logprob, "token_kl": 0 * samples.logprob}
        found = samples._asdict() | more
        rows += records("ref", use, world, found)
    write_lines(out / f"responses-reference-seed{seed}.jsonl", rows)


def write_policy(out: Path, name: str, method: str, world, found: dict) -> None:
    """Write a policy's responses in the evaluation."""
    write_lines(out / f"responses-{name}.jsonl", records(method, "evaluation", world, found))


def records(method: str, use: str, world, found: dict) -> list[dict]:
    """Return a record for each response: texts, reward, and log-probabilities in nats.

    found: response (P, K, L); reward, logprob (the method's), ref_logprob and token_kl (P, K).
    """
    numbers = {name: found[name].tolist()
               for name in ("reward", "logprob", "ref_logprob", "token_kl")}
    rows = []
    encoding = world.text.encoding
    for i, ids in enumerate(world.held_out.prompt.tolist()):
        prompt = decode(encoding, ids)
        for j, response in enumerate(found["response"][i].tolist()):
            row = {"method": method, "use": use, "prompt_id": i, "prompt": prompt,
                   "response": decode(encoding, response)}
            rows.append(row | {name: values[i][j] for name, values in numbers.items()})
    return rows


def sample_text(encoding: tiktoken.Encoding, prompts: Tensor, reward_fn, reference: GPT,
                policy: GPT, n: int, length: int, seed: int) -> str:
    """Return each prompt (P, T), and responses of reference, best-of-n and policy with rewards."""
    room = reference.config["block_size"] - prompts.shape[1]
    blocks = [[one_line(decode(encoding, prompt)) + " ..."] for prompt in prompts.tolist()]
    models = (("reference", reference, 1), (f"best of {n}", reference, n), ("vBoN", policy, 1))
    for name, model, k in models:
        generator = seeded_generator(prompts.device, "answers", seed)
        response, _ = model.sample(prompts, k, min(length, room), generator)
        reward = reward_fn(prompts, response).cpu()
        best = vbon.best_of_n(reward, seeded_generator("cpu", "answers", seed)).tolist()
        for i, j in enumerate(best):
            words = one_line(decode(encoding, response[i, j].tolist()))
            blocks[i].append(f"  {name:<12}{reward[i, j]:+6.2f}  ...{words}")
    return "\n".join("\n".join(block) for block in blocks) + "\n"


def one_line(text: str) -> str:
    """Return a text with its line breaks written as \\n, so that it stays in its row."""
    return "\\n".join(text.splitlines())


def export_model(folder: Path, model: GPT, encoding: tiktoken.Encoding, row: dict) -> None:
    """Write a Hugging Face folder: model, tokenizer, and the settings of `row` in settings.json."""
    settings = settings_of(row) | {"weights": digest(model.state_dict())}
    # written last: a folder that has it is complete
    last = folder / "settings.json"
    last.unlink(missing_ok=True)
    save_model(model, folder, row["prompt_tokens"] + row["length"])
    save_tokenizer(encoding, folder, model.config["block_size"])
    write_json(last, settings)


@torch.no_grad()
def sample_run(args: argparse.Namespace) -> str:
    """Return three responses of each model of a finished run to --sample. Raises UnusableInput."""
    out = Path(args.out)
    name = f"n{args.n}-seed{args.seed}"
    folder = out / f"policy-{name}"
    kept = load(out / "cache" / f"run-{name}.pt")
    # the policy is written last
    if kept is None or not (folder / "settings.json").exists():
        found = ", ".join(sorted(path.name for path in out.glob("policy-n*"))) or "none"
        raise UnusableInput(f"--sample: {out} has no finished run with --n {args.n} --seed "
                            f"{args.seed} (policies: {found}); train.py without it makes one")
    device = choose_device(args.device)
    encoding = pretrained_encoding(folder)
    policy = load_model(folder).to(device)
    reference = load_model(out / f"reference-seed{args.seed}").to(device)
    ids = encoding.encode_ordinary(normalise(args.sample))
    room = policy.config["block_size"]
    if len(ids) >= room:
        raise UnusableInput(f"--sample: want fewer than {room} tokens, got {len(ids)}")
    if "classifier" in kept:
        classifier = Classifier(encoding.n_vocab)
        classifier.load_state_dict(kept["classifier"])
        reward_fn = classifier.to(device).reward
    else:
        reward_fn = OwnReward(RewardFile(kept["reward"]), encoding, out / "cache")
    prompt = torch.tensor(ids, device=device).repeat(3, 1)
    return sample_text(encoding, prompt, reward_fn, reference, policy, args.n, kept["length"],
                       args.seed)
