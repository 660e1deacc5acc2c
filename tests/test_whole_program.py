"""The program as a process; and on a world that is small enough to enumerate.

The model of this world is a GPT-2 folder that only ever writes a, b, c and end-of-text. With three
tokens, each prompt has 40 responses of known probability: so all that the table estimates is known.
"""
import itertools
import os
import string
import subprocess
import sys
import time

import pytest
import torch
from running import HERE, read_lines, read_rows, run

import vbon
from model import GPT, response_mask
from support import options
from support.huggingface import load_model, save_model
from support.tokenizer import save_tokenizer, train_tokenizer


def start(folder, *args):
    """A process in a plain terminal, where each warning is an error."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
             "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "train.py", "--quick", "--n", "2", *args]
    return subprocess.Popen(command, cwd=folder, env=os.environ | plain, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_killed_run_ends_with_the_same_numbers(tmp_path):
    args = ("--steps", "20", "--out", "out")
    killed = start(tmp_path, *args)
    while killed.poll() is None and not list(tmp_path.glob("out/cache/*.checkpoint")):
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() < 0                            # it had not finished
    again = start(tmp_path, *args)
    printed, error = again.communicate(timeout=120)
    assert (again.returncode, error) == (0, "")
    assert "continuing after step" in printed
    assert printed.isascii()
    assert run("--quick", "--n", 2, "--steps", 20, "--out", "whole", cwd=tmp_path)[0] == 0
    assert read_rows(tmp_path / "out") == read_rows(tmp_path / "whole")


def test_unusable_input_is_status_2_and_one_line(tmp_path):
    done = start(tmp_path, "--device", "abacus")
    printed, error = done.communicate(timeout=120)
    assert (done.returncode, printed) == (2, "")
    assert error == "train.py: error: --device abacus: want cpu, cuda or mps\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        options.run(lambda: 1 / 0, "train.py")

# ------------------------------------------------------------------------- a world of 40 responses

EOT = 256
LETTERS = [97, 98, 99, EOT]
REWARD = """
def reward(prompts, responses):
    return [2 * y.count("a") - y.count("b") + (y == "cab") for y in responses]
"""


@torch.no_grad()
def write_world(folder):
    """The model, a vocabulary of single bytes, texts of two letters, and a reward file."""
    g = torch.Generator().manual_seed(0)
    model = GPT(257, 8, n_layer=1, n_head=2, n_embd=16, tied=False, generator=g)
    for p in model.parameters():
        p.add_(0.3 * torch.randn(p.shape, generator=g))
    # the first number of the last state is always 1; the head uses it to forbid other tokens
    model.ln_f.weight[0] = 0
    model.ln_f.bias[0] = 1
    model.lm_head.weight[:, 0] = -60
    model.lm_head.weight[LETTERS, 0] = 0
    save_model(model, folder / "world")
    save_tokenizer(train_tokenizer([], 257), folder / "world", 8)
    (folder / "texts").mkdir()
    for name, letters in (("pos", "klmno"), ("neg", "vwxyz")):
        lines = map("".join, itertools.product(string.ascii_lowercase, letters))
        (folder / "texts" / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "own.py").write_text(REWARD, encoding="utf-8")


def all_responses():
    """All 40 responses (1, 40, 3), padded with end-of-text, and their rewards (40,)."""
    letters = torch.tensor(LETTERS)
    strings = torch.cartesian_prod(letters, letters, letters)
    strings = strings.masked_fill(~response_mask(strings, EOT), EOT).unique(dim=0)
    texts = [bytes(i for i in ids if i != EOT).decode() for ids in strings.tolist()]
    names = {}
    exec(REWARD, names)
    return strings[None], torch.tensor(names["reward"](None, texts)).double()


@torch.no_grad()
def exact_rows(prompt, reference, policy, n):
    """What the table estimates, for one prompt: a tensor for each method."""
    response, reward = all_responses()
    ref = reference.logprob(prompt, response)[0].exp()
    assert ref.sum().item() == pytest.approx(1, abs=1e-5)
    lower = ref @ (reward[:, None] < reward).double()
    at_most = ref @ (reward[:, None] <= reward).double()
    # equation (4), with the exact F
    bon = vbon.bon_logprob_ties(ref.log(), lower.log(), at_most.log(), n).exp()
    rows = []
    for prob in (ref, bon, policy.logprob(prompt, response)[0].exp()):
        rows.append(torch.stack([
            prob @ reward, prob @ (lower + at_most) / 2, prob @ (prob / ref).log(),
            prob @ (prob / bon).log(), prob @ (reward > 0).double(),
            prob @ (response[0, :, 2] != EOT).double()]))
    return torch.stack(rows)


# three standard errors of 6 · 64 samples: the reward has a deviation of about 1.5, the rest of less
TOLERANCE = {"reward": 0.23, "win_rate": 0.045, "kl_ref": 0.06, "kl_bon": 0.08, "positive": 0.08,
             "cut": 0.08}


def test_the_table_says_what_enumeration_says(tmp_path):
    write_world(tmp_path)
    status, printed, error = run(
        "--n", 3, "--init", "world", "--data", "texts", "--reward", "own.py", "--lm-steps", 0,
        "--prompt-tokens", 1, "--length", 3, "--steps", 120, cwd=tmp_path)
    assert (status, error) == (0, "")
    reference = load_model(tmp_path / "world")
    policy = load_model(tmp_path / "out" / "policy-n3-seed0")
    records = read_lines(tmp_path / "out" / "responses-policy-n3-seed0.jsonl")
    prompts = sorted({record["prompt"] for record in records})
    assert len(prompts) == 6                            # a quarter of the 26 first letters
    exact = [exact_rows(torch.tensor([[ord(x)]]), reference, policy, 3) for x in prompts]
    rows = read_rows(tmp_path / "out")
    for row, means in zip(rows, torch.stack(exact).mean(0).tolist(), strict=True):
        # ± in the table is over prompts. Here the prompts are known, and what is left is the noise
        # of 64 samples of the policy, or 512 of the reference, to each of 6 prompts, and of F.
        for (name, tolerance), wanted in zip(TOLERANCE.items(), means, strict=True):
            assert row[name] == pytest.approx(wanted, abs=tolerance), (row["method"], name)
        assert None not in (row["data"], row["init"], row["reward_file"])
    # training has come most of the way, and was watched: a policy starts as its reference
    assert rows[0]["kl_bon"] > 0.3
    assert rows[2]["kl_bon"] < rows[0]["kl_bon"] / 4
    history = read_lines(tmp_path / "out" / "history-n3-seed0.jsonl")
    assert [row["step"] for row in history] == list(range(1, 121))
    assert history[0]["kl_ref"] == pytest.approx(0, abs=1e-5)
    assert history[0]["win_rate"] == pytest.approx(0.5, abs=0.1)
    assert history[-1]["kl_target"] == pytest.approx(0, abs=0.1)
