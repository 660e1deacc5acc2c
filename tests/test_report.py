"""What a person reads and looks at: progress lines, the table, the picture."""
import contextlib
import io
import time

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure

from support import report
from support.statistics import bon_attains

# ---------------------------------------------------------------------------------- progress lines

class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


def test_progress_is_one_line_in_a_terminal_and_five_in_a_file():
    printed = []
    for file in (io.StringIO(), Terminal()):
        with contextlib.redirect_stdout(file):
            for done in range(1, 91):
                report.show_progress("vBoN n=4", done, 90, time.monotonic(), {"win_rate": 0.5})
        printed.append(file.getvalue())
    lines = printed[0].splitlines()
    assert [line.split()[2] for line in lines] == ["1/90", "23/90", "45/90", "68/90", "90/90"]
    assert lines[1] == "  vBoN n=4 23/90  win_rate 0.50  0 of 0 s"
    assert printed[1].count("\n") == 1
    assert printed[1].count("\r") == 89
    assert {len(line) for line in printed[1].replace("\n", "\r").split("\r")} == {0, 79}


def test_in_a_file_a_line_comes_at_least_every_30_seconds(monkeypatch, capsys):
    """Each step takes 7 seconds."""
    monkeypatch.setitem(report._last_line, "at", 0.0)
    now = iter(range(7, 100_000, 7))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    for done in range(1, 25):
        report.show_progress("slow", done, 1000, 0.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{i}/1000" for i in (1, 6, 11, 16, 21)]
    assert lines[1] == "  slow 6/1000  42 of 7000 s"

# --------------------------------------------------------------------------------------- the table

TABLE = '''
               reward     win rate     KL to ref     KL to BoN positive samples
reference      -0.123 0.500 ±0.001  0.000 ±0.000  1.600 ±0.020     0.25       1
best of 4        12.3 0.800 ±0.002  0.600 ±0.010  0.000 ±0.000     0.50       4
vBoN             11.1 0.790 ±0.003  0.610 ±0.011  0.050 ±0.006     0.75       1
theory, n = 4         0.765       too few         0.000

too few: in theory, best of 4 keeps a handful of the 10 samples of a prompt, not enough
to estimate a KL.

In 50% of all pairs of reference responses, both have the same reward.
'''


def table_rows(cut):
    names = ("reward", "win_rate", "win_rate_se", "kl_ref", "kl_ref_se", "kl_bon", "kl_bon_se",
             "positive", "samples_per_answer")
    values = {"ref": (-0.1234, 0.5, 0.001, 0.0, 0.0, 1.6, 0.02, 0.25, 1),
              "bon": (12.345, 0.8, 0.002, 0.6, 0.01, 0.0, 0.0, 0.5, 4),
              "vbon": (11.12, 0.79, 0.003, 0.61, 0.011, 0.05, 0.006, 0.75, 1)}
    return [{"method": method, "n": 4, "cut": cut} | dict(zip(names, row))
            for method, row in values.items()]


def test_the_table_is_what_a_person_expects(capsys):
    held = torch.tensor([[1.0] * 3 + [0.0] * 7, [1.0] * 4 + [0.0] * 6])
    report.print_table(table_rows(0.25), held, 24)
    printed = capsys.readouterr().out
    assert printed.startswith(TABLE)
    assert printed.endswith("Responses that do not end within 24 tokens, but are cut: reference "
                            "25%, best of 4 25%, vBoN 25%.\n")
    assert max(len(line) for line in TABLE.splitlines()[:6]) <= 80


def test_a_table_without_ties_has_the_kl_of_the_theory_and_no_notes(capsys):
    report.print_table(table_rows(0.01), torch.arange(512)[None], 24)
    printed = capsys.readouterr().out
    assert "theory, n = 4         0.800         0.636         0.000\n\nKLs in nats" in printed
    assert printed.endswith("with 1 sample a response.\n")


def test_a_constant_reward_is_noted_below_the_table(capsys):
    report.print_table(table_rows(0.0), torch.ones(2, 80), 24)
    assert capsys.readouterr().out.endswith("\n\nAll rewards of a prompt are the same: there is "
                                            "nothing to learn.\n")

# -------------------------------------------------------------------------------------- the picture

def test_the_picture_shows_the_numbers_of_the_table(tmp_path):
    g = torch.Generator().manual_seed(0)
    held_out = torch.randn(3, 512, generator=g).double()
    rewards = [torch.randn(3, 40, generator=g), 0.8 + torch.randn(3, 10, generator=g),
               1 + torch.randn(3, 20, generator=g)]
    rows = [{"method": method, "n": 4, "reward": i / 10, "kl_ref": i / 20, "win_rate": 0.5 + i / 10}
            for i, method in enumerate(["ref", "bon", "vbon"])]
    history = [{"kl_ref": i / 30, "win_rate": 0.5 + i / 30} for i in range(5)]
    matplotlib.rcParams["lines.linewidth"] = 7.0        # of a caller: neither used nor changed
    try:
        report.plot_run(tmp_path / "a.png", rows, rewards, held_out, history)
        with report.figure(tmp_path / "b.png", 2, (4, 2)) as (one, _):
            assert one.plot([1, 2])[0].get_linewidth() < 7
        assert matplotlib.rcParams["lines.linewidth"] == 7
    finally:
        matplotlib.rcdefaults()
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    left, right = Figure().subplots(1, 2)
    report.plot_rewards(left, rows, rewards)
    report.plot_path(right, rows, held_out, history)
    # left: the means of the table
    assert [line.get_xdata()[0] for line in left.lines] == [0.0, 0.1, 0.2]
    # and histograms of the rewards
    low = rewards[0].min().item() - 0.1
    high = rewards[0].max().item() + 0.1
    for patch, wanted in zip(left.patches, rewards, strict=True):
        heights, _ = torch.histogram(wanted.double(), 49, range=(low, high), density=True)
        assert patch.get_xy()[:, 1].max() == pytest.approx(heights.max().item())
    # right: theory, the policy's path, where it ended, and best of 4
    theory, path, end, four = [line.get_xydata().tolist() for line in right.lines]
    assert theory == [list(bon_attains(held_out, n)) for n in range(1, 13)]
    assert path == [[i / 30, 0.5 + i / 30] for i in (0, 0, 1, 2, 3, 4)]
    assert [text.get_text() for text in right.texts] == ["2", "4", "8"]
    assert [list(text.xy) for text in right.texts] == [theory[1], theory[3], theory[7]]
    assert end == [[0.1, 0.7]]
    assert four == [[0.05, 0.6]]
    low, high = right.get_xlim()
    assert low < 0 and high == pytest.approx(2 * 0.05 + 0.1)


def test_a_path_is_smoothed_by_the_means_of_a_dozen_groups():
    assert report.group_means([5.0, 7.0]) == [5.0, 5.0, 7.0]
    means = report.group_means([float(i) for i in range(26)])
    assert (means[:3], means[-1], len(means)) == ([0.0, 0.5, 2.5], 24.5, 14)
