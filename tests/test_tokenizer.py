"""The tokenizer: training, encoding, and the files of Hugging Face folders."""
import json

import pytest
import tiktoken._educational

from support.files import UnusableInput
from support.reviews import builtin_reviews
from support.tokenizer import (BYTE_LEVEL, END, PATTERN, WORDS, decode, encode, make_encoding,
                               pretrained_encoding, save_tokenizer, train_tokenizer)

ODD = ["", " ", "a film", "naïve café", "日本語の映画", "🎬🍿", "tabs\t\n\n  and\r\n", "the other them",
       "'s don't 12_3__ !?", "\x00\u2028é", "x" * 50, "  two  spaces ", "a\u00a0b", "ǅ ʰ ² ½ Ⅷ",
       "मराठी ไทย", "e\u0301", "_", "'S 'T", "1٢3", "\u200d\u200b"]
TEXTS = [text for text, _ in builtin_reviews(300, 0)]

# ---------------------------------------------------------------------------------------- tokenizer

def test_every_string_comes_back_from_its_tokens(tmp_path):
    encoding = train_tokenizer(TEXTS, 400)
    assert (encoding.n_vocab, encoding.eot_token) == (400, 399)
    save_tokenizer(encoding, tmp_path)
    again = pretrained_encoding(tmp_path)
    for text in ODD + TEXTS[:3] + [END]:
        ids = encoding.encode_ordinary(text)
        assert encoding.decode(ids) == text
        assert encoding.eot_token not in ids
        assert again.encode_ordinary(text) == ids


def test_merges_are_those_of_another_program():
    text = "\n".join(TEXTS)
    theirs = tiktoken._educational.bpe_train(text, 290, PATTERN, visualise=None)
    ours = train_tokenizer([text], 291)                 # after that, two pairs tie
    assert [ours.decode_single_token_bytes(i) for i in range(290)] == list(theirs)


def test_a_text_that_runs_out_of_pairs_gives_fewer_tokens():
    assert train_tokenizer(["ab"], 1000).n_vocab == 258         # the bytes, one pair, the end
    assert train_tokenizer([], 1000).n_vocab == 257


def test_encode_truncates_and_pads_and_decode_leaves_out_the_end():
    encoding = train_tokenizer(["ab"], 300)             # "ab" is 256, the end is 257
    rows = encode(encoding, ["", "ab", "ababab"], 2)
    assert rows.tolist() == [[257, 257], [256, 257], [256, 256]]
    assert decode(encoding, [256, 99, 257, 257]) == "abc"

# --------------------------------------------------------------- tokenizers in Hugging Face folders

def write_vocabulary(folder, word):
    """GPT-2's two files: bytes, in the order of OpenAI's (printable ones first), one merge, END."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    letters = {b: chr(b) for b in printable}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + len(letters) - len(printable)))
    left, right = (letters[b] for b in word.encode("utf-8"))
    ids = {letter: i for i, letter in enumerate([*letters.values(), left + right, END])}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{left} {right}\n", encoding="utf-8")
    return ids


def test_a_folder_has_its_own_vocabulary(tmp_path):
    ids = write_vocabulary(tmp_path, " c")
    encoding = pretrained_encoding(tmp_path)
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == ("gpt2", 258, 257)
    assert encoding.encode_ordinary("x cy") == [ids["x"], 256, ids["y"]]
    for text in ODD:
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UnusableInput, match="merges.txt: No such file"):
        pretrained_encoding(tmp_path)


BYTES = {bytes([b]): b for b in range(256)}
SMALL = BYTES | {b"th": 256, b"he": 257, b"the": 258}
MERGES = [["t", "h"], ["h", "e"], ["th", "e"]]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_merge_is_the_last_pair_that_is_left_of_the_token(tmp_path):
    save_tokenizer(make_encoding(SMALL, "gpt2"), tmp_path)
    assert read(tmp_path / "tokenizer.json")["model"]["merges"] == MERGES
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8")
    assert lines == "#version: 0.2\nt h\nh e\nth e\n"


def test_a_token_that_no_two_tokens_make_is_refused(tmp_path):
    """tiktoken makes it of tokens that come later, Hugging Face never."""
    encoding = make_encoding(BYTES | {b"the": 256, b"th": 257})
    assert encoding.encode_ordinary("the") == [256]
    with pytest.raises(UnusableInput, match="no two tokens before 'the'"):
        save_tokenizer(encoding, tmp_path)


SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}
TEMPLATE = {"type": "TemplateProcessing", "single": [SEQUENCE], "pair": [], "special_tokens": {}}
PADDING = {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None,
           "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
SPLIT, BYTES_ONLY = WORDS["vbon"]["pretokenizers"]
ADDED = {"id": 259, "content": END, "special": True, "normalized": True, "single_word": False,
         "lstrip": False, "rstrip": False}


def test_a_saved_tokenizer_says_what_versions_of_transformers_take_for_granted(tmp_path):
    save_tokenizer(make_encoding(SMALL), tmp_path)
    assert read(tmp_path / "tokenizer.json")["added_tokens"] == [ADDED | {"normalized": False}]
    settings = read(tmp_path / "tokenizer_config.json")
    assert settings == settings | {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}


# Changes of a folder that we saved: the file and the place in it; the values there that change no
# id of a text, which other programs write; and the values that are refused. None removes the place.
FOREIGN = {
    "tokenizer.model.type": ([None], ["WordPiece"]),
    "tokenizer.model.vocab": ([], [None, {}]),
    "tokenizer.model.merges": ([["t h", "h e", "th e"]], [
        None, MERGES[:2], MERGES[::-1], MERGES + [["t", "he"]], [3]]),
    "tokenizer.model.dropout": ([0.0], [0.1]),
    "tokenizer.model.continuing_subword_prefix": ([""], ["##"]),
    "tokenizer.normalizer": ([], [{"type": "Lowercase"}]),
    "tokenizer.truncation": ([{"max_length": 4, "strategy": "LongestFirst", "stride": 0}], []),
    "tokenizer.padding": ([PADDING], [PADDING | {"strategy": {"Fixed": 4}},
                                            PADDING | {"pad_to_multiple_of": 8}]),
    "tokenizer.pre_tokenizer": ([BYTE_LEVEL, BYTE_LEVEL | {"use_regex": True}], [
        None, BYTE_LEVEL | {"use_regex": False}, BYTE_LEVEL | {"add_prefix_space": True}]),
    "tokenizer.pre_tokenizer.pretokenizers": ([], [
        [SPLIT], [SPLIT, BYTES_ONLY, {"type": "Digits"}], [SPLIT | {"invert": True}, BYTES_ONLY],
        [SPLIT | {"pattern": {"Regex": "x"}}, BYTES_ONLY]]),
    "tokenizer.post_processor": ([TEMPLATE, BYTE_LEVEL | {"add_prefix_space": True}], [
        TEMPLATE | {"special_tokens": {"[CLS]": {}}}, {"type": "BertProcessing"}]),
    "tokenizer.added_tokens": ([[ADDED]], [None, [], [ADDED, {"content": "!"}]]),
    "tokenizer_config.added_tokens_decoder": ([{"259": {"content": END}}],
                                              [{"258": {"content": "the"}}, 3]),
    "tokenizer_config.pad_token": ([None], ["!"]),
    "tokenizer_config.extra_special_tokens": ([{}], [{"image": "!"}, ["!"]]),
    "tokenizer_config.add_prefix_space": ([False], [True]),
    "tokenizer_config.add_bos_token": ([False], [True]),
    "vocab.the": ([], [257, 258.5, 260, "x", None, -1]),
    "vocab.<|endoftext|>": ([], [0]),
    "merges": (["#version: 0.2\nt h\nh e\nth e\n"], [
        "\n", "\nt h\nh e\n", "\nt h\nh e\nth e\na b\n", "\nt h\nh e\nth\n",
        "\nt h\nh e\nt h e\n", "\nt h\nh e\nth e", "t h\nh e\nth e\n"]),
}
CASES = []
for _place, (_right, _refused) in FOREIGN.items():
    CASES += [(_place, value, "right") for value in _right]
    CASES += [(_place, value, "refused") for value in _refused]


def write_foreign(folder, place, value):
    """Save a tokenizer, and change its files in one place. Of GPT-2's, leave its two old files."""
    name = "vbon" if place.startswith("tokenizer") else "gpt2"
    save_tokenizer(make_encoding(SMALL, name), folder)
    file, *keys = place.split(".")
    if name == "gpt2":
        (folder / "tokenizer.json").unlink()
    if file == "merges":
        (folder / "merges.txt").write_text(value, encoding="utf-8")
        return
    content = read(folder / f"{file}.json")
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    if value is None:
        del part[keys[-1]]
    (folder / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("place, value, outcome", CASES)
def test_a_foreign_tokenizer_is_read_right_or_refused(tmp_path, place, value, outcome):
    write_foreign(tmp_path, place, value)
    if outcome == "refused":
        with pytest.raises(UnusableInput) as error:
            pretrained_encoding(tmp_path)
        assert str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value)
        return
    if place != "merges":
        # other libraries, too, read the old files only where there is no tokenizer.json
        write_vocabulary(tmp_path, "ab")
    encoding = pretrained_encoding(tmp_path)
    is_gpt2 = place in ("merges", "tokenizer.pre_tokenizer")
    wanted = make_encoding(SMALL, "gpt2" if is_gpt2 else "vbon")
    assert (encoding.name, encoding.eot_token) == (wanted.name, 259)
    for text in ODD:
        assert encoding.encode_ordinary(text) == wanted.encode_ordinary(text)
