"""The built-in reviews, and reviews in folders."""
import hashlib
import os

import pytest

from support import reviews as reviews_file
from support.files import UnusableInput
from support.reviews import builtin_reviews, load_reviews

# --------------------------------------------------------------------------------- built-in reviews

def test_a_seed_always_gives_the_same_reviews():
    assert builtin_reviews(50, 1) == builtin_reviews(50, 1)
    assert builtin_reviews(50, 1) != builtin_reviews(50, 2)
    assert builtin_reviews(50, 1) == builtin_reviews(60, 1)[:50]
    # on every machine, so that results can be compared
    lines = "\n".join(f"{label} {text}" for text, label in builtin_reviews(1000, 0))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "b4bcf6a90dc12fbf"


def test_built_in_reviews_are_different_and_balanced():
    reviews = builtin_reviews(4000, 1)
    assert len({text for text, _ in reviews}) > 3900
    assert 0.45 < sum(label for _, label in reviews) / 4000 < 0.55


def test_labels_of_built_in_reviews_are_the_right_way_round():
    reviews = builtin_reviews(4000, 1)
    praised = [label for text, label in reviews if "superb" in text and "awful" not in text]
    blamed = [label for text, label in reviews if "awful" in text and "superb" not in text]
    assert sum(praised) / len(praised) > 0.75
    assert sum(blamed) / len(blamed) < 0.25

# ------------------------------------------------------------------------------ reviews in a folder

PRAISE = [f"good film number {i}" for i in range(120)]
BLAME = [f"bad film number {i}" for i in range(110)]


def write_lines(folder, positive, negative):
    """One review a line."""
    folder.mkdir(exist_ok=True)
    (folder / "pos.txt").write_text("\n".join(positive) + "\n", encoding="utf-8")
    (folder / "neg.txt").write_text("\n".join(negative) + "\n", encoding="utf-8")
    return folder


def write_files(folder, positive, negative):
    """One review a file."""
    for name, texts in (("pos", positive), ("neg", negative)):
        (folder / name).mkdir(parents=True)
        for i, text in enumerate(texts):
            (folder / name / f"{i}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("write", [write_lines, write_files])
def test_labels_are_the_right_way_round_in_both_layouts(tmp_path, write):
    reviews = load_reviews(write(tmp_path / "data", PRAISE, BLAME))
    assert sorted(reviews) == sorted([(text, 1) for text in PRAISE] + [(text, 0) for text in BLAME])


def test_hidden_files_are_ignored(tmp_path):
    folder = write_files(tmp_path / "data", PRAISE, BLAME)
    (folder / "pos" / "._0.txt").write_bytes(b"\xff\xfe not a review")
    assert len(load_reviews(folder)) == 230


def test_repeated_reviews_and_empty_lines_are_removed(tmp_path):
    again = [text.upper() for text in PRAISE[:5]] + ["", "   "] + [f"  {PRAISE[7]} "]
    assert len(load_reviews(write_lines(tmp_path, PRAISE + again, BLAME))) == 230


def test_a_text_with_both_labels_is_dropped(tmp_path, capsys):
    reviews = load_reviews(write_lines(tmp_path, PRAISE + ["So So"], BLAME + ["so so"]))
    assert len(reviews) == 230
    assert "1 texts have both labels" in capsys.readouterr().out


@pytest.mark.parametrize("mark", ["<br>", "<br />", "<br/>", "<BR>", "< br >", "</br>"])
def test_html_line_breaks_become_spaces(tmp_path, mark):
    reviews = load_reviews(write_lines(tmp_path, PRAISE + [f"one{mark}{mark}two"], BLAME))
    assert ("one two", 1) in reviews


def test_the_mark_of_some_editors_is_not_part_of_the_first_review(tmp_path):
    write_lines(tmp_path, PRAISE, BLAME)
    content = (tmp_path / "pos.txt").read_bytes()
    (tmp_path / "pos.txt").write_bytes(b"\xef\xbb\xbf" + content)
    assert (PRAISE[0], 1) in load_reviews(tmp_path)


def test_lines_may_end_as_on_windows(tmp_path):
    write_lines(tmp_path, PRAISE, BLAME)
    (tmp_path / "pos.txt").write_bytes("\r\n".join(PRAISE).encode("utf-8"))
    assert (PRAISE[0], 1) in load_reviews(tmp_path)


def test_a_long_review_is_cut(tmp_path):
    reviews = load_reviews(write_lines(tmp_path, PRAISE + ["long " * 1000], BLAME))
    assert max(len(text) for text, _ in reviews) == reviews_file.LONGEST


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UnusableInput, match="no such folder"):
        load_reviews(tmp_path / "nowhere")


def test_a_label_that_is_not_there_is_refused(tmp_path):
    write_lines(tmp_path, PRAISE, BLAME)
    (tmp_path / "neg.txt").unlink()
    with pytest.raises(UnusableInput, match="want neg.txt"):
        load_reviews(tmp_path)


def test_too_few_reviews_are_refused(tmp_path):
    write_lines(tmp_path, PRAISE, BLAME[:99])
    with pytest.raises(UnusableInput, match="99 different neg reviews, want at least 100"):
        load_reviews(tmp_path)
    write_lines(tmp_path, PRAISE, BLAME[:100])
    assert len(load_reviews(tmp_path)) == 220


def test_2000_characters_of_a_review_are_used(tmp_path):
    write_lines(tmp_path, ["x" * 2001, *PRAISE], BLAME)
    assert load_reviews(tmp_path)[0] == ("x" * 2000, 1)


def test_too_few_prompts_are_refused(tmp_path):
    lines = [f"text number {i}" for i in range(100)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    assert load_reviews(tmp_path, labelled=False) == [(line, 0) for line in lines]
    with pytest.raises(UnusableInput, match="want pos.txt"):
        load_reviews(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(lines[1:]), encoding="utf-8")
    with pytest.raises(UnusableInput, match="99"):
        load_reviews(tmp_path, labelled=False)


def test_text_that_is_not_utf_8_is_refused_with_its_place(tmp_path):
    write_lines(tmp_path, PRAISE, BLAME)
    (tmp_path / "neg.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UnusableInput, match=r"neg.txt: not UTF-8 text \(byte 3\)"):
        load_reviews(tmp_path)


@pytest.mark.parametrize("mark", ['<BR clear="all">', "<br style='x'/>", "<br\tid=1 >"])
def test_html_line_breaks_may_have_attributes(tmp_path, mark):
    reviews = load_reviews(write_lines(tmp_path, PRAISE + [f"one{mark}two <brand> three"], BLAME))
    assert ("one two <brand> three", 1) in reviews


def test_two_layouts_at_once_are_refused(tmp_path):
    write_files(tmp_path / "data", PRAISE, BLAME)
    write_lines(tmp_path / "data", PRAISE, BLAME)
    with pytest.raises(UnusableInput, match="both pos.txt and pos/"):
        load_reviews(tmp_path / "data")


@pytest.mark.parametrize("line", ['{"text": "good", "label": 1}', '  [{"text": 1}]'])
def test_lines_of_json_are_refused(tmp_path, line):
    write_lines(tmp_path, [line, *PRAISE], BLAME)
    with pytest.raises(UnusableInput, match="looks like JSON; want plain text"):
        load_reviews(tmp_path)


@pytest.mark.parametrize("name", ["reviews.csv", "reviews.jsonl"])
def test_a_file_of_another_kind_is_refused_with_what_is_wanted(tmp_path, name):
    (tmp_path / name).write_text("x", encoding="utf-8")
    with pytest.raises(UnusableInput, match="a file; want a folder with pos.txt and neg.txt"):
        load_reviews(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_says_so(tmp_path):
    write_lines(tmp_path / "data", PRAISE, BLAME)
    (tmp_path / "data").chmod(0)
    with pytest.raises(UnusableInput, match="Permission denied"):
        load_reviews(tmp_path / "data")
