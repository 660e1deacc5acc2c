"""What is said before the work begins."""
import argparse
import re

import pytest
import torch
from running import run

import train
import vbon
from model import GPT
from support.announce import announce, describe_cost, operations, wins_of_target
from support.text import Text

NOTHING = argparse.Namespace(quick=False, m=None)


@pytest.mark.parametrize("n, m, win", [(4, 2, 0.725), (4, 8, 0.785), (4, 16, 0.793)])
def test_few_reference_samples_make_a_weak_target(n, m, win):
    assert wins_of_target(n, m) == pytest.approx(win, abs=5e-4)


def test_the_win_rate_of_the_target_is_that_of_a_simulation():
    """E log F̂ over 50,000 prompts, with M = 5, and what the tilt by it wins."""
    u = (torch.arange(400) + 0.5).double() / 400
    refs = torch.rand(50_000, 5, generator=torch.Generator().manual_seed(0)).double()
    log_cdf = vbon.empirical_cdf(u.expand(50_000, 400), refs).log().mean(0)
    weight = (7 * log_cdf).softmax(0)
    assert wins_of_target(8, 5) == pytest.approx((weight @ u).item(), abs=2e-3)


def test_many_reference_samples_give_the_target_of_best_of_n():
    assert wins_of_target(4, 2000) == pytest.approx(0.8, abs=2e-4)


def test_a_small_m_is_announced():
    small = GPT(10, 4)
    settings = train.Settings()
    assert announce(settings, small, 8, NOTHING) == []
    note, = announce(settings.change(m=2), small, 4, NOTHING)
    assert note == ("M = 2 is small for n = 4: even a perfect policy would win only 0.725 (0.800 by "
                    "best of 4); raise --m")


def test_the_run_announces_it(tmp_path):
    _, printed, _ = run("--quick", "--n", 4, "--m", 2, cwd=tmp_path)
    assert printed.startswith("M = 2 is small for n = 4")


def test_a_large_model_says_what_it_takes():
    with torch.device("meta"):
        large = GPT(50257, 1024, 12, 12, 768)           # 124 M weights: 0.5 GB
    note, = announce(train.Settings(), large, 4, NOTHING)
    assert note == "this model needs about 4 GB of memory, and 2 GB on the disk"


def test_the_operations_of_a_run_are_counted_weight_by_weight():
    """One weight in a linear layer more is that many operations more."""
    text = Text(None, 24, 0.0, 24, *[None] * 4, torch.zeros(512, 4), torch.zeros(64, 4))
    settings = train.Settings()
    model = GPT(768, 28, 2, 2, 64)
    count = operations(settings, model, text)
    weights = 2 * (12 * 64 ** 2 + 13 * 64) + 128 + 768 * 64         # with biases and norms
    passes = (6 * 1000 * 64                             # the reference model
              + 2 * (512 * 64 + 2 * 64 * 512)           # reference samples
              + 10 * 90 * 64 * 8                        # updates
              + 8 * 64 * 64)                            # the evaluation
    assert count == 28 * weights * passes
    model.untie_head()
    assert operations(settings, model, text) == count
    assert operations(settings, model, text, policies=3) > 2 * count / 3


def test_the_cost_is_said_with_a_time():
    line = describe_cost(4.1e12, torch.device("cpu"))
    assert re.fullmatch(r"cost: 4.1 TFLOP at most, (some \d+ minutes|about a minute) here", line)
    hours = describe_cost(7e15, torch.device("cpu"))
    assert int(hours.split("some ")[1].split()[0].replace(",", "")) > 60
