"""Files of a run that people and other programs read: prompts, responses, the path of training."""
import json
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

from support.files import write_whole
from support.tokenizer import decode


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write one JSON object a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, text.encode("utf-8"))


def prompt_records(prompts: Tensor, encoding: tiktoken.Encoding) -> list[dict]:
    """Return the text and the tokens of each prompt (P, T)."""
    return [{"prompt_id": i, "prompt": decode(encoding, ids), "tokens": ids}
            for i, ids in enumerate(prompts.tolist())]


def response_records(method: str, use: str, prompts: Tensor, found: dict,
                     encoding: tiktoken.Encoding) -> list[dict]:
    """Return a record for each response: texts, reward, and log-probabilities in nats.

    found: response (P, K, L); reward, logprob, ref_logprob and token_kl (P, K). logprob is that of
    the method which sampled the response. The means over these records are the rows of the table.
    """
    names = ("reward", "logprob", "ref_logprob", "token_kl")
    numbers = {name: found[name].tolist() for name in names}
    rows = []
    for i, ids in enumerate(prompts.tolist()):
        prompt = decode(encoding, ids)
        for j, response in enumerate(found["response"][i].tolist()):
            row = {"method": method, "use": use, "prompt_id": i, "prompt": prompt,
                   "response": decode(encoding, response)}
            rows.append(row | {name: numbers[name][i][j] for name in names})
    return rows


def reference_records(world) -> list[dict]:
    """Return the records of the reference's responses to the held-out prompts."""
    rows = []
    for use, samples in (("estimates F", world.held_out), ("candidate", world.candidates)):
        found = {"response": samples.response, "reward": samples.reward,
                 "logprob": samples.logprob, "ref_logprob": samples.logprob,
                 "token_kl": torch.zeros_like(samples.logprob)}
        rows += response_records("ref", use, samples.prompt, found, world.text.encoding)
    return rows


def write_records(out: Path, name: str, world, evaluated: dict, history: list[dict]) -> str:
    """Write held-out prompts, all responses of the evaluation, and the history of training.

    name: that of the run, such as "n4-seed0". Returns the size of the responses, to be printed.
    """
    seed = name.split("-")[1]
    encoding = world.text.encoding
    prompts = world.held_out.prompt
    write_lines(out / f"held-out-prompts-{seed}.jsonl", prompt_records(prompts, encoding))
    write_lines(out / f"history-{name}.jsonl",
                [{"step": i + 1} | stats for i, stats in enumerate(history)])
    size = 0
    for path, rows in ((out / f"responses-reference-{seed}.jsonl", reference_records(world)),
                       (out / f"responses-policy-{name}.jsonl",
                        response_records("vbon", "evaluation", prompts, evaluated, encoding))):
        write_lines(path, rows)
        size += path.stat().st_size if path.exists() else 0
    return f"{size / 1e6:.1f} MB"
