"""The tokenizer: training, encoding, and the files of Hugging Face folders."""
import json

import pytest
import tiktoken._educational

from support.files import UnusableInput
from support.reviews import builtin_reviews
from support.tokenizer import (PATTERN, decode, encode, make_encoding, pretrained_encoding,
                               save_tokenizer, train_tokenizer)

ODD = ["", " ", "a film", "naïve café", "日本語の映画", "🎬🍿", "tabs\t\n\n  and\r\n",
       "'s don't 12_3__ !?", "\x00\u2028é", "<|endoftext|>"]


def texts_of(count):
    return [text for text, _ in builtin_reviews(count, 0)]

# ---------------------------------------------------------------------------------------- tokenizer

@pytest.mark.parametrize("text", ODD + texts_of(3))
def test_every_string_comes_back_from_its_tokens(text):
    encoding = train_tokenizer(texts_of(300), 400)
    ids = encoding.encode_ordinary(text)
    assert encoding.decode(ids) == text
    assert encoding.eot_token not in ids


def test_the_end_is_the_last_of_as_many_tokens_as_asked_for():
    encoding = train_tokenizer(texts_of(300), 400)
    assert encoding.n_vocab == 400
    assert encoding.eot_token == 399


def test_merges_are_those_of_another_program():
    text = "\n".join(texts_of(300))
    theirs = tiktoken._educational.bpe_train(text, 290, PATTERN, visualise=None)
    ours = train_tokenizer([text], 291)                 # after that, two pairs tie
    assert [ours.decode_single_token_bytes(i) for i in range(290)] == list(theirs)


def test_a_text_that_runs_out_of_pairs_gives_fewer_tokens():
    assert train_tokenizer(["ab"], 1000).n_vocab == 258         # the bytes, one pair, the end
    assert train_tokenizer([], 1000).n_vocab == 257


def test_encode_truncates_and_pads():
    encoding = train_tokenizer(["ab"], 300)             # "ab" is 256, the end is 257
    rows = encode(encoding, ["", "ab", "ababab"], 2)
    assert rows.tolist() == [[257, 257], [256, 257], [256, 256]]


def test_decode_leaves_out_the_end():
    encoding = train_tokenizer(["ab"], 300)
    assert decode(encoding, [256, 99, 257, 257]) == "abc"

# ---- GPT-2's vocabulary files

def byte_letters():
    """How GPT-2's files write bytes, in the order of their ids: printable ones come first."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable}
    for i, b in enumerate(others):
        letters[b] = chr(256 + i)
    return letters


def write_vocabulary(folder, word, header="#version: 0.2\n", end="\n"):
    """A vocabulary of bytes, one merge, and the end."""
    letters = byte_letters()
    left, right = (letters[b] for b in word.encode("utf-8"))
    ids = {letter: i for i, letter in enumerate(letters.values())}
    ids |= {left + right: 256, "<|endoftext|>": 257}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_text(f"{header}{left} {right}{end}", encoding="utf-8")
    return ids


@pytest.mark.parametrize("header", ["#version: 0.2\n", ""])
@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("word", ["ab", " c"])
def test_a_folder_has_its_own_vocabulary(tmp_path, word, header, end):
    write_vocabulary(tmp_path, word, header, end)
    encoding = pretrained_encoding(tmp_path)
    assert encoding.n_vocab == 258
    assert encoding.eot_token == 257
    assert encoding.encode_ordinary(word) == [256]
    assert len(encoding.encode_ordinary("xy")) == 2
    for text in ODD:
        assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_ids_of_bytes_are_those_of_the_file(tmp_path):
    ids = write_vocabulary(tmp_path, "ab")
    encoding = pretrained_encoding(tmp_path)
    assert encoding.encode_ordinary("x") == [ids["x"]]


@pytest.mark.parametrize("changes", [
    {"ab": 255}, {"ab": 256.5}, {"<|endoftext|>": 256}, {"more": 258}, {"a": 300}, {"a": "x"},
    {"a": 66}, {"a": -1}, {"a": None}])
def test_wrong_ids_are_refused(tmp_path, changes):
    ids = write_vocabulary(tmp_path, "ab") | changes
    (tmp_path / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    with pytest.raises(UnusableInput, match="vocab.json"):
        pretrained_encoding(tmp_path)


@pytest.mark.parametrize("merges", ["x y\n", "a b\nx y\n", "", "a\n", "a b c\n"])
def test_merges_that_do_not_fit_the_vocabulary_are_refused(tmp_path, merges):
    write_vocabulary(tmp_path, "ab")
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    with pytest.raises(UnusableInput, match="vocab.json|merges.txt"):
        pretrained_encoding(tmp_path)


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_a_file_of_the_vocabulary_that_is_not_there_is_named(tmp_path, file):
    write_vocabulary(tmp_path, "ab")
    (tmp_path / file).unlink()
    with pytest.raises(UnusableInput, match=file):
        pretrained_encoding(tmp_path)

# --------------------------------------------------------------- tokenizers in Hugging Face folders

def change_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture()
def saved(tmp_path):
    """A small tokenizer of ours, and the folder that it was saved in."""
    encoding = train_tokenizer([text for text, _ in builtin_reviews(200, 0)], 400)
    save_tokenizer(encoding, tmp_path)
    return encoding, tmp_path


def test_a_saved_tokenizer_is_read_back_as_it_was(saved):
    encoding, folder = saved
    again = pretrained_encoding(folder)
    assert again.name == "vbon"
    assert again.token_byte_values() == encoding.token_byte_values()
    for text in ["", "the film was great .", "naïve 🎬", "tabs\t\n  x_1"]:
        assert again.encode_ordinary(text) == encoding.encode_ordinary(text)


def test_a_saved_tokenizer_says_how_transformers_shall_use_it(saved):
    encoding, folder = saved
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    del content["model"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
             "invert": False}
    assert content == {
        "version": "1.0",
        "added_tokens": [{"id": 399, "content": "<|endoftext|>", "special": True,
                          "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level]},
        "decoder": byte_level,
    }
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    end = "<|endoftext|>"
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast",
                        "clean_up_tokenization_spaces": False, "padding_side": "left",
                        "model_input_names": ["input_ids", "attention_mask"],
                        "bos_token": end, "eos_token": end, "unk_token": end, "pad_token": end}
    save_tokenizer(encoding, folder, 28)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["model_max_length"] == 28


def test_all_splits_of_a_token_are_listed_in_the_order_of_ids(saved):
    encoding, folder = saved
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocab = model["vocab"]
    ids = [vocab[left + right] for left, right in model["merges"]]
    assert ids == sorted(ids)
    listed = {tuple(pair) for pair in model["merges"]}
    for token in vocab:
        for cut in range(1, len(token)):
            if token[:cut] in vocab and token[cut:] in vocab and token != "<|endoftext|>":
                assert (token[:cut], token[cut:]) in listed


def test_merges_may_be_strings(saved):
    encoding, folder = saved

    def as_strings(content):
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    change_tokenizer(folder, as_strings)
    assert pretrained_encoding(folder).token_byte_values() == encoding.token_byte_values()


def test_gpt2s_own_pattern_is_known_by_its_kind(saved):
    _, folder = saved

    def as_gpt2(content):
        content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False}
    change_tokenizer(folder, as_gpt2)
    assert pretrained_encoding(folder).name == "gpt2"


def test_a_tokenizer_with_gpt2s_pattern_leaves_the_old_files_too(tmp_path):
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"abc": 257}
    save_tokenizer(make_encoding(ranks, "gpt2"), tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    again = pretrained_encoding(tmp_path)
    assert again.name == "gpt2"
    assert again.encode_ordinary("abc ab") == [257, 32, 256]


def pretokenizers(content):
    return content["pre_tokenizer"]["pretokenizers"]


CHANGES = {
    "another kind of model": lambda content: content["model"].update(type="WordPiece"),
    "an unknown pattern": lambda content: content["pre_tokenizer"].update(
        pretokenizers=[{"type": "Split", "pattern": {"Regex": "x"}}]),
    "no pattern": lambda content: content.update(
        pre_tokenizer={"type": "ByteLevel", "use_regex": False}),
    "no merges": lambda content: content["model"].pop("merges"),
    "a merge of three": lambda content: content["model"]["merges"].append(["a", "b", "c"]),
    "merges in another order": lambda content: content["model"]["merges"].reverse(),
    "one more token": lambda content: content["added_tokens"].append({"content": "[PAD]",
                                                                      "id": 400}),
    "an end that is not last": lambda content: content["added_tokens"][0].update(id=0),
    "no pre_tokenizer": lambda content: content.update(pre_tokenizer=None),
    "lower case": lambda content: content.update(normalizer={"type": "Lowercase"}),
    "a normal form": lambda content: content.update(normalizer={"type": "NFKC"}),
    "a space in front": lambda content: pretokenizers(content)[1].update(add_prefix_space=True),
    "a second pattern": lambda content: pretokenizers(content)[1].update(use_regex=True),
    "removed words": lambda content: pretokenizers(content)[0].update(behavior="Removed"),
    "inverted words": lambda content: pretokenizers(content)[0].update(invert=True),
    "single digits": lambda content: pretokenizers(content).append({"type": "Digits"}),
    "tokens around a text": lambda content: content.update(
        post_processor={"type": "TemplateProcessing", "special_tokens": {"[CLS]": {}}}),
    "tokens around a text, later": lambda content: content.update(post_processor={
        "type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "BertProcessing"}]}),
    "short texts": lambda content: content.update(truncation={"max_length": 4}),
    "padded texts": lambda content: content.update(padding={"strategy": {"Fixed": 4}}),
    "random merges": lambda content: content["model"].update(dropout=0.1),
    "ends of words": lambda content: content["model"].update(end_of_word_suffix="</w>"),
    "parts of words": lambda content: content["model"].update(continuing_subword_prefix="##"),
    "whole words first": lambda content: content["model"].update(ignore_merges=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_other_tokenizers_are_refused_by_name(saved, change):
    _, folder = saved
    change_tokenizer(folder, change)
    with pytest.raises(UnusableInput, match="tokenizer.json") as error:
        pretrained_encoding(folder)
    assert "\n" not in str(error.value)


def test_a_vocabulary_larger_than_its_merges_is_refused_with_both_sizes(saved):
    _, folder = saved
    change_tokenizer(folder, lambda content: content["model"]["vocab"].update({"zzz": 400}))
    with pytest.raises(UnusableInput, match="401 tokens, but the merges make 400"):
        pretrained_encoding(folder)


@pytest.mark.parametrize("name", ["add_prefix_space", "add_bos_token", "do_lower_case"])
def test_settings_that_change_ids_are_refused(saved, name):
    _, folder = saved
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {name: False}), encoding="utf-8")
    pretrained_encoding(folder)
    path.write_text(json.dumps(settings | {name: True}), encoding="utf-8")
    with pytest.raises(UnusableInput, match=f"tokenizer_config.json: {name} = True"):
        pretrained_encoding(folder)


def test_a_tokenizer_json_goes_before_the_old_files(saved):
    """Other libraries read it first, too."""
    encoding, folder = saved
    write_vocabulary(folder, "ab")
    assert pretrained_encoding(folder).n_vocab == encoding.n_vocab


@pytest.mark.parametrize("after", [
    None, {"type": "ByteLevel", "trim_offsets": False},
    {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}], "special_tokens": {}}])
def test_what_changes_no_id_is_accepted(saved, after):
    encoding, folder = saved
    change_tokenizer(folder, lambda content: content.update(post_processor=after, normalizer=None))
    assert pretrained_encoding(folder).n_vocab == encoding.n_vocab
