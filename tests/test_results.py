"""What a run leaves: results.jsonl, responses, models; --sample; the same from Python."""
import json
import math

import numpy
import pytest
import torch
from running import HERE, read_lines, read_rows, run

import train
import vbon
from model import GPT
from support import results
from support.huggingface import load_model
from support.kept import digest, load
from support.results import ALWAYS, KEYS, METRICS, one_line
from support.reviews import builtin_reviews
from support.tokenizer import pretrained_encoding

POLICY = "out/policy-n2-seed0"
REFERENCE = "out/reference-seed0"

# ----------------------------------------------------------------------------------- results.jsonl

def test_each_row_has_all_keys_and_what_made_it(finished_run):
    rows = read_lines(finished_run / "out" / "results.jsonl")
    assert [row["method"] for row in rows] == ["ref", "bon", "vbon"]
    for row in rows:
        assert set(KEYS) <= row.keys()
        assert all(math.isfinite(row[name]) for name in ALWAYS)
        made_by = {"n": 2, "seed": 0, "beta": None, "m": 16, "vocab": 400, "length": 24,
                   "prompts": 8, "quick": True, "device": "cpu", "data": None, "init": None}
        assert row == row | made_by
        assert len(row["code"]) == 12


def test_rows_are_appended_unless_their_settings_are_there(copied_run):
    before = read_rows(copied_run / "out")
    assert run("--quick", "--n", 2, cwd=copied_run)[0] == 0
    assert read_rows(copied_run / "out") == before
    assert run("--quick", "--n", 2, "--steps", 4, cwd=copied_run)[0] == 0
    after = read_rows(copied_run / "out")
    assert after[:3] == before
    assert [row["steps"] for row in after[3:]] == [4, 4, 4]


def test_a_line_that_was_cut_short_is_removed_and_settings_may_have_any_order(tmp_path):
    row = {name: 1 for name in KEYS}
    results.add_results(tmp_path, [row])
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes() + b'{"method": "r')
    assert results.read_results(tmp_path) == [row]
    backwards = dict(reversed(row.items())) | {"reward": 7}
    results.add_results(tmp_path, [backwards, row | {"n": 2}])
    assert path.read_bytes().count(b"\n") == 2
    assert results.read_results(tmp_path) == [row, row | {"n": 2}]


@pytest.mark.parametrize("line", [b"not json", b"{}", b"[1]", b"", b"\xff\xfe"])
def test_a_damaged_line_is_refused_by_its_number_and_stays(line, copied_run):
    path = copied_run / "out" / "results.jsonl"
    content = path.read_bytes() + line + b"\n"
    path.write_bytes(content)
    status, printed, error = run("--quick", "--n", 2, cwd=copied_run)
    assert (status, printed) == (2, "")
    assert "results.jsonl, line 4: not a result" in error
    assert path.read_bytes() == content

# --------------------------------------------------------------------------------------- responses

def columns(rows, use, prompts):
    """The numbers of the records with this use, as arrays (P, K)."""
    found = {}
    for name in ("reward", "logprob", "ref_logprob", "token_kl"):
        found[name] = numpy.array([[row[name] for row in rows
                                    if row["use"] == use and row["prompt_id"] == i]
                                   for i in range(prompts)])
    return found


def log_bon(ref_logprob, reward, refs, n):
    """Equations (4) and (7), once more, with numpy alone."""
    less = (refs[:, None, :] < reward[:, :, None]).sum(-1)
    equal = (refs[:, None, :] == reward[:, :, None]).sum(-1)
    total = refs.shape[1] + 1
    tied = numpy.where(equal > 0, equal / total, numpy.exp(ref_logprob))
    at_most = numpy.minimum(1, (less + 1) / total + tied)
    lower = numpy.minimum((less + 1) / total, at_most - tied)
    weight = sum(at_most ** (n - 1 - j) * lower ** j for j in range(n))
    return ref_logprob + numpy.log(weight)


def test_the_records_give_the_rows_of_the_table(finished_run):
    out = finished_run / "out"
    policy = read_lines(out / "responses-policy-n2-seed0.jsonl")
    reference = read_lines(out / "responses-reference-seed0.jsonl")
    prompts = read_lines(out / "held-out-prompts-seed0.jsonl")
    refs = columns(reference, "estimates F", 8)["reward"]
    candidates = columns(reference, "candidate", 8)
    assert refs.shape == candidates["reward"].shape == (8, 64)
    assert not (refs == candidates["reward"]).all(1).any()      # they are other responses
    first, best, last = read_rows(out)
    for row, x in ((first, candidates), (last, columns(policy, "evaluation", 8))):
        wins = ((refs[:, None] < x["reward"][..., None]).mean(-1)
                + (refs[:, None] == x["reward"][..., None]).mean(-1) / 2)
        kl_bon = x["logprob"] - log_bon(x["ref_logprob"], x["reward"], refs, 2)
        means = {"reward": x["reward"], "win_rate": wins, "kl_ref": x["token_kl"], "kl_bon": kl_bon}
        for name, values in means.items():
            per_prompt = values.mean(1)
            assert row[name] == pytest.approx(per_prompt.mean(), abs=1e-5), name
            error = per_prompt.std(ddof=1) / math.sqrt(8)
            assert row[name + "_se"] == pytest.approx(error, abs=1e-5), name
        assert row["positive"] == pytest.approx((x["reward"] > 0).mean())
    # the best of each two candidates
    pairs = candidates["reward"].reshape(8, 32, 2).max(-1)
    assert best["reward"] == pytest.approx(pairs.mean(), abs=1e-6)
    for row in policy:
        assert row["method"] == "vbon"
        assert row["prompt"] == prompts[row["prompt_id"]]["prompt"]
        assert type(row["response"]) is str


def test_samples_begin_with_what_the_numbers_are_and_end_with_the_means(finished_run):
    text = (finished_run / "out" / "samples.txt").read_text(encoding="utf-8")
    assert text.startswith("The number before a response is its reward. Of best of 2, the best of "
                           "2 responses is shown.\n\n")
    assert text.count("\n  reference ") == text.count("\n  best of 2 ") == text.count("\n  vBoN ")
    means = [f"{row['reward']:.3g}" for row in read_rows(finished_run / "out")]
    assert text.endswith(f"\nMean reward over all held-out prompts: reference {means[0]}, best of "
                         f"2 {means[1]}, vBoN {means[2]}\n")
    assert one_line("two\nlines\r\nof text") == "two\\nlines\\nof text"

# ------------------------------------------------------------------------------------------ models

def test_a_run_leaves_these_files_and_both_models_with_their_settings(finished_run):
    out = finished_run / "out"
    assert {path.name for path in out.iterdir()} == {
        ".gitignore", "cache", "held-out-prompts-seed0.jsonl", "history-n2-seed0.jsonl",
        "policy-n2-seed0", "reference-seed0", "responses-policy-n2-seed0.jsonl",
        "responses-reference-seed0.jsonl", "results.jsonl", "samples.txt", "vbon.png"}
    assert (out / ".gitignore").read_text(encoding="utf-8") == "*\n"
    assert (out / "vbon.png").read_bytes()[:4] == b"\x89PNG"
    rows = read_rows(out)
    for name, row, stage, key in ((REFERENCE, rows[0], "reference-model-*.pt", "model"),
                                  (POLICY, rows[2], "policy-vbon-*.pt", "policy")):
        folder = finished_run / name
        model = load_model(folder)
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        assert settings.pop("weights") == digest(model.state_dict())
        assert settings.pop("given") == {"data": None, "reward": None, "init": None}
        assert settings == {key: row[key] for key in row if key not in METRICS}
        assert pretrained_encoding(folder).n_vocab == 400
        # the folder holds what the stage holds
        path, = (out / "cache").glob(stage)
        for weight, x in load(path)[key].state_dict().items():
            assert torch.equal(model.state_dict()[weight], x), weight


@pytest.mark.parametrize("name", [POLICY, REFERENCE])
def test_an_export_that_was_killed_is_repaired_by_the_same_command(name, copied_run):
    """settings.json is written last."""
    folder = copied_run / name
    before = (folder / "settings.json").read_bytes()
    (folder / "settings.json").unlink()
    (folder / "model.safetensors").write_bytes(b"")
    status, printed, error = run("--quick", "--n", 2, "--sample", "i", cwd=copied_run)
    assert (status, printed) == (2, "")
    assert "out holds no finished run with --n 2 --seed 0 (policies there: policy-n2-s" in error
    status, printed, _ = run("--quick", "--n", 2, cwd=copied_run)
    assert status == 0
    assert "replaced" not in printed
    assert (folder / "settings.json").read_bytes() == before
    load_model(folder)


def test_a_folder_of_other_settings_is_replaced_and_the_run_says_so(copied_run):
    _, printed, _ = run("--quick", "--n", 2, "--steps", 4, cwd=copied_run)
    assert f"{POLICY} was made with other settings: it is replaced" in printed
    assert f"{REFERENCE} was" not in printed            # the reference is the same
    settings = json.loads((copied_run / POLICY / "settings.json").read_text(encoding="utf-8"))
    assert settings["steps"] == 4


def test_a_second_round_starts_from_the_first(copied_run):
    args = ("--quick", "--n", 2, "--init", POLICY, "--lm-steps", 0, "--out", "second")
    status, _, error = run(*args, cwd=copied_run)
    assert (status, error) == (0, "")
    first = load_model(copied_run / POLICY).state_dict()
    second = load_model(copied_run / "second" / "reference-seed0").state_dict()
    for key, x in first.items():
        assert torch.equal(x, second[key]), key
    # the lines of the second round name the first
    settings = json.loads((copied_run / POLICY / "settings.json").read_text(encoding="utf-8"))
    assert {row["init"] for row in read_rows(copied_run / "second")} == {settings["weights"]}


def test_own_reviews_are_used_and_named_by_their_content(tmp_path):
    (tmp_path / "mine").mkdir()
    for name, label in (("pos", 1), ("neg", 0)):
        texts = [text for text, y in builtin_reviews(300, 3) if y == label]
        (tmp_path / "mine" / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")
    status, printed, _ = run("--quick", "--n", 2, "--data", "mine", cwd=tmp_path)
    assert status == 0
    assert printed.startswith("text: 300 reviews")
    row = read_rows(tmp_path / "out")[0]
    assert len(row["data"]) == 12
    assert 10 < row["length"] <= 64

# ---------------------------------------------------------------------------------------- --sample

def test_an_own_prompt_gets_three_responses_of_each_of_the_three(copied_run):
    before = sorted((copied_run / "out").rglob("*"))
    status, printed, error = run("--n", 2, "--sample", " i\twatched <br />this", cwd=copied_run)
    assert (status, error) == (0, "")
    titles = [line.strip().split("  ")[0] for line in printed.splitlines()]
    assert titles == 3 * ["i watched this ...", "reference", "best of 2", "vBoN"]
    assert sorted((copied_run / "out").rglob("*")) == before    # nothing is trained
    # responses and rewards are those of the models in the folders
    model = GPT(**load_model(copied_run / POLICY).config)
    room = model.config["block_size"]
    status, _, error = run("--n", 2, "--sample", "q" * room, cwd=copied_run)
    assert status == 2
    assert f"--sample: want fewer than {room} tokens, got {room}" in error
    assert run("--n", 2, "--sample", "q" * (room - 1), cwd=copied_run)[0] == 0


def test_responses_to_an_own_prompt_have_the_reward_of_the_run(tmp_path):
    path = HERE / "experiments" / "rewards" / "length.py"
    assert run("--quick", "--n", 2, "--reward", path, cwd=tmp_path)[0] == 0
    status, printed, _ = run("--n", 2, "--sample", "i watched this", cwd=tmp_path)
    assert status == 0
    for line in printed.splitlines():
        if not line.startswith("i watched"):
            words = line.split("...", 1)[1]
            assert float(line[14:20]) == -len(words.split()), line
    settings = json.loads((tmp_path / POLICY / "settings.json").read_text(encoding="utf-8"))
    assert settings["given"] == {"data": None, "reward": str(path), "init": None}

# ------------------------------------------------------------------------------------- from Python

def test_a_run_in_python_has_what_the_table_says(copied_run, monkeypatch, capsys):
    monkeypatch.chdir(copied_run)
    state = torch.get_rng_state()
    found = train.main(["--quick", "--n", "2", "--out", "out"])
    assert torch.equal(torch.get_rng_state(), state)
    assert "vBoN n=2" not in capsys.readouterr().out    # it comes from the cache
    for row, again in zip(read_rows("out"), found.rows, strict=True):
        assert row == row | {key: again[key] for key in again if key != "seconds"}
    # kept rewards and log-probabilities are those of the responses
    world = found.world
    for samples in (world.samples, world.held_out, world.candidates):
        assert torch.equal(world.reward(samples.prompt, samples.response), samples.reward)
        with torch.no_grad():
            scored = world.reference.logprob(samples.prompt, samples.response)
        assert torch.allclose(scored, samples.logprob, rtol=0, atol=1e-3)
    # F, log-probabilities and targets of single responses
    prompt = world.samples.prompt[:1]
    response, logprob = found.policy.sample(prompt, 3, 24)
    target = vbon.bon_target(world.reference.logprob(prompt, response),
                             world.reward(prompt, response), world.samples.reward[:1], 2)
    assert logprob.shape == target.shape == (1, 3)
    assert len(found.history) == 3
