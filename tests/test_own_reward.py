"""--reward FILE.py: numbers of all kinds come in right, faults are told in one line."""
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from running import HERE, read_rows, run

from support.announce import announce_rewards
from support.files import UnusableInput
from support.own_reward import OwnReward, RewardFile, try_reward
from support.journal import Journal
from support.results import ALWAYS
from support.tokenizer import make_encoding

# "ab" is one token; the last byte of "é" alone is no text
ENCODING = make_encoding({bytes([b]): b for b in range(256)} | {b"ab": 256})
EOT = ENCODING.eot_token
BODIES = {
    "booleans": "[len(r) > 1 for r in responses]",
    "integers": "[int(len(r) > 1) for r in responses]",
    "a tuple of floats": "tuple(float(len(r) > 1) for r in responses)",
    "numpy": "numpy.array([len(r) > 1 for r in responses])",
    "numpy float32": "numpy.array([len(r) > 1 for r in responses], dtype='float32')",
    "a tensor": "torch.tensor([float(len(r) > 1) for r in responses])",
    "an array of objects": "numpy.array([len(r) > 1 for r in responses], dtype=object)",
    "tensors in a tuple": "tuple(torch.tensor(float(len(r) > 1)) for r in responses)",
    "tensors of one number": "[torch.tensor(len(r) > 1) for r in responses]",
    "a generator": "(len(r) > 1 for r in responses)",
}


def write(folder, body, before=""):
    path = folder / "own.py"
    path.write_text(f"import math, numpy, torch\n{before}\n"
                    f"def reward(prompts, responses):\n    return {body}\n", encoding="utf-8")
    return path


def load(path):
    """The file, tried on eight texts of three tokens, as at the start of a run."""
    file = RewardFile(path)
    try_reward(file, ENCODING, torch.tensor([[97, 98, EOT], [98, 256, 99]] * 4), 1)
    return file


def rewards_of(file, prompt, response):
    """The rewards of token ids, as a run asks for them."""
    return OwnReward(file, ENCODING, Path(tempfile.mkdtemp()) / "cache")(prompt, response)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_numbers_of_any_kind_become_float64(tmp_path, body):
    file = load(write(tmp_path, body))
    response = torch.tensor([[[97, EOT, EOT], [97, 98, EOT]], [[98, 256, 99], [EOT, EOT, EOT]]])
    rewards = rewards_of(file, torch.tensor([[97], [98]]), response)
    assert rewards.dtype == torch.float64
    assert rewards.tolist() == [[0, 1], [1, 0]]


FAULTS = {
    "an exception": ("[1 / 0 for r in responses]", "ZeroDivisionError: division by zero .*:4"),
    "a missing name": ("wrong(responses)", "NameError.*:4"),
    "too few": ("[1.0]", "want 2 numbers, got 1"),
    "too many": ("[1.0] * 3", "want 2 numbers, got 3"),
    "None": ("[None for r in responses]", "finite numbers, got 'None'"),
    "nothing at all": ("None", "want a sequence of numbers, got a NoneType .*own.py.$"),
    "a number": ("1.0", "want a sequence of numbers, got a float .*own.py.$"),
    "words": ("['1.0' for r in responses]", "finite numbers, got '1.0'"),
    "nan": ("[math.nan for r in responses]", "finite numbers, got 'nan'"),
    "infinity": ("[math.inf for r in responses]", "finite numbers, got 'inf'"),
    "an integer beyond all floats": ("[10 ** 400 for r in responses]", "finite numbers"),
    "complex numbers": ("[1j for r in responses]", "finite numbers"),
    "rows of two": ("torch.zeros(len(responses), 2)", r"a Tensor of shape \(2, 2\)"),
    "a column": ("torch.zeros(len(responses), 1)", r"a Tensor of shape \(2, 1\)"),
    "an array of two dimensions": ("numpy.zeros((2, 2))", r"a ndarray of shape \(2, 2\)"),
    "one number": ("torch.tensor(1.0)", r"a Tensor of shape \(\)"),
    "lists in a list": ("[[1.0] for r in responses]", "finite numbers, got .\\[1.0\\]"),
    "tensors of one number in a list": ("[torch.zeros(1) for r in responses]", "finite numbers"),
    "a missing value": ("numpy.ma.array([1.0, 2.0], mask=[True, False])", "got masked values"),
    "a masked number": ("[numpy.ma.masked for r in responses]", "finite numbers, got '--'"),
    "a table": ("type('Table', (list,), dict(columns=['a', 'b']))([0, 1])", "got a Table"),
    "an exit": ("exit(0)", "SystemExit: 0 .*:4"),
    "a dictionary": ("dict.fromkeys(range(2), 1.0)", "want a sequence of numbers, got a dict"),
    "a set": ("{1.0, 2.0}", "want a sequence of numbers, got a set"),
    "a string": ("'12'", "want a sequence of numbers, got a str"),
    "bytes": ("b'12'", "want a sequence of numbers, got a bytes"),
    "a number whose square is infinite": ("[1e200 for r in responses]", "numbers, got '1e.200'"),
}


@pytest.mark.parametrize("body, says", FAULTS.values(), ids=FAULTS.keys())
def test_what_is_no_reward_is_refused_in_one_line(tmp_path, body, says):
    with pytest.raises(UnusableInput, match=says) as error:
        load(write(tmp_path, body))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("before, says", [("def broken(:", "SyntaxError.*:2"),
                                          ("import nothing_of_this_name", "ModuleNotFound.*:2"),
                                          ("raise ValueError('two\\nlines')", "two lines .*:2"),
                                          ("exit(0)", "SystemExit: 0 .*:2")])
def test_a_file_that_does_not_run_is_refused_with_its_line(tmp_path, before, says):
    with pytest.raises(UnusableInput, match=says):
        RewardFile(write(tmp_path, "[1.0 for r in responses]", before))


def test_a_file_without_the_function_is_refused(tmp_path):
    (tmp_path / "own.py").write_text("reward = 3\n", encoding="utf-8")
    with pytest.raises(UnusableInput, match="want a function"):
        RewardFile(tmp_path / "own.py")
    with pytest.raises(UnusableInput, match="nowhere.py: No such file"):
        RewardFile(tmp_path / "nowhere.py")


def test_the_line_is_the_innermost_of_the_file_itself(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("import json\n\ndef inner(text):\n    return json.loads('{')\n\n"
                    "def reward(prompts, responses):\n    return inner(responses)\n",
                    encoding="utf-8")
    with pytest.raises(UnusableInput, match="own.py:4"):
        load(path)


def test_texts_arrive_in_pairs_at_most_1024_at_a_time(tmp_path):
    before = "SEEN = []"
    body = "SEEN.append((prompts, responses)) or [len(r) for r in responses]"
    file = RewardFile(write(tmp_path, body, before))
    seen = file.function.__globals__["SEEN"]
    seen.clear()
    prompt = torch.tensor([[97, 98], [99, 99]])
    digits = torch.cartesian_prod(*[torch.arange(48, 58)] * 3)[:600]          # 600 different texts
    response = torch.cat([digits, torch.full((600, 2), EOT)], 1).repeat(2, 1, 1)
    response[0, 0, :2] = torch.tensor([0xC3, EOT])       # the first of two bytes of a letter
    response[1, 599] = torch.tensor([32, 256, EOT, EOT, EOT])
    rewards = rewards_of(file, prompt, response)
    assert [len(prompts) for prompts, _ in seen] == [1024, 176]
    prompts = seen[0][0] + seen[1][0]
    responses = seen[0][1] + seen[1][1]
    assert prompts == ["ab"] * 600 + ["cc"] * 600
    numbers = [f"{i:03}" for i in range(600)]
    assert responses == ["\ufffd0", *numbers[1:], *numbers[:599], " ab"]
    assert rewards.shape == (2, 600)
    assert rewards[1, 599] == 3


def test_a_whole_run_with_a_reward_that_ties(tmp_path):
    path = write(tmp_path, "[min(2, r.count('e')) for r in responses]")
    code, printed, error = run("--quick", "--n", 2, "--reward", path, cwd=tmp_path)
    assert (code, error) == (0, "")
    assert "will judge up to" in printed
    assert "both have the same reward" in printed
    rows = read_rows(tmp_path / "out")
    assert 0 <= rows[0]["reward"] < rows[1]["reward"] <= 2
    before = {path.name for path in (tmp_path / "out/cache").iterdir()}

    # another reward: the reference stays, what depends on the reward is made again
    path = write(tmp_path, "[min(2, r.count('a')) for r in responses]")
    assert run("--quick", "--n", 2, "--reward", path, cwd=tmp_path)[0] == 0
    after = {path.name for path in (tmp_path / "out/cache").iterdir()}
    stages = sorted(name.partition("-seed")[0] for name in after - before if name[-3:] == ".pt")
    assert stages == ["evaluation-vbon-n2", "policy-vbon-n2", "rewards-draws",
                      "rewards-held-out", "rewards-training"]
    assert len(read_rows(tmp_path / "out")) == 6


def test_a_constant_reward_is_said_to_teach_nothing(tmp_path):
    path = write(tmp_path, "[1.5 for r in responses]")
    code, printed, _ = run("--quick", "--n", 2, "--reward", path, cwd=tmp_path)
    assert code == 0
    assert printed.count("nothing to learn") == 2        # before training, and below the table
    assert "succeeded if" not in printed
    for row in read_rows(tmp_path / "out"):
        assert (row["reward"], row["win_rate"]) == (1.5, 0.5)
        assert row["kl_ref"] == pytest.approx(0, abs=0.03)


def test_the_largest_number_is_still_a_reward(tmp_path):
    file = RewardFile(write(tmp_path, "[-1e100, 1e100]"))
    response = torch.tensor([[[97, EOT], [98, EOT]]])
    assert rewards_of(file, torch.tensor([[97]]), response).tolist() == [
        [-1e100, 1e100]]


@pytest.mark.parametrize("scale", [1e90, -1e90, 1e-90])
def test_a_reward_of_any_size_gives_finite_numbers_and_a_picture(scale, tmp_path):
    path = write(tmp_path, f"[{scale} * len(r) for r in responses]")
    code, printed, error = run("--quick", "--n", 2, "--reward", path, cwd=tmp_path)
    assert (code, error) == (0, "")
    table = printed.partition("positive samples\n")[2].splitlines()[:3]
    assert max(len(line) for line in table) < 90
    for row in read_rows(tmp_path / "out"):
        assert all(math.isfinite(row[name]) for name in ALWAYS[:-1])
    assert (tmp_path / "out" / "vbon.png").exists()


def test_the_trial_is_made_with_texts_of_the_user(tmp_path):
    """A reward that looks an answer up, by the prompt."""
    words = "ab cd ef gh ij kl mn op qr st".split()
    lines = [f"{first} {second}\t{i}" for i, (first, second) in enumerate(
        itertools.product(words, words))]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    path = write(tmp_path, "[r.count(KNOWN[p]) for p, r in zip(prompts, responses)]",
                 f"KNOWN = {{line[:2]: line[1] for line in {lines!r}}}")
    args = ("--quick", "--n", 2, "--data", "texts", "--reward", path, "--prompt-tokens", 1)
    code, _, error = run(*args, "--steps", 1, cwd=tmp_path)
    assert (code, error) == (0, "")


def test_the_run_says_how_many_rewards_it_asks_for(tmp_path):
    path = write(tmp_path, "COUNT.write('.' * len(responses)) and COUNT.flush() or "
                 "[len(r) for r in responses]", "COUNT = open('count.txt', 'w')")
    _, printed, _ = run("--quick", "--n", 2, "--reward", path, cwd=tmp_path)
    asked = len((tmp_path / "count.txt").read_text(encoding="utf-8"))
    announced = int(re.search(r"will judge up to ([\d,]+) responses", printed)[1].replace(",", ""))
    # no pair of texts is judged twice; some appear twice
    assert 0.9 * announced < asked <= announced


def test_a_fault_in_the_middle_of_a_run_keeps_nothing_of_the_batch(tmp_path):
    path = write(tmp_path, "COUNT.append(1) or [len(r) / (len(COUNT) < 4) for r in responses]",
                 "COUNT = []")
    code, _, error = run("--quick", "--n", 2, "--reward", path, cwd=tmp_path)
    assert code == 2
    assert error.count("\n") == 1
    assert "ZeroDivisionError" in error
    names = [path.name for path in (tmp_path / "out/cache").glob("*.pt")]
    assert [name.partition("-seed")[0] for name in sorted(names)] == [
        "reference-model", "rewards-training", "samples-held-out", "samples-training"]


def test_prompts_without_labels_will_do(tmp_path):
    (tmp_path / "texts").mkdir()
    lines = [f"the film number {i} is about {i * i} things" for i in range(150)]
    Path(tmp_path, "texts", "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    path = write(tmp_path, "[len(r) for r in responses]")
    code, _, error = run("--quick", "--n", 2, "--data", "texts", "--reward", path, cwd=tmp_path)
    assert (code, error) == (0, "")
    code, _, error = run("--quick", "--n", 2, "--data", "texts", cwd=tmp_path)
    assert code == 2
    assert "pos.txt" in error


def test_the_examples_judge_as_they_say():
    folder = HERE / "experiments" / "rewards"
    length = RewardFile(folder / "length.py")
    contains = RewardFile(folder / "contains.py")
    texts = [" a superb film .", " it was worth every minute", ""]
    assert length.function(texts, texts) == [4, 5, 0]
    assert contains.function(texts, texts) == [True, True, False]


def test_a_model_may_be_taken_as_it_is(tmp_path):
    train_it = ("--quick", "--n", 2, "--prompt-tokens", 2, "--length", 3)
    assert run(*train_it, "--lm-steps", 0, cwd=tmp_path)[0] == 0
    rows = read_rows(tmp_path / "out")
    assert {(row["lm_steps"], row["prompt_tokens"], row["length"]) for row in rows} == {(0, 2, 3)}


# ------------------------------------------------------------------- the process of a reward's file

STATE = """
import os, random, numpy, torch
torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
torch.set_num_threads(1)
torch.manual_seed(3)
random.seed(4)
numpy.random.seed(5)
os.makedirs("elsewhere", exist_ok=True)
os.chdir("elsewhere")
CALLS = []

def reward(prompts, responses):
    # its own settings still hold
    assert torch.get_default_dtype() == torch.float64 and not torch.is_grad_enabled()
    assert os.getcwd().endswith("elsewhere")
    CALLS.append([random.random(), numpy.random.random(), torch.rand(1, device='cpu').item()])
    torch.set_default_device("meta")
    return [response.count("e") for response in responses]
"""


def test_a_reward_that_changes_the_process_changes_no_number(tmp_path):
    plain = write(tmp_path, "[response.count('e') for response in responses]")
    assert run("--quick", "--n", 2, "--reward", plain, cwd=tmp_path)[0] == 0
    (tmp_path / "odd.py").write_text(STATE, encoding="utf-8")
    args = ("--quick", "--n", 2, "--reward", tmp_path / "odd.py", "--out", "odd")
    code, _, error = run(*args, cwd=tmp_path)
    assert (code, error) == (0, "")
    for one, two in zip(read_rows(tmp_path / "out"), read_rows(tmp_path / "odd")):
        assert {key: one[key] for key in ALWAYS[:-1]} == {key: two[key] for key in ALWAYS[:-1]}


def test_a_reward_has_its_own_random_numbers(tmp_path):
    (tmp_path / "odd.py").write_text(STATE, encoding="utf-8")
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        file = RewardFile("odd.py")
        ours = [random.random(), torch.rand(1).item()]
        state = random.getstate(), torch.get_rng_state()
        for _ in range(3):
            file.ask(["a"], ["e"])
        assert random.getstate() == state[0]
        assert torch.equal(torch.get_rng_state(), state[1])
    finally:
        os.chdir(before)
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_device().type == "cpu"
    calls = file.function.__globals__["CALLS"]
    assert len({tuple(call) for call in calls}) == 3        # they go on from call to call
    g = torch.Generator().manual_seed(3)
    assert calls[0][2] == torch.rand(1, generator=g, dtype=torch.float64).item()
    assert len(ours) == 2


WORKERS = """
import multiprocessing

def one(response):
    return response.count("e")

def reward(prompts, responses):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(one, responses)
"""


@pytest.mark.parametrize("name", ["mine.py", "reward.py", "random.py", "my-reward.v2.py"])
def test_a_reward_may_start_processes_that_import_it(name, tmp_path):
    """Also under the name of one of our files, or one that is no name of a module."""
    (tmp_path / name).write_text(WORKERS, encoding="utf-8")
    program = ("import sys; from support.own_reward import RewardFile\n"
               "if __name__ == '__main__':\n"
               "    print(RewardFile(sys.argv[1]).ask(['', ''], ['a', 'e']))\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "start.py").write_text(program, encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / "folder" / "start.py", tmp_path / name],
                          env=os.environ | {"PYTHONPATH": str(HERE)}, capture_output=True, text=True,
                          timeout=60)
    assert done.stdout == "[0.0, 1.0]\n", done.stderr


def test_what_a_reward_depends_on_is_printed_and_names_its_rewards(tmp_path, monkeypatch):
    before = "import os\nDEPENDS_ON = os.environ['MODEL'], 3"
    path = write(tmp_path, "[len(r) for r in responses]", before)
    counts = []
    for name in ("small", "large", "small"):
        monkeypatch.setenv("MODEL", name)
        code, printed, _ = run("--quick", "--n", 2, "--reward", path, cwd=tmp_path)
        assert code == 0
        assert f"own.py (depends on ('{name}', 3)) will judge" in printed
        counts.append(len(list((tmp_path / "out/cache").glob("rewards-training-*"))))
    assert counts == [1, 2, 2]


def test_comments_in_a_reward_do_not_matter(tmp_path):
    path = write(tmp_path, "[len(r) for r in responses]")
    assert run("--quick", "--n", 2, "--reward", path, cwd=tmp_path)[0] == 0
    names = {path.name for path in (tmp_path / "out/cache").iterdir()}
    path.write_text('"""Short is good."""\n' + path.read_text(encoding="utf-8") + "# the end\n",
                    encoding="utf-8")
    assert run("--quick", "--n", 2, "--reward", path, cwd=tmp_path)[0] == 0
    assert {path.name for path in (tmp_path / "out/cache").iterdir()} == names


def test_a_neighbour_with_the_name_of_a_file_of_ours_is_announced(tmp_path):
    (tmp_path / "model.py").write_text("THEIRS = True\n", encoding="utf-8")
    path = write(tmp_path, "[len(r) for r in responses]")
    _, printed, _ = run("--quick", "--n", 2, "--reward", path, cwd=tmp_path)
    assert "own.py cannot import the model.py next to it: that name is ours" in printed


def test_tables_of_pandas_are_refused_and_its_columns_are_not():
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    file = RewardFile(HERE / "experiments" / "rewards" / "length.py")
    file.function = lambda prompts, responses: pandas.Series([1.5, 2.5], index=[9, 3])
    assert file.ask(["", ""], ["", ""]) == [1.5, 2.5]
    for bad in (pandas.DataFrame([[1.0, 2.0]]), pandas.Series([1.0, None]),
                pandas.Series([1, None], dtype="Int64")):
        file.function = lambda prompts, responses: bad
        with pytest.raises(UnusableInput, match="want"):
            file.ask(["", ""], ["", ""])


# ------------------------------------------------------------------------- rewards that take long

FAILING = """
import json, pathlib
LOG = pathlib.Path("log.txt")

def reward(prompts, responses):
    with LOG.open("a") as log:
        calls = len(LOG.read_text().splitlines())
        if calls % 7 == 5:
            log.write("fault\\n")
            raise TimeoutError("the server is busy")
        log.write(json.dumps([prompts, responses]) + "\\n")
    return [response.count("e") for response in responses]
"""


def test_a_reward_that_fails_now_and_then_ends_with_the_same_numbers(tmp_path):
    plain = write(tmp_path, "[response.count('e') for response in responses]")
    args = ("--quick", "--n", 2, "--steps", 20, "--reward")
    assert run(*args, plain, "--out", "plain", cwd=tmp_path)[0] == 0
    (tmp_path / "failing.py").write_text(FAILING, encoding="utf-8")
    faults = 0
    while True:
        code, printed, error = run(*args, tmp_path / "failing.py", cwd=tmp_path)
        if code == 0:
            break
        assert (code, error.count("\n")) == (2, 1)
        assert "TimeoutError: the server is busy" in error
        faults += 1
        assert faults < 20
    assert faults >= 4
    for one, two in zip(read_rows(tmp_path / "plain"), read_rows(tmp_path / "out")):
        assert {key: one[key] for key in ALWAYS[:-1]} == {key: two[key] for key in ALWAYS[:-1]}
    # nothing was judged twice, but for the trials at each start
    judged = Counter()
    trial = set()
    for line in (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines():
        if line == "fault":
            continue
        prompts, responses = json.loads(line)
        if len(prompts) in (2, 6):
            trial.update(zip(prompts, responses))
        else:
            judged.update(zip(prompts, responses))
    assert max(judged.values()) == 1
    assert len(judged) > 1000


def test_a_comment_in_a_slow_reward_judges_nothing_again(tmp_path):
    path = write(tmp_path, "COUNT.write('.') and COUNT.flush() or [len(r) for r in responses]",
                 "COUNT = open('count.txt', 'a')")
    assert run("--quick", "--n", 2, "--reward", path, cwd=tmp_path)[0] == 0
    before = (tmp_path / "count.txt").read_text(encoding="utf-8")
    path.write_text(path.read_text(encoding="utf-8") + "# the end\n", encoding="utf-8")
    (tmp_path / "out" / "results.jsonl").unlink()
    assert run("--quick", "--n", 2, "--reward", path, cwd=tmp_path)[0] == 0
    after = (tmp_path / "count.txt").read_text(encoding="utf-8")
    assert len(after) == len(before) + 2                # the two calls of the trial


def test_the_time_that_rewards_take_is_announced(tmp_path):
    path = write(tmp_path, "time.sleep(0.1 * len(responses)) or [len(r) for r in responses]",
                 "import time")
    seconds = try_reward(RewardFile(path), ENCODING, torch.full((8, 3), 97), 1)
    assert seconds == pytest.approx(0.1, abs=0.05)
    assert announce_rewards("mine.py", 359_186, 0.02) == (
        "reward: mine.py will judge up to 359,186 responses: about 120 minutes, at 20 ms each")
    assert announce_rewards("mine.py", 2000, 1e-5) == "reward: mine.py will judge up to 2,000 responses"


@pytest.mark.parametrize("left", [0, 5, 30])
def test_a_journal_survives_a_process_that_is_killed_while_it_writes(left, tmp_path):
    journal = Journal(tmp_path / "cache" / "judged.bin")
    journal.add(["a", "b"], ["x", "y"], [1.0, 2.0])
    content = journal.path.read_bytes()
    journal.path.write_bytes(content[:left])            # the rest did not arrive
    again = Journal(journal.path)
    assert again.find(["a", "b"], ["x", "y"]) == [1.0 if left >= 24 else None, None]
    again.add(["b", "c"], ["y", "z"], [3.0, 4.0])
    last = Journal(journal.path)
    assert last.find(["b", "c", "c"], ["y", "z", ""]) == [3.0, 4.0, None]


def test_a_prompt_and_a_response_are_not_mixed_up(tmp_path):
    journal = Journal(tmp_path / "cache" / "judged.bin")
    journal.add(["ab"], ["c"], [1.0])
    assert journal.find(["a", "ab", "abc"], ["bc", "c", ""]) == [None, 1.0, None]
