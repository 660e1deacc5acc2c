"""What a run leaves: the lines of results.jsonl, and trained models as Hugging Face folders."""
import argparse
import json
import uuid
from pathlib import Path

import tiktoken

from model import GPT
from support.code import code_of_module
from support.digest import digest, weights
from support.files import UnusableInput, read_json
from support.files import lock, replace_folder, write_whole
from support.huggingface import save_generation_config, save_model
from support.processes import rank
from support.tokenizer import save_tokenizer

# every line of results.jsonl has these metrics, and newer ones a few more
ALWAYS = ("reward", "reward_se", "win_rate", "win_rate_se", "kl_ref", "kl_ref_se", "kl_bon",
          "kl_bon_se", "positive", "samples_per_answer", "seconds")
KEYS = ("method", "n", "seed", "beta", *ALWAYS)
METRICS = (*ALWAYS, "cut", "theory_win_rate", "theory_kl", "decoded_win_rate",
           "decoded_win_rate_se")

# -------------------------------------------------------------------------------- results.jsonl

def read_results(out: Path) -> list[dict]:
    """Return the lines of results.jsonl in the folder `out`; none if there is no such file.

    Raises UnusableInput if one of the lines is not a result.
    """
    path = out / "results.jsonl"
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
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
    """Append rows to results.jsonl. A row replaces an older one with the same settings."""
    with lock(out):
        kept = {}
        for row in read_results(out) + rows:
            name = json.dumps(settings_of(row), sort_keys=True)
            # metrics that only the older one has, stay
            kept[name] = kept.get(name, {}) | row
        lines = [json.dumps(row) + "\n" for row in kept.values()]
        write_whole(out / "results.jsonl", "".join(lines).encode("utf-8"))


def settings_of(row: dict) -> dict:
    """Return the settings that made a row: everything but its metrics."""
    return {name: value for name, value in row.items() if name not in METRICS}


def describe(settings, text, inputs, stages: tuple) -> dict:
    """Return all that a result depends on besides method, N, β and seed: a part of its line.

    stages: the functions and the names of the modules whose code made it.
    """
    own_reward = inputs.own_reward
    pretrained = inputs.pretrained
    return settings.flat() | {
        # a small text may have fewer tokens and prompts than the settings ask for
        "vocab": text.encoding.n_vocab,
        "prompts": len(text.prompts),
        "held_prompts": len(text.held_prompts),
        "data": inputs.reviews and digest(inputs.reviews),
        # of a model that a run left: the "weights" in its settings.json
        "init": pretrained and digest(weights(pretrained.model)),
        "init_vocabulary": pretrained and digest(pretrained.encoding),
        "reward_file": own_reward and digest(own_reward),
        "device": inputs.device.type,
        "quick": inputs.quick,
        "code": code_mark(stages),
    }


def code_mark(stages: tuple) -> str:
    """Return a short name for code: functions, and modules by their names."""
    return digest([code_of_module(x) if isinstance(x, str) else x for x in stages])

# ------------------------------------------------------------------------------ folders of models

def check_folders(args: argparse.Namespace, folders: list[Path]) -> None:
    """Refuse, before any work, to overwrite a model that --init reads, or that is not ours."""
    if args.sample is not None:
        return                                          # such a run writes no models
    for folder in folders:
        if not folder.exists():
            continue
        if args.init is not None and Path(args.init).resolve() == folder.resolve():
            raise UnusableInput(f"--init {args.init}: this run would overwrite it; give another "
                                f"--out")
        if not (folder / "settings.json").is_file():
            raise UnusableInput(f"{folder}: not made by this program; move it away")
        read_json(folder / "settings.json")             # if it is damaged, say so now


def export_model(folder: Path, model: GPT, encoding: tiktoken.Encoding, row: dict,
                 paths: dict | None = None) -> None:
    """Write a Hugging Face folder: model, tokenizer, and settings.json with the settings of `row`.

    paths: those on the command line, as they were given; settings.json names them too.

    With its generation_config.json, transformers samples from the model's own distribution.

    The folder is written under a temporary name next to it, and then renamed. It replaces an older
    one.
    """
    if rank() != 0:
        return
    out = folder.parent
    folder = folder.resolve()                           # it may be a link to another disk
    new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.part")
    save_model(model, new)
    save_tokenizer(encoding, new, model.config["block_size"])
    save_generation_config(new, model, row["prompt_tokens"] + row["length"])
    settings = settings_of(row) | {"weights": digest(weights(model))} | (paths or {})
    content = json.dumps(settings, indent=2) + "\n"
    (new / "settings.json").write_text(content, encoding="utf-8")
    with lock(out):
        if folder.exists():
            if read_json(folder / "settings.json").get("weights") != settings["weights"]:
                print(f"  {out / folder.name} was made with other settings: it is replaced\n"
                      f"  (the command that made it makes it again)")
        replace_folder(new, folder)
