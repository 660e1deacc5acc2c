"""The whole program on a world that is small enough to enumerate: its table must say what is true.

The model is a GPT-2 folder that only ever writes a, b, c and end-of-text. With three tokens, each
prompt has 40 responses. Their probabilities are known, and so is all that the table estimates.
"""
import itertools
import json
import string

import pytest
import torch

import vbon
from model import GPT
from support.huggingface import load_model, save_model
from running import read_rows, run

REWARD = """
def reward(prompts, responses):
    return [score(response) for response in responses]

def score(text):
    return 2 * text.count("a") - text.count("b") + (text == "cab")
"""
EOT = 256
LETTERS = [97, 98, 99, EOT]


def score(text):
    return 2 * text.count("a") - text.count("b") + (text == "cab")


def write_world(folder):
    """The model, a vocabulary of single bytes, prompts, and a reward file."""
    g = torch.Generator().manual_seed(0)
    model = GPT(257, 8, n_layer=1, n_head=2, n_embd=16, tied=False, generator=g)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
        # the first number of the last state is always 1; the head uses it to forbid other tokens
        model.ln_f.weight[0] = 0
        model.ln_f.bias[0] = 1
        model.lm_head.weight[:, 0] = -60
        model.lm_head.weight[LETTERS, 0] = 0
    save_model(model, folder / "world")
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    vocabulary = {chr(b): b for b in printable}
    vocabulary |= {chr(256 + i): b for i, b in enumerate(others)}
    vocabulary["<|endoftext|>"] = EOT
    (folder / "world" / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "world" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    lines = [first + second for first in string.ascii_lowercase for second in "vwxyz"]
    (folder / "texts").mkdir()
    (folder / "texts" / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "own.py").write_text(REWARD, encoding="utf-8")


def all_responses():
    """All 40 responses (1, 40, 3), padded with end-of-text, and their rewards (40,)."""
    found = {}
    for ids in itertools.product(LETTERS, repeat=3):
        if EOT in ids:
            ids = ids[:ids.index(EOT) + 1]
        text = "".join(chr(i) for i in ids if i != EOT)
        found[ids + (EOT,) * (3 - len(ids))] = score(text)
    return torch.tensor(list(found))[None], torch.tensor(list(found.values())).double()


@torch.no_grad()
def distribution(model, prompt):
    """The probability of each of the 40 responses (40,)."""
    response, _ = all_responses()
    return model.double().logprob(prompt, response)[0].exp()


def exact_best_of(n, prob, reward):
    """π_bon by equation (4), with the exact F."""
    lower = (prob * (reward < reward[:, None])).sum(1)
    at_most = (prob * (reward <= reward[:, None])).sum(1)
    return vbon.bon_logprob_ties(prob.log(), lower.log(), at_most.log(), n).exp()


def exact_row(policy, ref, bon, reward):
    """What the table estimates, for one prompt."""
    lower = (ref * (reward < reward[:, None])).sum(1)
    wins = lower + (ref * (reward == reward[:, None])).sum(1) / 2
    return {"reward": policy @ reward, "win_rate": policy @ wins,
            "kl_ref": policy @ (policy / ref).log(), "kl_bon": policy @ (policy / bon).log(),
            "positive": policy @ (reward > 0).double()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of the whole program, and the exact rows: means over the held-out prompts."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    n = 3
    status, printed, error = run(
        "--n", n, "--init", "world", "--data", "texts", "--reward", "own.py", "--lm-steps", 0,
        "--prompt-tokens", 1, "--length", 3, "--steps", 120, cwd=folder)
    assert (status, error) == (0, "")
    # the held-out prompts are a quarter of the 26 first letters
    text = (folder / "out" / f"responses-policy-n{n}-seed0.jsonl").read_text(encoding="utf-8")
    reference = load_model(folder / "world")
    policy = load_model(folder / "out" / f"policy-n{n}-seed0")
    prompts = list(dict.fromkeys(json.loads(line)["prompt"] for line in text.splitlines()))
    _, reward = all_responses()
    exact = {"ref": [], "bon": [], "vbon": []}
    for letter in prompts:
        prompt = torch.tensor([[ord(letter)]])
        ref = distribution(reference, prompt)
        bon = exact_best_of(n, ref, reward)
        exact["ref"].append(exact_row(ref, ref, bon, reward))
        exact["bon"].append(exact_row(bon, ref, bon, reward))
        exact["vbon"].append(exact_row(distribution(policy, prompt), ref, bon, reward))
    return read_rows(folder / "out"), exact, printed, prompts


def test_the_world_is_as_described(world):
    rows, exact, printed, prompts = world
    assert len(prompts) == 6
    assert all_responses()[0].shape == (1, 40, 3)
    assert rows[0]["lm_steps"] == 0
    assert "both have the same reward" in printed


# three standard errors of 6 · 64 samples: the reward has a deviation of about 1.5, the rest of less
TOLERANCE = {"reward": 0.23, "win_rate": 0.045, "kl_ref": 0.06, "kl_bon": 0.08}


@pytest.mark.parametrize("method", ["ref", "bon", "vbon"])
@pytest.mark.parametrize("name", ["reward", "win_rate", "kl_ref", "kl_bon"])
def test_the_table_says_what_enumeration_says(method, name, world):
    rows, exact, _, _ = world
    row = {row["method"]: row for row in rows}[method]
    values = torch.stack([one[name] for one in exact[method]])
    # ± in the table is over prompts. Here the prompts are known, and what is left is the noise of
    # 64 samples of the policy, or 512 of the reference, to each of 6 prompts, and of F.
    assert row[name] == pytest.approx(values.mean().item(), abs=TOLERANCE[name])


def test_training_has_come_most_of_the_way(world):
    rows, exact, _, _ = world
    kl = {method: torch.stack([one["kl_bon"] for one in exact[method]]).mean().item()
          for method in exact}
    assert kl["ref"] > 0.3
    assert kl["vbon"] < kl["ref"] / 4
