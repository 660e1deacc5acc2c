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
    assert (printed[1].count("\n"), printed[1].count("\r")) == (1, 89)
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
theory, n = 4         0.'''
ROWS = [
    dict(method="ref", n=4, reward=-0.1234, win_rate=0.5, win_rate_se=0.001, kl_ref=0, kl_ref_se=0,
         kl_bon=1.6, kl_bon_se=0.02, positive=0.25, samples_per_answer=1, cut=0.25),
    dict(method="bon", n=4, reward=12.345, win_rate=0.8, win_rate_se=0.002, kl_ref=0.6,
         kl_ref_se=0.01, kl_bon=0, kl_bon_se=0, positive=0.5, samples_per_answer=4, cut=0.01),
    dict(method="vbon", n=4, reward=11.12, win_rate=0.79, win_rate_se=0.003, kl_ref=0.61,
         kl_ref_se=0.011, kl_bon=0.05, kl_bon_se=0.006, positive=0.75, samples_per_answer=1,
         cut=0.01)]
LAST = ("with 1 sample a response.\nResponses that do not end within 24 tokens, but are cut: "
        "reference 25%, best of 4 1%, vBoN 1%.\n")


@pytest.mark.parametrize("held, theory, below, last", [
    (torch.arange(512)[None], "800         0.636         0.000\n\nKLs in nats per response; ± is ",
     [], LAST),
    # of 10 · 9 ordered pairs, 3 · 2 + 7 · 6 tie in the first row, 4 · 3 + 6 · 5 in the second
    (torch.tensor([[1.0] * 3 + [0.0] * 7, [1.0] * 4 + [0.0] * 6]),
     "765       too few         0.000\n\ntoo few: in theory, best of 4 keeps a handful of the 10",
     ["\n\nIn 50% of all pairs of reference responses, both have the same reward.\n\nKLs in"],
     LAST),
    (torch.ones(2, 80), "500         0.000         0.000\n", [],
     "\n\nAll rewards of a prompt are the same: there is nothing to learn.\n")])
def test_the_table_is_what_a_person_expects(held, theory, below, last, capsys):
    report.print_table(ROWS, held, 24)
    printed = capsys.readouterr().out
    assert printed.startswith(TABLE + theory)
    assert all(text in printed for text in below)
    assert printed.endswith(last)

# -------------------------------------------------------------------------------------- the picture

def test_the_picture_shows_the_numbers_of_the_table(tmp_path):
    g = torch.Generator().manual_seed(0)
    held_out = torch.randn(3, 512, generator=g).double()
    rewards = [mean + torch.randn(3, 40, generator=g) for mean in (0, 0.8, 1)]
    history = [{"kl_ref": i / 30, "win_rate": 0.5 + i / 30} for i in range(26)]
    with matplotlib.rc_context({"lines.linewidth": 7.0}):       # of a caller, who keeps it
        report.plot_run(tmp_path / "a.png", ROWS, rewards, held_out, history)
        with report.figure(tmp_path / "b.png", 2, (4, 2)) as (one, _):
            assert one.plot([1, 2])[0].get_linewidth() < 7
        assert matplotlib.rcParams["lines.linewidth"] == 7
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    left, right = Figure().subplots(1, 2)
    report.plot_rewards(left, ROWS, rewards)
    report.plot_path(right, ROWS, held_out, history)
    # left: the means of the table, and histograms
    assert [line.get_xdata()[0] for line in left.lines] == [-0.1234, 12.345, 11.12]
    span = (rewards[0].min().item() - 0.1, rewards[0].max().item() + 0.1)
    for patch, wanted in zip(left.patches, rewards, strict=True):
        heights, _ = torch.histogram(wanted.double(), 49, range=span, density=True)
        assert patch.get_xy()[:, 1].max() == pytest.approx(heights.max().item())
    # right: theory, the path by means of a dozen groups of updates, its end, and best of 4
    theory, path, end, four = [line.get_xydata() for line in right.lines]
    assert theory.tolist() == [list(bon_attains(held_out, n)) for n in range(1, 13)]
    means = [0, 0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.5, 14.5, 16.5, 18.5, 20.5, 22.5, 24.5]
    assert (30 * path[:, 0]).tolist() == pytest.approx(means)
    assert (30 * path[:, 1] - 15).tolist() == pytest.approx(means)
    assert (end.tolist(), four.tolist()) == ([[0.61, 0.79]], [[0.6, 0.8]])
    assert [text.get_text() for text in right.texts] == ["4", "8"]
    assert [list(text.xy) for text in right.texts] == theory[[3, 7]].tolist()
    assert report.group_means([5.0, 7.0]) == [5.0, 5.0, 7.0]
