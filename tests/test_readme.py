"""The README: its programs run, and it stays short enough to be read to its end."""
import re

import torch
from running import HERE

import vbon

README = (HERE / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readme_stays_short():
    assert len(README.split()) <= 2400
    assert max(len(line) for line in README.splitlines()) <= 140


def test_the_programs_of_ones_own_run_and_come_near_best_of_4(finished_run, monkeypatch, capsys):
    """With a reward that the barely trained model of a quick run can earn."""
    first, second = [text for text in PROGRAMS if "vbon." in text]
    short = "-(response != policy.eot).sum(-1)"
    assert short in second
    monkeypatch.chdir(finished_run)
    names = {}
    exec(first.replace('"--n", "4"', '"--quick", "--n", "2", "--out", "out"'), names)
    printed = capsys.readouterr().out
    assert printed.count("tensor(") == 3                # F, log π_bon, log π_θ
    torch.manual_seed(0)
    exec(second.replace(short, "(response % 7).double().mean(-1)"), names)
    reward_fn = names["reward_fn"]
    ref_rewards = reward_fn(names["x"], names["ref_response"])
    response, _ = names["policy"].sample(names["x"], 200, 24)
    wins = vbon.win_rate(reward_fn(names["x"], response), ref_rewards).mean().item()
    assert 0.65 < wins < 0.9                            # best of 4: .8
