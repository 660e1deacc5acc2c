"""The README: its program runs, and it stays short enough to be read to its end."""
import re

import torch
from running import HERE

import vbon

README = (HERE / "README.md").read_text(encoding="utf-8")


def test_the_readme_stays_short():
    assert len(README.split()) <= 2200


def test_the_program_of_ones_own_comes_near_best_of_4(finished_run, monkeypatch):
    """With a reward that the barely trained model of a quick run can earn."""
    program, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for old, new in (('"--n", "4"', '"--quick", "--n", "2", "--out", "out"'),
                     ("-(response != policy.eot).sum(-1)", "(response % 7).double().mean(-1)")):
        assert old in program
        program = program.replace(old, new)
    monkeypatch.chdir(finished_run)
    torch.manual_seed(0)
    names = {}
    exec(program, names)
    ref_rewards = names["reward_fn"](names["x"], names["ref_response"])
    response, _ = names["policy"].sample(names["x"], 200, 24)
    wins = vbon.win_rate(names["reward_fn"](names["x"], response), ref_rewards).mean().item()
    assert 0.65 < wins < 0.9                            # best of 4: .8
