"""What a run leaves for people and other programs: records, samples.txt, --sample alone, `Run`."""
import json
import math
import subprocess
import sys

import numpy
import pytest
import torch
from running import HERE, read_rows, run
from test_options import write_reviews

import train
import vbon
from support.tokenizer import encode

# ---------------------------------------------------------------------------------------- records

def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
    reference = read(out / "responses-reference-seed0.jsonl")
    policy = read(out / "responses-policy-n2-seed0.jsonl")
    prompts = read(out / "held-out-prompts-seed0.jsonl")
    refs = columns(reference, "estimates F", 8)["reward"]
    assert refs.shape == (8, 64)
    found = {"ref": columns(reference, "candidate", 8), "vbon": columns(policy, "evaluation", 8)}
    for row in read_rows(out):
        if row["method"] == "bon":
            continue
        x = found[row["method"]]
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
    best = found["ref"]["reward"].reshape(8, 32, 2).max(-1)
    assert read_rows(out)[1]["reward"] == pytest.approx(best.mean(), abs=1e-6)
    for row in policy:
        assert row["prompt"] == prompts[row["prompt_id"]]["prompt"]
        assert (row["method"], set(row)) == ("vbon", {
            "method", "use", "prompt_id", "prompt", "response", "reward", "logprob", "ref_logprob",
            "token_kl"})


def test_the_history_has_a_line_for_each_update(finished_run):
    rows = read(finished_run / "out" / "history-n2-seed0.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(row) == {"step", "win_rate", "kl_ref", "kl_target"}


def test_samples_begin_with_what_the_numbers_are_and_end_with_the_means(finished_run):
    lines = (finished_run / "out" / "samples.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == ("The number before a response is its reward. Of best of 2, the best of 2 "
                        "responses is shown.")
    means = [f"{row['reward']:.3g}" for row in read_rows(finished_run / "out")]
    assert lines[-1] == (f"Mean reward over all 8 held-out prompts: reference {means[0]}, best of 2 "
                         f"{means[1]}, vBoN {means[2]}")


def test_results_do_not_show_up_in_the_users_repository(finished_run):
    assert (finished_run / "out" / ".gitignore").read_text(encoding="utf-8") == "*\n"


def test_each_line_has_its_theory_and_says_whether_it_was_quick(finished_run):
    for row in read_rows(finished_run / "out"):
        assert row["theory_win_rate"] == pytest.approx(2 / 3)
        assert row["theory_kl"] == pytest.approx(0.193, abs=1e-3)
        assert row["quick"] is True


def test_a_quick_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--quick", "--n", "2"])
    assert (tmp_path / "out-quick" / "results.jsonl").exists()
    assert not (tmp_path / "out").exists()

# ------------------------------------------------------------------------------- texts that are cut

def test_the_length_of_own_texts_cuts_a_tenth_of_them(tmp_path):
    write_reviews(tmp_path / "reviews", 600)
    _, printed, _ = run("--quick", "--n", 2, "--data", "reviews", cwd=tmp_path)
    length = read_rows(tmp_path / "out")[0]["length"]
    assert 10 < length < 64
    assert "are cut" not in printed.split("reward:")[0]
    shorter = length - 5
    _, printed, _ = run("--quick", "--n", 2, "--data", "reviews", "--length", shorter, cwd=tmp_path)
    assert f"of them are longer than 4 + {shorter} tokens, and are cut; with --length {length}" in (
        printed)


def test_own_texts_are_at_most_64_tokens_by_default(tmp_path):
    (tmp_path / "texts").mkdir()
    lines = [f"{i} " + " ".join(str(i * j) for j in range(90)) for i in range(150)]
    (tmp_path / "texts" / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    reward = HERE / "experiments" / "rewards" / "length.py"
    args = ("--quick", "--n", 2, "--data", "texts", "--reward", reward, "--steps", 1)
    _, printed, _ = run(*args, cwd=tmp_path)
    assert read_rows(tmp_path / "out")[0]["length"] == 64
    assert "100% of them are longer than 4 + 64 tokens" in printed
    assert "Responses that do not end within 64 tokens, but are cut: reference" in printed

# ----------------------------------------------------------------------------------- --sample alone

def test_a_folder_is_enough_to_sample_from_its_run(copied_run):
    before = {path.name for path in (copied_run / "out" / "cache").iterdir()}
    status, printed, error = run("--sample", "i watched this", cwd=copied_run)
    assert (status, error) == (0, "")
    assert printed.count("vBoN") == printed.count("best of 2") == 3
    assert {path.name for path in (copied_run / "out" / "cache").iterdir()} == before
    # the same responses as with all flags
    _, all_flags, _ = run("--quick", "--n", 2, "--sample", "i watched this", cwd=copied_run)
    assert printed == all_flags


def test_a_folder_of_several_runs_says_which_flags_decide(copied_run):
    assert run("--quick", "--n", 3, cwd=copied_run)[0] == 0
    status, printed, error = run("--sample", "i watched this", cwd=copied_run)
    assert (status, printed) == (2, "")
    assert "out holds several runs; add one of: --n 2 --seed 0; --n 3 --seed 0" in error
    status, printed, _ = run("--sample", "i watched this", "--n", 3, cwd=copied_run)
    assert (status, printed.count("best of 3")) == (0, 3)


def test_sample_alone_does_not_train_for_minutes(tmp_path):
    status, printed, error = run("--sample", "i watched this", cwd=tmp_path)
    assert (status, printed) == (2, "")
    assert "out holds no finished run; name its folder by --out" in error


def test_the_reward_of_a_run_is_kept_with_it(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def reward(prompts, responses):\n    return [7.25 for r in responses]\n",
                    encoding="utf-8")
    assert run("--quick", "--n", 2, "--reward", path, cwd=tmp_path)[0] == 0
    path.write_text("def reward(prompts, responses):\n    return [-3 for r in responses]\n",
                    encoding="utf-8")
    status, printed, _ = run("--sample", "i watched this", cwd=tmp_path)
    assert status == 0
    assert printed.count("+7.25") == 9
    settings = json.loads((tmp_path / "out/policy-n2-seed0/settings.json").read_text(
        encoding="utf-8"))
    assert settings["given"] == {"data": None, "reward": str(path), "init": None}


def test_words_that_the_texts_do_not_have_are_named(copied_run):
    for flags in ((), ("--quick", "--n", 2)):
        _, printed, _ = run(*flags, "--sample", "i watched zebras 🦓", cwd=copied_run)
        assert printed.startswith("Never seen in the texts: zebras, 🦓\n")
    _, printed, _ = run("--sample", "i watched this", cwd=copied_run)
    assert "Never seen" not in printed

# ------------------------------------------------------------------------------------ from Python

def test_a_run_in_python_has_what_the_table_says(copied_run, monkeypatch, capsys):
    monkeypatch.chdir(copied_run)
    found = train.main(["--quick", "--n", "2", "--out", "out"])
    assert "vBoN n=2" not in capsys.readouterr().out     # it comes from the cache
    rows = read_rows("out")
    for row, again in zip(rows, found.rows):
        assert {key: row[key] for key in again if key != "seconds"} == {
            key: again[key] for key in again if key != "seconds"}
    # F, log-probabilities and targets of single responses
    samples = found.world.samples
    prompt = samples.prompt[:1]
    response, logprob = found.policy.sample(prompt, 3, 24, torch.Generator().manual_seed(0))
    reward = found.world.reward(prompt, response)
    ref_logprob = found.world.reference.logprob(prompt, response)
    target = vbon.bon_target(ref_logprob, reward, samples.reward[:1], 2)
    assert logprob.shape == target.shape == (1, 3)
    # the log-probability of a given text
    given = encode(found.world.text.encoding, [" was great ."], 24)[None]
    assert found.policy.logprob(prompt, given).shape == (1, 1)
    assert len(found.history) == 3


def test_a_run_in_python_changes_nothing_of_the_callers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = (torch.get_rng_state(), torch.get_num_threads(), sys.stdout)
    train.main(["--quick", "--n", "2"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), sys.stdout) == before[1:]
    with pytest.raises(ValueError, match="--n 0: want at least 1"):
        train.main(["--n", "0"])


def test_the_file_of_tests_runs_its_tests():
    done = subprocess.run([sys.executable, HERE / "test_vbon.py", "--collect-only"], text=True,
                          capture_output=True, cwd=HERE, env={"PYTEST_ADDOPTS": "-k by_hand"},
                          timeout=60)
    assert "passed" in done.stdout
