"""What a person reads and looks at: the table, progress lines, the picture."""
import contextlib
import io
import math
import time

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure

import vbon
from support import report

# ---------------------------------------------------------------------------------------- the table

TABLE = '''
               reward     win rate     KL to ref     KL to BoN positive samples
reference      -0.123 0.500 ±0.001  0.000 ±0.000  1.600 ±0.020     0.25       1
best of 4        12.3 0.800 ±0.002  0.600 ±0.010  0.000 ±0.000     0.50       4
vBoN             11.1 0.790 ±0.003  0.610 ±0.011  0.050 ±0.006     0.75       1
theory, n = 4         0.765                       0.000

In 50% of all pairs of reference responses, both have the same reward.
'''


def test_the_table_is_what_a_person_expects(capsys):
    metrics = ("reward", "win_rate", "win_rate_se", "kl_ref", "kl_ref_se", "kl_bon", "kl_bon_se",
               "positive", "samples_per_answer")
    values = {"ref": (-0.1234, 0.5, 0.001, 0.0, 0.0, 1.6, 0.02, 0.25, 1),
              "bon": (12.345, 0.8, 0.002, 0.6, 0.01, 0.0, 0.0, 0.5, 4),
              "vbon": (11.12, 0.79, 0.003, 0.61, 0.011, 0.05, 0.006, 0.75, 1)}
    rows = [{"method": method, "n": 4, "cut": 0.25} | dict(zip(metrics, row))
            for method, row in values.items()]
    # 3 right answers of 10, and 4 of 10: pairs that tie are (3·2 + 7·6) / 90 and (4·3 + 6·5) / 90
    held = torch.tensor([[1.0] * 3 + [0.0] * 7, [1.0] * 4 + [0.0] * 6])
    ties = (48 / 90 + 42 / 90) / 2
    assert report.share_of_ties(held) == pytest.approx(ties)
    # with 10 rewards, too few samples are left for a KL of best of 4
    kl, win = vbon.bon_attains(held, 4)
    assert math.isnan(kl)
    assert win == pytest.approx(0.765, abs=5e-4)
    report.print_table(rows, held, 24)
    printed = capsys.readouterr().out
    assert printed.startswith(TABLE)
    assert printed.endswith("Responses that do not end within 24 tokens, but are cut: reference "
                            "25%, best of 4 25%, vBoN 25%.\n")
    assert max(len(line) for line in TABLE.splitlines()) < 80


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


def progress(file):
    with contextlib.redirect_stdout(file):
        for done in range(1, 91):
            report.show_progress("vBoN n=4", done, 90, time.monotonic(), {"win_rate": 0.5})
    return file.getvalue()


def test_progress_is_one_line_in_a_terminal_and_four_in_a_file():
    lines = progress(io.StringIO()).splitlines()
    assert [line.split()[2] for line in lines] == ["23/90", "45/90", "68/90", "90/90"]
    assert lines[0].startswith("  vBoN n=4 23/90  win_rate 0.50  0 of 0 s")
    changes = progress(Terminal())
    assert changes.count("\n") == 1
    assert changes.count("\r") == 89
    assert {len(line) for line in changes.replace("\n", "\r").split("\r")} == {0, 79}


def test_the_time_that_is_left_is_told(capsys):
    report.show_progress("sampling", 1, 4, time.monotonic() - 10)
    assert capsys.readouterr().out == "  sampling 1/4  10 of 40 s\n"

# -------------------------------------------------------------------------------------- the picture

def test_the_picture_shows_the_numbers_of_the_table(tmp_path):
    g = torch.Generator().manual_seed(0)
    held_out = torch.randn(3, 512, generator=g).double()
    rewards = [torch.randn(3, 40, generator=g), 0.8 + torch.randn(3, 10, generator=g),
               1 + torch.randn(3, 20, generator=g)]
    rows = [{"method": method, "n": 4, "reward": i / 10, "kl_ref": i / 20, "win_rate": 0.5 + i / 10}
            for i, method in enumerate(["ref", "bon", "vbon"])]
    history = [{"kl_ref": i / 30, "win_rate": 0.5 + i / 30} for i in range(5)]
    report.plot_run(tmp_path / "a.png", rows, rewards, held_out, history)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    left, right = Figure().subplots(1, 2)
    report.plot_rewards(left, rows, rewards)
    report.plot_path(right, rows, held_out, history)
    # left: histograms of the rewards; their means, as in the table, are dotted lines
    assert [line.get_xdata()[0] for line in left.lines] == [0.0, 0.1, 0.2]
    # where two coincide, both are visible
    assert [line.get_ydata() for line in left.lines] == [[0, 1], [0.5, 1], [0, 0.5]]
    for patch, wanted in zip(left.patches, rewards):
        corners = patch.get_xy()
        area = 0.0
        moment = 0.0
        for (x, y), (next_x, _) in zip(corners, corners[1:]):
            if next_x > x and y > 0:                        # the top of a bin
                area += (next_x - x) * y
                moment += (next_x - x) * y * (x + next_x) / 2
        assert area == pytest.approx(1, abs=1e-6)
        inside = wanted[(wanted > rewards[0].min() - 0.1) & (wanted < rewards[0].max() + 0.1)]
        assert moment == pytest.approx(inside.mean().item(), abs=0.08)
    # right: theory, the policy's path, where it ended, and best of 4
    theory, path, end, four = [line.get_xydata().tolist() for line in right.lines]
    assert theory == [list(vbon.bon_attains(held_out, n)) for n in range(1, 13)]
    assert path == [[i / 30, 0.5 + i / 30] for i in (0, 0, 1, 2, 3, 4)]
    assert [text.get_text() for text in right.texts] == ["2", "4", "8"]
    assert [list(text.xy) for text in right.texts] == [theory[1], theory[3], theory[7]]
    assert end == [[0.1, 0.7]]
    assert four == [[0.05, 0.6]]
    low, high = right.get_xlim()
    assert low < 0 and high == pytest.approx(2 * 0.05 + 0.1)


def test_a_path_is_smoothed_by_the_means_of_a_dozen_groups():
    assert report.group_means([5.0, 7.0]) == [5.0, 5.0, 7.0]
    values = [float(i) for i in range(26)]
    means = report.group_means(values)
    assert means[:3] == [0.0, 0.5, 2.5]
    assert means[-1] == 24.5
    assert len(means) == 14


def test_a_plot_leaves_the_settings_of_the_caller_as_they_were(tmp_path):
    matplotlib.rcParams["lines.linewidth"] = 7.0
    try:
        before = dict(matplotlib.rcParams)
        with report.figure(tmp_path / "a.png", 2, (4, 2)) as (left, _):
            line, = left.plot([1, 2])
            assert line.get_linewidth() == matplotlib.rcParamsDefault["lines.linewidth"]
        assert dict(matplotlib.rcParams) == before
    finally:
        matplotlib.rcdefaults()
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_line_break_in_a_response_stays_in_its_row():
    assert report.one_line("two\nlines\r\nof text") == "two\\nlines\\nof text"


def test_in_a_file_a_line_comes_at_least_every_30_seconds(monkeypatch, capsys):
    monkeypatch.setitem(report._last_line, "at", 0.0)
    now = iter(range(0, 100_000, 7))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    for done in range(1, 101):
        report.show_progress("slow", done, 1000, 0.0)
    lines = capsys.readouterr().out.splitlines()
    at = [int(line.split()[2]) for line in lines]
    assert at[0] <= 35
    assert all(after - before == 35 for before, after in zip(at, at[1:]))


def test_a_constant_reward_is_said_below_the_table(capsys):
    row = {"method": "ref", "n": 2, "cut": 0.0, "reward": 1.0, "win_rate": 0.5, "win_rate_se": 0.0,
           "kl_ref": 0.0, "kl_ref_se": 0.0, "kl_bon": 0.0, "kl_bon_se": 0.0, "positive": 1.0,
           "samples_per_answer": 1}
    report.print_table([row], torch.ones(2, 8), 24)
    assert capsys.readouterr().out.endswith("\n\nAll rewards of a prompt are the same: there is "
                                            "nothing to learn.\n")
