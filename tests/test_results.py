"""What a run leaves: results.jsonl, responses, models; --sample; the same from Python."""
import json
import math

import pytest
import torch
from running import read_lines, read_rows, run

import train
from support import results
from support.huggingface import load_model
from support.kept import digest, load
from support.results import METRICS

POLICY = "out/policy-n2-seed0"
KEYS = {"method", "n", "seed", "beta", "reward", "reward_se", "win_rate", "win_rate_se", "kl_ref",
        "kl_ref_se", "kl_bon", "kl_bon_se", "positive", "samples_per_answer", "seconds", "code"}


def read_settings(folder):
    return json.loads((folder / "settings.json").read_text(encoding="utf-8"))

# ----------------------------------------------------------------------------------- results.jsonl

def test_each_row_has_all_keys_finite_metrics_and_what_made_it(finished_run):
    text = (finished_run / "out" / "results.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["method"], row["samples_per_answer"]) for row in rows] == [
        ("ref", 1), ("bon", 2), ("vbon", 1)]
    made_by = {"n": 2, "seed": 0, "beta": None, "m": 16, "vocab": 400, "length": 24, "prompts": 8,
               "quick": True, "device": "cpu", "data": None, "init": None, "reward_file": None}
    for row in rows:
        assert row.keys() >= KEYS
        assert all(math.isfinite(row[name]) for name in row.keys() & METRICS)
        assert row == row | made_by


def test_rows_are_appended_once_and_a_line_that_was_cut_short_is_removed(tmp_path):
    row = {name: 1 for name in KEYS}
    results.add_results(tmp_path, [row])
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes() + b'{"method": "r')
    assert results.read_results(tmp_path) == [row]
    # the same settings, in any order, with other metrics
    known = dict(reversed(row.items())) | {"reward": 7}
    results.add_results(tmp_path, [known, row | {"n": 2}])
    assert path.read_bytes().count(b"\n") == 2
    assert results.read_results(tmp_path) == [row, row | {"n": 2}]


@pytest.mark.parametrize("line", [b"not json", b"", b"\xff\xfe"])
def test_a_damaged_line_is_refused_before_any_work_and_stays(line, tmp_path):
    path = tmp_path / "out" / "results.jsonl"
    path.parent.mkdir()
    content = b'{"method": "ref"}\n' + line + b"\n"
    path.write_bytes(content)
    status, printed, error = run("--quick", "--n", 2, cwd=tmp_path)
    assert (status, printed) == (2, "")
    assert "results.jsonl: a line is damaged" in error
    assert path.read_bytes() == content

# ---------------------------------------------------------------------------- responses and models

def test_the_table_has_the_means_of_the_records(finished_run):
    out = finished_run / "out"
    policy = read_lines(out / "responses-policy-n2-seed0.jsonl")
    reference = read_lines(out / "responses-reference-seed0.jsonl")
    candidates = [row for row in reference if row["use"] == "candidate"]
    refs = [row for row in reference if row["use"] == "estimates F"]
    assert (len(policy), len(candidates), len(refs)) == (64, 512, 512)
    assert [row["response"] for row in refs] != [row["response"] for row in candidates]
    first, best, last = read_rows(out)
    for row, records in ((first, candidates), (last, policy)):
        for name, key in (("reward", "reward"), ("kl_ref", "token_kl")):
            mean = sum(record[key] for record in records) / len(records)
            assert row[name] == pytest.approx(mean, abs=1e-6)
        positive = sum(record["reward"] > 0 for record in records) / len(records)
        assert row["positive"] == pytest.approx(positive)
    # the best of each two candidates
    pairs = torch.tensor([record["reward"] for record in candidates]).view(256, 2)
    assert best["reward"] == pytest.approx(pairs.amax(1).mean().item(), abs=1e-6)
    assert {record["method"] for record in policy} == {"vbon"}
    assert ({(record["prompt_id"], record["prompt"]) for record in policy}
            == {(record["prompt_id"], record["prompt"]) for record in reference})
    assert results.one_line("two\nlines\r\nof text") == "two\\nlines\\nof text"


def test_a_run_leaves_these_files_and_both_models_with_their_settings(finished_run):
    out = finished_run / "out"
    assert {path.name for path in out.iterdir()} == {
        ".gitignore", "cache", "history-n2-seed0.jsonl", "policy-n2-seed0",
        "reference-seed0", "responses-policy-n2-seed0.jsonl",
        "responses-reference-seed0.jsonl", "results.jsonl", "samples.txt", "vbon.png"}
    assert (out / ".gitignore").read_text(encoding="utf-8") == "*\n"
    assert (out / "samples.txt").read_text(encoding="utf-8").count("\n  best of 2 ") == 8
    rows = read_rows(out)
    for name, row, stage, key in (("reference-seed0", rows[0], "reference-model-*.pt", "model"),
                                  ("policy-n2-seed0", rows[2], "policy-vbon-*.pt", "policy")):
        # the folder holds what the stage holds
        path, = (out / "cache").glob(stage)
        weights = digest(load(path)[key].state_dict())
        assert digest(load_model(out / name).state_dict()) == weights
        given = {"data": None, "reward": None, "init": None}
        made_by = {key: row[key] for key in row if key not in METRICS}
        assert read_settings(out / name) == made_by | {"weights": weights, "given": given}


def test_an_export_that_was_killed_is_repaired_by_the_same_command(copied_run):
    """The settings.json of the policy is written last."""
    before = read_settings(copied_run / POLICY)
    (copied_run / POLICY / "settings.json").unlink()
    (copied_run / POLICY / "model.safetensors").write_bytes(b"")
    _, _, error = run("--n", 2, "--sample", "i", cwd=copied_run)
    assert "out has no finished run with --n 2 --seed 0 (policies: policy-n2-s" in error
    assert run("--quick", "--n", 2, cwd=copied_run)[0] == 0
    assert read_settings(copied_run / POLICY) == before
    load_model(copied_run / POLICY)

# ---------------------------------------------------------------------------------------- --sample

def test_an_own_prompt_gets_three_responses_of_each_of_the_three(copied_run):
    before = sorted((copied_run / "out").rglob("*"))
    status, printed, error = run("--n", 2, "--sample", " i\twatched <br />this", cwd=copied_run)
    assert (status, error) == (0, "")
    titles = [line.strip().split("  ")[0] for line in printed.splitlines()]
    assert titles == 3 * ["i watched this ...", "reference", "best of 2", "vBoN"]
    assert sorted((copied_run / "out").rglob("*")) == before    # nothing is trained
    # there must be room for a response of one token
    assert run("--n", 2, "--sample", "q" * 27, cwd=copied_run)[0] == 0
    _, _, error = run("--n", 2, "--sample", "q" * 28, cwd=copied_run)
    assert "--sample: want fewer than 28 tokens, got 28" in error

# ------------------------------------------------------------------------------------- from Python

def test_a_run_in_python_has_what_the_table_says(copied_run, monkeypatch):
    monkeypatch.chdir(copied_run)
    state = torch.get_rng_state()
    found = train.main(["--quick", "--n", "2", "--out", "out"])
    assert torch.equal(torch.get_rng_state(), state)
    assert [row["kl_bon"] for row in read_rows("out")] == [row["kl_bon"] for row in found.rows]
    # kept rewards and log-probabilities are those of the responses
    world = found.world
    for samples in (world.samples, world.held_out, world.candidates):
        assert torch.equal(world.reward(samples.prompt, samples.response), samples.reward)
        with torch.no_grad():
            scored = world.reference.logprob(samples.prompt, samples.response)
        assert torch.allclose(scored, samples.logprob, rtol=0, atol=1e-3)
