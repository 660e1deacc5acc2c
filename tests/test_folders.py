"""The models that a run leaves: Hugging Face folders, written whole, from which a run can start."""
import json

import pytest
import torch
from running import read_rows, run

from model import GPT
from support.huggingface import load_model
from support.digest import digest, weights
from support.kept import load
from support.results import METRICS
from support.tokenizer import pretrained_encoding

POLICY = "out/policy-n2-seed0"
REFERENCE = "out/reference-seed0"


def settings(folder):
    return json.loads((folder / "settings.json").read_text(encoding="utf-8"))


def test_both_models_are_left_with_their_settings(finished_run):
    rows = read_rows(finished_run / "out")
    kept = {}
    for name, row in ((REFERENCE, rows[0]), (POLICY, rows[2])):
        folder = finished_run / name
        files = {path.name for path in folder.iterdir()}
        assert files == {"config.json", "generation_config.json", "model.safetensors",
                         "tokenizer.json", "tokenizer_config.json", "settings.json"}
        # the line of the results file, without what was measured
        content = settings(folder)
        named = content.pop("weights")
        assert content.pop("given") == {"data": None, "reward": None, "init": None}
        assert content == {key: row[key] for key in row if key not in METRICS}
        kept[name] = load_model(folder)
        assert named == digest(weights(kept[name]))
        assert pretrained_encoding(folder).n_vocab == kept[name].config["vocab_size"]
    # the folders hold what the stages hold
    for name, stage in ((REFERENCE, "reference-model-*"), (POLICY, "policy-vbon-*")):
        path, = (finished_run / "out" / "cache").glob(stage + ".pt")
        stored = load(path)["weights"]
        for key, x in kept[name].state_dict().items():
            assert torch.equal(x, stored[key]), key


def test_a_folder_of_other_settings_is_replaced_and_the_run_says_so(copied_run):
    before = settings(copied_run / POLICY)
    _, printed, _ = run("--quick", "--n", 2, cwd=copied_run)
    assert "replaced" not in printed
    _, printed, _ = run("--quick", "--n", 2, "--steps", 4, cwd=copied_run)
    assert f"{POLICY} was made with other settings: it is replaced" in printed
    assert f"{REFERENCE} was" not in printed             # the reference is the same
    after = settings(copied_run / POLICY)
    assert (before["steps"], after["steps"]) == (3, 4)
    # nothing else is left
    assert not list((copied_run / "out" / "cache").glob("*.part"))
    assert len(list((copied_run / "out").glob("policy-*"))) == 1


@pytest.mark.parametrize("name", [POLICY, REFERENCE])
def test_a_run_does_not_write_over_the_model_it_starts_from(name, copied_run):
    before = settings(copied_run / name)
    status, printed, error = run("--quick", "--n", 2, "--init", name, cwd=copied_run)
    assert (status, printed) == (2, "")
    assert f"--init {name}: this run would overwrite it" in error
    assert settings(copied_run / name) == before


def test_a_second_round_starts_from_the_first(copied_run):
    args = ("--quick", "--n", 2, "--init", POLICY, "--lm-steps", 0, "--out", "second")
    status, _, error = run(*args, cwd=copied_run)
    assert (status, error) == (0, "")
    first = load_model(copied_run / POLICY).state_dict()
    second = load_model(copied_run / "second" / "reference-seed0").state_dict()
    for key, x in first.items():
        assert torch.equal(x, second[key]), key
    # the lines of the second round name the first
    rows = read_rows(copied_run / "second")
    assert {row["init"] for row in rows} == {settings(copied_run / POLICY)["weights"]}


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / REFERENCE).mkdir(parents=True)
    (tmp_path / REFERENCE / "thesis.txt").write_text("mine", encoding="utf-8")
    status, printed, error = run("--quick", "--n", 2, cwd=tmp_path)
    assert (status, printed) == (2, "")
    assert f"{REFERENCE}: not made by this program" in error
    assert (tmp_path / REFERENCE / "thesis.txt").exists()


def test_damaged_settings_are_refused_before_any_work(copied_run):
    (copied_run / POLICY / "settings.json").write_text("{", encoding="utf-8")
    status, printed, error = run("--quick", "--n", 2, cwd=copied_run)
    assert (status, printed) == (2, "")
    assert "settings.json: not a JSON file" in error


def test_a_question_leaves_no_models(tmp_path):
    args = ("--quick", "--n", 2, "--sample", "i watched this film")
    assert run(*args, cwd=tmp_path)[0] == 0
    assert not (tmp_path / POLICY).exists()
