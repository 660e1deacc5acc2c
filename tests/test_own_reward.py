"""--reward FILE.py: numbers of all kinds come in right, faults are told in one line."""
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from running import HERE, read_rows, run

from support.files import UnusableInput
from support.own_reward import MODULE, OwnReward, RewardFile
from support.tokenizer import make_encoding

# "ab" is one token; the last byte of "é" alone is no text
ENCODING = make_encoding({bytes([b]): b for b in range(256)} | {b"ab": 256})
EOT = ENCODING.eot_token


def write(folder, body, before=""):
    """A reward file; `before` is its line 2, `body` its line 6."""
    path = folder / "own.py"
    path.write_text(f"import math, numpy, os, time, torch\n{before}\nSEEN = []\n"
                    f"def reward(prompts, responses):\n    SEEN.append((prompts, responses))\n"
                    f"    return {body}\n", encoding="utf-8")
    return path


def seen():
    """What the reward file that was loaded last has been asked: (prompts, responses) by call."""
    return sys.modules[MODULE].SEEN


@pytest.mark.parametrize("body", [
    "[False, 2]", "(0.0, 2)", "numpy.array([0, 2], dtype='int8')",
    "torch.tensor([0, 2.0], dtype=torch.bfloat16, requires_grad=True)",
    "numpy.array([False, 2], dtype=object)", "[numpy.float32(0), numpy.int8(2)]",
    "[torch.zeros(1), torch.tensor(2, dtype=torch.uint8)]",
    "numpy.ma.array([0, 2], mask=[False, False])"])
def test_numbers_of_any_kind_become_floats(tmp_path, body):
    rewards = RewardFile(write(tmp_path, body)).ask(["", ""], ["", ""])
    assert str(rewards) == "[0.0, 2.0]"


def test_numbers_keep_their_last_bit_and_may_be_large(tmp_path):
    file = RewardFile(write(tmp_path, "[-1e100, 1e100, 0.1, 10 ** 99, numpy.float32(0.1)]"))
    assert file.ask([""] * 5, [""] * 5) == [-1e100, 1e100, 0.1, 1e99, 0.10000000149011612]


FAULTS = [("[1 / 0]", ":6: ZeroDivisionError: division by zero"), ("exit(0)", ":6: SystemExit: 0"),
          ("int('two\\nlines')", ":6: ValueError: invalid literal for int() with base 10: 'two"),
          ("[[1.0], [2.0, 3.0]]", ": ValueError: setting an array element with a sequence."),
          ("[torch.zeros(2)] * 2", ": RuntimeError: a Tensor with 2 elements cannot be converted"),
          ("[10 ** 400, 1.0]", ": OverflowError: int too large")]
SHAPES = [("[1.0] * 3", "(3,): [1.0, 1.0, 1.0]"), ("None", "(): None"), ("b'12'", "(): b'12'"),
          ("(1.0 for r in responses)", "(): <generator object"), ("['1', 2.0]", "(2,): ['1', 2.0]"),
          ("{0: 1.0, 1: 2.0}", "(): {0: 1.0, 1: 2.0}"), ("torch.tensor(1.0)", "(): 1.0"),
          ("[1j, 2.0]", "(2,): [1j, 2.0]"), ("torch.ones(2, 1)", "(2, 1): [[1.0], [1.0]]")]
VALUES = [("[None, 1.0]", "nan"), ("(2.0, -math.inf)", "-inf"), ("[1e101, 2.0]", "1e+101"),
          ("numpy.ma.array([1.0, 2.0], mask=[True, False])", "nan")]


@pytest.mark.parametrize("body, says", [
    *FAULTS, *[(body, f": TypeError: want 2 numbers, got shape {found}") for body, found in SHAPES],
    *[(body, f": ValueError: want finite numbers up to 1e+100, got {found}")
      for body, found in VALUES]])
def test_what_is_no_reward_is_refused_in_one_line(tmp_path, body, says):
    path = write(tmp_path, body)
    with pytest.raises(UnusableInput) as error:
        RewardFile(path).ask(["", ""], ["", ""])
    assert str(error.value).startswith(f"--reward {path}{says}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("before, says", [
    ("def broken(:", ":2: SyntaxError: invalid syntax"), ("exit(0)", ":2: SystemExit: 0"),
    ("import neighbour", ":2: SyntaxError: invalid syntax (neighbour.py, line 9)")])
def test_a_file_that_does_not_run_is_refused_with_its_line(tmp_path, before, says):
    (tmp_path / "neighbour.py").write_text("\n" * 8 + "def broken(:", encoding="utf-8")
    path = write(tmp_path, "[]", before)
    with pytest.raises(UnusableInput) as error:
        RewardFile(path)
    assert str(error.value).startswith(f"--reward {path}{says}")


def test_a_file_without_the_function_is_refused(tmp_path):
    (tmp_path / "own.py").write_text("reward = 3\n", encoding="utf-8")
    with pytest.raises(UnusableInput, match="want a function"):
        RewardFile(tmp_path / "own.py")
    with pytest.raises(UnusableInput, match="nowhere.py: No such file"):
        RewardFile(tmp_path / "nowhere.py")


@pytest.mark.parametrize("name, value", [
    ("torch.set_default_dtype", "torch.float64"), ("torch.set_default_device", "'meta'"),
    ("torch.set_grad_enabled", "False"), ("os.chdir", "'/'")])
def test_what_changes_the_process_is_refused_and_undone(tmp_path, name, value):
    folder = os.getcwd()
    call = f"{name}({value})"
    refused = f"own.py: it calls {name.split('.')[1]} and does not undo it"
    for body, before, says in [("[1.0]", call, refused), (f"[{call}, 1.0][1:]", "", refused),
                               (f"[{call}, 1 / 0]", "", "ZeroDivisionError")]:
        with pytest.raises(UnusableInput, match=says):
            RewardFile(write(tmp_path, body, before)).ask([""], [""])
        assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_device() == torch.device("cpu")
        assert torch.is_grad_enabled()
        assert os.getcwd() == folder


WORKERS = """
import multiprocessing

def one(response):
    return response.count("e") + __file__.endswith({name!r})

def reward(prompts, responses):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(one, responses)
"""
START = """
import pathlib, sys
from support.own_reward import RewardFile
for name in sys.argv[1:]:
    file = RewardFile(name)
    pathlib.Path(name).write_text("edited after it was read")
    print(file.ask(["", ""], ["a", "e"]))
"""


def test_processes_that_a_reward_starts_import_it_under_any_name(tmp_path):
    paths = [tmp_path / name for name in ("reward.py", "random.py", "my-reward.v2.py")]
    for path in paths:
        path.write_text(WORKERS.format(name=path.name), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", START, *paths], cwd=HERE, capture_output=True,
                          text=True)
    assert done.stdout == "[1.0, 2.0]\n" * 3, done.stderr


def test_texts_arrive_in_pairs_at_most_1024_at_a_time_and_once(tmp_path):
    file = RewardFile(write(tmp_path, "[len(p + r) + (p == 'cc') for p, r in zip(*SEEN[-1])]"))
    prompt = torch.tensor([[97, 98], [99, 99]])
    digits = torch.cartesian_prod(*[torch.arange(48, 58)] * 3)[:600]          # 600 different texts
    response = torch.cat([digits, torch.full((600, 2), EOT)], 1).repeat(2, 1, 1)
    response[0, 0, :2] = torch.tensor([0xC3, EOT])       # the first of two bytes of a letter
    response[1, 599] = torch.tensor([32, 256, EOT, EOT, EOT])
    response[1, 598] = response[1, 597]
    rewards = OwnReward(file, ENCODING, tmp_path)(prompt, response)
    assert rewards.dtype == torch.float64
    assert rewards.tolist() == [[4.0] + [5.0] * 599, [6.0] * 600]
    first, second = seen()
    assert (len(first[0]), len(second[0])) == (1024, 175)
    assert first[0] + second[0] == ["ab"] * 600 + ["cc"] * 599
    numbers = [f"{i:03}" for i in range(600)]
    assert first[1] + second[1] == ["\ufffd0", *numbers[1:], *numbers[:598], " ab"]


def test_a_kill_at_any_byte_loses_only_what_was_not_written(tmp_path):
    values = {"]": 0.1 + 0.2, "\n": -5e-324, "\ufffd": 1e100}
    file = RewardFile(write(tmp_path, "[VALUES[r[-1]] for r in responses]", f"VALUES = {values!r}"))
    prompt = torch.tensor([[34, 10]])
    response = torch.tensor([[[34, 93], [13, 10], [97, 0xE9]]])
    judged = OwnReward(file, ENCODING, tmp_path)
    judged(prompt, response)
    content = judged.journal.read_bytes()
    ends = [match.end() for match in re.finditer(rb"\n.+", content)]
    for killed in range(len(content) + 1):
        judged.journal.write_bytes(content[:killed])
        seen().clear()
        for _ in range(2):
            rewards = OwnReward(file, ENCODING, tmp_path)(prompt, response)
            assert rewards.tolist() == [list(values.values())]
            assert sum(len(prompts) for prompts, _ in seen()) == sum(end > killed for end in ends)


def test_what_was_judged_before_a_fault_is_kept(tmp_path):
    file = RewardFile(write(tmp_path, "[1 / (len(SEEN) - 2) for r in responses]"))
    response = torch.cartesian_prod(*[torch.arange(48, 58)] * 4)[None, :1500]
    with pytest.raises(UnusableInput, match="ZeroDivisionError"):
        OwnReward(file, ENCODING, tmp_path)(torch.tensor([[97]]), response)
    rewards = OwnReward(file, ENCODING, tmp_path)(torch.tensor([[97]]), response)
    assert rewards.tolist() == [[-1] * 1024 + [1] * 476]


def test_rewards_are_kept_under_the_code_and_what_it_depends_on(tmp_path):
    journals = []
    for body, before in [("[1.0]", ""), ("[ 1.0 ]", "# a comment"), ("[2.0]", ""),
                         ("[1.0]", "DEPENDS_ON = 3"), ("[1.0]", "DEPENDS_ON = len(os.sep * 4)")]:
        file = RewardFile(write(tmp_path, body, before))
        reward = OwnReward(file, ENCODING, tmp_path)
        assert reward.depends_on() == (file, ENCODING)
        journals.append(reward.journal)
    assert journals[0] == journals[1]
    assert len(set(journals)) == 4


def test_a_reward_is_tried_on_eight_texts_before_any_work(tmp_path):
    file = RewardFile(write(tmp_path, "[len(r) for r in responses]"))
    tokens = torch.tensor([[97, 98, EOT]] * 3 + [[97, 256, 99]] * 6)
    OwnReward(file, ENCODING, tmp_path).try_out(tokens, 1)
    assert seen() == [(["a"] * 2, ["b", "abc"])]         # each pair once


def test_a_whole_run_judges_no_pair_twice_and_own_prompts_too(tmp_path):
    path = write(tmp_path, "torch.manual_seed(3) and [min(9, r.count('e')) for r in responses]")
    code, _, error = run("--quick", "--n", 2, "--reward", path, cwd=tmp_path)
    assert (code, error) == (0, "")
    asked = []
    for prompts, responses in seen():
        asked += zip(prompts, responses)
    assert len(set(asked)) == len(asked) > 1000
    rows = read_rows(tmp_path / "out")
    assert 0 <= rows[0]["reward"] < rows[1]["reward"]
    settings = json.loads((tmp_path / "out/policy-n2-seed0/settings.json").read_text())
    assert settings["given"]["reward"] == str(path)
    _, printed, _ = run("--n", 2, "--sample", "i watched this", cwd=tmp_path)
    found = re.findall(r"^  .{12}(.*?)  \.\.\.(.*)", printed, re.MULTILINE)
    assert len(found) == 9
    for reward, response in found:
        assert float(reward) == min(9, response.count("e"))


def test_the_examples_judge_as_they_say():
    texts = [" a superb film .", " it was worth every minute", ""]
    assert RewardFile(HERE / "experiments/rewards/length.py").ask(texts, texts) == [4, 5, 0]
    assert RewardFile(HERE / "experiments/rewards/contains.py").ask(texts, texts) == [1, 1, 0]
