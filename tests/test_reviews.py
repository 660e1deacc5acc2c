"""The built-in reviews, and reviews in folders."""
import hashlib
import json

import pytest

from support.files import UnusableInput
from support.reviews import builtin_reviews, load_reviews

PRAISE = [f"good film number {i}" for i in range(120)]
BLAME = [f"bad film number {i}" for i in range(110)]
PRAISED = [(text, 1) for text in PRAISE]
BLAMED = [(text, 0) for text in BLAME]
SPACES = ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\t", "\u00a0",
          "<br>", "<br /><BR>", "< br >", "</br>", '<BR clear="all">', "<br\tid=1 >")


def write_lines(folder, **texts):
    """One text a line, in files of these names."""
    for name, lines in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")


def write_files(folder, **texts):
    """One text a file, in folders of these names."""
    for name, lines in texts.items():
        (folder / name).mkdir()
        for i, text in enumerate(lines):
            (folder / name / f"{i:03}.txt").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("seed, found", [(0, "b3daf84f57ef736f"), (101, "7dab7d0d8d5f2995")])
def test_a_seed_gives_the_same_reviews_on_every_machine(seed, found):
    reviews = builtin_reviews(500, seed)
    assert hashlib.sha256(json.dumps(reviews).encode()).hexdigest()[:16] == found
    assert builtin_reviews(50, seed) == reviews[:50]


def test_built_in_reviews_are_different_and_their_labels_the_right_way_round():
    reviews = builtin_reviews(4000, 1)
    assert len({text for text, _ in reviews}) > 3900
    assert 0.45 < sum(label for _, label in reviews) / 4000 < 0.55
    praised = [label for text, label in reviews if "superb" in text and "awful" not in text]
    blamed = [label for text, label in reviews if "awful" in text and "superb" not in text]
    assert sum(praised) / len(praised) > 0.75
    assert sum(blamed) / len(blamed) < 0.25


@pytest.mark.parametrize("write", [write_lines, write_files])
def test_both_layouts_give_the_same_reviews(tmp_path, write):
    write(tmp_path, pos=PRAISE, neg=BLAME)
    (tmp_path / "neg").mkdir(exist_ok=True)
    (tmp_path / "neg" / "._0.txt").write_bytes(b"\xff\xfe a hidden file")
    assert load_reviews(tmp_path) == PRAISED + BLAMED


@pytest.mark.parametrize("written, read", [
    *[(f"one{mark}two", "one two") for mark in SPACES], ("one<brand>two", "one<brand>two"),
    ("x" * 2001, "x" * 2000)])
def test_a_line_is_one_review(tmp_path, written, read):
    write_lines(tmp_path, pos=["", *PRAISE, f"  {written} ", read.upper()], neg=BLAME)
    assert load_reviews(tmp_path) == [*PRAISED, (read, 1), *BLAMED]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_as_on_any_system_and_files_begin_with_a_mark(tmp_path, end):
    write_lines(tmp_path, neg=BLAME)
    (tmp_path / "pos.txt").write_bytes(b"\xef\xbb\xbf" + end.join(PRAISE).encode("utf-8"))
    assert load_reviews(tmp_path) == PRAISED + BLAMED


def test_a_text_counts_once_with_its_first_label(tmp_path):
    write_lines(tmp_path, pos=[*PRAISE, "So So"], neg=[*BLAME, "so so", "SO SO"])
    assert load_reviews(tmp_path) == [*PRAISED, ("So So", 1), *BLAMED]


def test_texts_without_labels_will_do_if_none_are_needed(tmp_path):
    write_lines(tmp_path, texts=BLAME[:100], pos=[], neg=[])
    assert load_reviews(tmp_path, labelled=False) == BLAMED[:100]


def test_fewer_than_100_texts_are_refused(tmp_path):
    write_lines(tmp_path, pos=PRAISE[:100], neg=[*BLAME[:99], BLAME[0]])
    with pytest.raises(UnusableInput, match="want at least 100 different texts in neg, got 99"):
        load_reviews(tmp_path)


def test_a_folder_that_is_not_as_wanted_is_refused(tmp_path):
    write_lines(tmp_path, neg=BLAME, texts=PRAISE)
    for folder in ("nowhere", "neg.txt", "."):
        with pytest.raises(UnusableInput, match="either pos.txt, .* with --reward, texts.txt is"):
            load_reviews(tmp_path / folder)
    (tmp_path / "pos.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UnusableInput, match=r"pos.txt: not UTF-8 text \(byte 3\)"):
        load_reviews(tmp_path)
    write_files(tmp_path, pos=PRAISE)
    with pytest.raises(UnusableInput, match="either pos.txt, a text a line, or pos/"):
        load_reviews(tmp_path)
