"""results.jsonl: lines replace older ones with the same settings; damaged ones are refused."""
import pytest
from running import read_rows, run

from support import results
from support.results import KEYS

def test_the_same_command_replaces_its_rows(copied_run, finished_run):
    assert run("--quick", "--n", 2, cwd=copied_run)[0] == 0
    assert read_rows(copied_run / "out") == read_rows(finished_run / "out")


@pytest.mark.parametrize("args", [["--n", 3], ["--m", 20], ["--seed", 1], ["--steps", 4]])
def test_another_setting_keeps_older_rows(args, copied_run):
    before = read_rows(copied_run / "out")
    assert run("--quick", "--n", 2, *args, cwd=copied_run)[0] == 0
    after = read_rows(copied_run / "out")
    assert after[:3] == before
    assert [row["method"] for row in after[3:]] == ["ref", "bon", "vbon"]


def test_each_row_has_all_keys_and_what_made_it(finished_run):
    for row in read_rows(finished_run / "out"):
        assert set(KEYS) - {"seconds"} <= row.keys()
        assert row["m"] == 16
        assert len(row["code"]) == 12


DAMAGED = [b"not json", b"{}", b"[1]", b"", b"\xff\xfe", b'{"method": "ref"']


def test_a_row_takes_the_place_of_one_with_the_same_settings_in_any_order(tmp_path):
    row = {name: 1 for name in KEYS}
    results.add_results(tmp_path, [row, row | {"n": 2}])
    backwards = dict(reversed(row.items())) | {"reward": 7}
    results.add_results(tmp_path, [backwards])
    rows = [(r["n"], r["reward"]) for r in results.read_results(tmp_path)]
    assert rows == [(1, 7), (2, 1)]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_refused_by_its_number_and_stays(line, copied_run):
    path = copied_run / "out" / "results.jsonl"
    content = path.read_bytes() + line + b"\n"
    path.write_bytes(content)
    status, printed, error = run("--quick", "--n", 2, cwd=copied_run)
    assert status == 2
    assert "results.jsonl, line 4: not a result" in error
    assert error.count("\n") == 1
    assert printed == ""
    assert path.read_bytes() == content
