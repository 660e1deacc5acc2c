"""The stages of train.py: what they keep, what they depend on, and what the evaluation says."""
import contextlib
import dataclasses
import importlib
import io
import math
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from running import HERE, read_rows, run

import train
import vbon
from reward import builtin_reviews

QUICK = train.choose_settings(train.parse_arguments(["--quick"]), 2, None, None)
FILES = ("vbon", "model", "reward", "train")


def cached(out):
    """The stages in the cache, such as "samples-held-out-seed0-0774be4f673f"."""
    return {path.stem for path in (out / "cache").glob("*.pt")}


def stages(names):
    """The names without seed and code, such as "samples-held-out"."""
    return {name.split("-seed")[0] for name in names}


SAMPLES = {"samples-training", "samples-held-out", "samples-draws"}
POLICY = {"policy-vbon-n2"}
ALL = {"reference-model"} | SAMPLES | POLICY

# ------------------------------------------------------------------------ what a stage depends on

def run_edited(folder):
    """A quick run of the program as it now stands in a folder."""
    ours = {name: sys.modules.pop(name) for name in FILES if name in sys.modules}
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True                      # two edits may come in one second
    importlib.invalidate_caches()
    printed = io.StringIO()
    try:
        program = importlib.import_module("train")
        with contextlib.redirect_stdout(printed):
            program.main(["--quick", "--n", "2", "--out", str(folder / "out")])
    finally:
        sys.path.remove(str(folder))
        sys.modules.update(ours)
    return printed.getvalue()


EDITS = {
    "vbon.py": ("_count = _count_less_and_equal\n"
                "def _count_less_and_equal(reward, ref_rewards):\n"
                "    return _count(-reward, -ref_rewards)\n", POLICY),
    "train.py": ("_tune = fine_tune\n"
                 "def fine_tune(*given):\n"
                 "    path, reference, reward_fn, prompts, ref_rewards, *rest = given\n"
                 "    return _tune(path, reference, reward_fn, prompts, -ref_rewards, *rest)\n",
                 POLICY),
    "reward.py": ("_forward = Classifier.forward\n"
                  "Classifier.forward = lambda self, tokens: 3 * _forward(self, tokens)\n",
                  SAMPLES | POLICY),
    "model.py": ("_states = GPT.states\n"
                 "GPT.states = lambda self, *given: 1.1 * _states(self, *given)\n", ALL),
}


@pytest.mark.parametrize("file", EDITS)
def test_a_readers_edit_repeats_what_it_can_change_and_nothing_else(file, tmp_path, finished_run):
    for name in FILES:
        shutil.copy(HERE / f"{name}.py", tmp_path)
    shutil.copytree(finished_run / "out", tmp_path / "out")
    code, repeated = EDITS[file]
    path = tmp_path / file
    text = path.read_text(encoding="utf-8")
    path.write_text(text + "\n\n" + code, encoding="utf-8")
    before = cached(tmp_path / "out")
    run_edited(tmp_path)
    new = cached(tmp_path / "out") - before
    assert stages(new) == repeated
    # the edit was not in vain
    rows = read_rows(tmp_path / "out")
    assert len(rows) == 6
    assert rows[5]["win_rate"] != rows[2]["win_rate"]


@pytest.mark.parametrize("old, new, repeated", [
    ("(step + 1) / 20", "(step + 1) / 19", ALL),                            # in train_reference
    ("prompts.split(max(1, 1024 // k))", "prompts.split(2)", SAMPLES | POLICY),  # in draw_samples
    ("(2 * progress - 1)", "(2 * progress - 1.1)", POLICY),                 # in fine_tune
])
def test_an_edit_of_one_stage_of_train_repeats_it(old, new, repeated, tmp_path, finished_run):
    for name in FILES:
        shutil.copy(HERE / f"{name}.py", tmp_path)
    shutil.copytree(finished_run / "out", tmp_path / "out")
    text = (tmp_path / "train.py").read_text(encoding="utf-8")
    assert text.count(old) == 1
    (tmp_path / "train.py").write_text(text.replace(old, new), encoding="utf-8")
    before = cached(tmp_path / "out")
    run_edited(tmp_path)
    assert stages(cached(tmp_path / "out") - before) == repeated


def test_a_copy_of_the_program_without_edits_repeats_nothing(tmp_path, finished_run):
    for name in FILES:
        shutil.copy(HERE / f"{name}.py", tmp_path)
    shutil.copytree(finished_run / "out", tmp_path / "out")
    before = cached(tmp_path / "out")
    run_edited(tmp_path)
    assert cached(tmp_path / "out") == before
    assert read_rows(tmp_path / "out") == read_rows(finished_run / "out")


@pytest.mark.parametrize("name, value, repeated", [
    ("k_eval", 9, set()),
    ("m_eval", 65, {"samples-held-out", "samples-draws"}),
    ("steps", 4, POLICY),
    ("batch", 5, POLICY),
    ("k", 5, POLICY),
    ("rank", 3, POLICY),
    ("lr", 1e-3, POLICY),
    ("m", 17, {"samples-training"} | POLICY),
    ("prompts", 9, {"samples-training"} | POLICY),
    ("held_prompts", 9, SAMPLES | POLICY),
    ("epochs", 2, SAMPLES | POLICY),
    ("lm_steps", 11, ALL),
    ("length", 25, ALL),
])
def test_a_setting_repeats_what_depends_on_it(name, value, repeated, copied_run, monkeypatch):
    other = dataclasses.replace(QUICK, **{name: value})
    monkeypatch.setattr(train, "choose_settings", lambda *_: other)
    monkeypatch.setattr(train, "draw_picture", train.silent)
    before = cached(copied_run / "out")
    assert run("--quick", "--n", 2, cwd=copied_run)[0] == 0
    assert stages(cached(copied_run / "out") - before) == repeated


def test_the_learning_rate_is_constant_for_half_of_the_steps_and_then_falls():
    rates = [train.decay(step, 8) for step in range(8)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([1, 1, 1, 1, 1, (1 + half) / 2, 0.5, (1 - half) / 2])


def test_the_accuracy_is_that_of_the_sign_on_unseen_reviews():
    text = train.make_text(None, None, QUICK, 0)
    reward, accuracy = train.get_reward(text, QUICK, 0, torch.device("cpu"))
    unseen = text.tokens[:text.n_unseen]
    logit = reward.fn(unseen[:, :4], unseen[:, None, 4:])[:, 0]
    right = (logit > 0) == (text.labels[:text.n_unseen] == 1)
    assert accuracy == pytest.approx(right.float().mean().item())
    assert 0.5 < accuracy < 1


def test_another_n_needs_a_policy_and_nothing_else(copied_run):
    before = cached(copied_run / "out")
    assert run("--quick", "--n", 3, cwd=copied_run)[0] == 0
    assert stages(cached(copied_run / "out") - before) == {"policy-vbon-n3"}


def test_another_seed_repeats_everything(copied_run):
    before = cached(copied_run / "out")
    assert run("--quick", "--n", 2, "--seed", 1, cwd=copied_run)[0] == 0
    assert stages(cached(copied_run / "out") - before) == ALL


def test_a_run_does_not_depend_on_what_ran_before(copied_run, tmp_path):
    assert run("--quick", "--n", 3, cwd=copied_run)[0] == 0
    assert run("--quick", "--n", 3, "--out", "alone", cwd=tmp_path)[0] == 0
    assert read_rows(copied_run / "out")[3:] == read_rows(tmp_path / "alone")


@pytest.mark.parametrize("left", [0, 10, -100])
def test_a_damaged_file_of_the_cache_is_made_again(left, copied_run, finished_run):
    victim = next((copied_run / "out" / "cache").glob("samples-held-out-*"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:left])
    status, printed, _ = run("--quick", "--n", 2, cwd=copied_run)
    assert status == 0
    assert "samples (held-out) 1/1" in printed
    assert "samples (training) 1/1" not in printed
    if left != 0:
        assert victim.name in printed                   # it says so
    assert read_rows(copied_run / "out") == read_rows(finished_run / "out")


def test_the_picture_shows_the_numbers_of_the_table(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def samples(m):
        reward = torch.randn(3, m, generator=generator).double()
        return train.Samples(torch.zeros(3, m, 1), -torch.ones(3, m), reward, 0.0)

    held = samples(64)
    draws = samples(40)
    rewards = 1 + torch.randn(3, 20, generator=generator)
    rows = [{"method": method, "n": 4, "reward": i / 10, "kl_ref": i / 20, "win_rate": 0.5 + i / 10}
            for i, method in enumerate(["ref", "bon", "vbon"])]
    history = [{"kl_ref": i / 30, "win_rate": 0.5 + i / 30} for i in range(5)]
    pyplot = train.plain_pyplot()
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)    # to look at it after it was drawn
    train.draw_picture(tmp_path / "a.png", rows, draws, held, rewards, history, 0)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"

    left, right = figures[0].axes
    # left: histograms of the rewards; their means, as in the table, are dotted lines
    assert [line.get_xdata()[0] for line in left.lines] == [0.0, 0.1, 0.2]
    best = draws.reward.view(3, 10, 4).max(-1).values
    for patch, wanted in zip(left.patches, (draws.reward, best, rewards)):
        corners = patch.get_xy()
        area = 0.0
        moment = 0.0
        for (x, y), (next_x, _) in zip(corners, corners[1:]):
            if next_x > x and y > 0:                        # the top of a bin
                area += (next_x - x) * y
                moment += (next_x - x) * y * (x + next_x) / 2
        assert area == pytest.approx(1, abs=1e-6)
        inside = wanted[(wanted > draws.reward.min() - 0.1) & (wanted < draws.reward.max() + 0.1)]
        assert moment == pytest.approx(inside.mean().item(), abs=0.08)
    # right: theory, the way of the policy, where it ended, and best of 4
    theory, way, end, four = [line.get_xydata().tolist() for line in right.lines]
    assert theory == [list(vbon.bon_attains(held.reward, n)) for n in range(1, 13)]
    assert way == [[i / 30, 0.5 + i / 30] for i in range(5)]
    assert end == [[0.1, 0.7]]
    assert four == [theory[3]]
    low, high = right.get_xlim()
    assert low < 0 and theory[3][0] < high == pytest.approx(1.7 * theory[3][0] + 0.1)
    monkeypatch.undo()
    pyplot.close("all")


def test_nothing_but_finished_files_is_left(finished_run):
    names = {path.name for path in (finished_run / "out").iterdir()}
    assert names == {"cache", "policy-n2-seed0", "reference-seed0", "results.jsonl", "samples.txt",
                     "vbon.png"}
    kept = {path.name for path in (finished_run / "out" / "cache").iterdir()}
    assert stages(kept - {"results.lock"}) == ALL


def test_a_killed_run_ends_with_the_same_numbers(tmp_path):
    args = ["--quick", "--n", "2", "--steps", "30"]
    assert run(*args, "--out", "whole", cwd=tmp_path)[0] == 0
    killed = subprocess.Popen([sys.executable, HERE / "train.py", *args, "--out", "killed"],
                              cwd=tmp_path, stdout=subprocess.DEVNULL)
    while killed.poll() is None and not list(tmp_path.glob("killed/cache/*.checkpoint")):
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() != 0                           # it had not finished
    status, printed, _ = run(*args, "--out", "killed", cwd=tmp_path)
    assert status == 0
    assert "going on after step" in printed
    assert read_rows(tmp_path / "killed") == read_rows(tmp_path / "whole")

# ------------------------------------------------------------------------------- several processes

TWO = """
# The main job, watched; then its group of processes put to the test.
import sys
import torch
import torch.distributed
import train

seen = []
update = train.vbon.update


def watched(*args):
    prompt, generator = args[4], args[9]
    seen.append((prompt.tolist(), generator.initial_seed()))
    return update(*args)


train.vbon.update = watched
train.main(sys.argv[1:])

both = [None, None]
torch.distributed.all_gather_object(both, seen)
first, second = both
seeds = []
for (rows, seed), (other_rows, other_seed) in zip(first, second, strict=True):
    # two halves of one batch of four different prompts
    assert len(rows) == len(other_rows) == 2
    assert len({tuple(row) for row in rows + other_rows}) == 4
    seeds += [seed, other_seed]
assert first[0][0] != first[1][0], "each step has another batch"
assert len(seeds) == len(set(seeds)) == 4, "each process and step draws its own numbers"

p = torch.nn.Parameter(torch.zeros(2))
p.grad = torch.full((2,), train.my_rank() + 1.0)
optimizer = torch.optim.SGD([p], 1.0)
train.average_gradients(optimizer)
optimizer.step()
assert p.tolist() == [-1.5, -1.5], "gradients are averaged"
print("all is well", file=sys.stderr)
"""


def test_two_processes_draw_what_one_draws_and_share_each_batch(tmp_path):
    (tmp_path / "two.py").write_text(TWO, encoding="utf-8")
    args = ["--quick", "--n", "2", "--steps", "2", "--m", "400", "--out"]    # several parts to draw
    assert run(*args, "one", cwd=tmp_path)[0] == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr",
                "127.0.0.1", "--nproc_per_node=2", "--"]
    done = subprocess.run([*torchrun, "two.py", *args, "two"], cwd=tmp_path, text=True,
                          capture_output=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("all is well") == 2
    assert done.stdout.count("theory") == 1             # one of them prints
    for name in SAMPLES:
        path, = (tmp_path / "one" / "cache").glob(f"{name}-*")
        one = train.load(path)
        two = train.load(tmp_path / "two" / "cache" / path.name)
        assert (one["response"] == two["response"]).double().mean() > 0.99
    ours = read_rows(tmp_path / "one")
    theirs = read_rows(tmp_path / "two")
    assert [row["processes"] for row in ours + theirs] == [1, 1, 1, 2, 2, 2]
    for one, two in zip(ours[:2], theirs[:2]):          # those that are not trained
        for key in train.MEASURED[:-1]:
            assert one[key] == pytest.approx(two[key], abs=1e-3), key


def test_more_processes_than_prompts_are_refused(monkeypatch):
    monkeypatch.setattr(train, "world_size", lambda: 3)
    assert train.my_share(torch.arange(7)).tolist() == [0, 3]
    with pytest.raises(train.UnusableInput, match="3 processes cannot share 2 prompts"):
        train.my_share(torch.arange(2))

# -------------------------------------------------------------------------------------- evaluation

def test_metrics_by_hand():
    ref_rewards = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(3, 4)
    reward = torch.tensor([[0.5, 2.5], [5.0, 7.0], [2.5, -5.0]])
    ref_logprob = torch.full((3, 2), -9.0)
    row = train.metrics(ref_logprob + 1, ref_logprob, reward, ref_rewards, 2)
    assert row["reward"] == pytest.approx(12.5 / 6)
    assert row["win_rate"] == pytest.approx((0.25 + 0.75 + 1 + 1 + 0.75 + 0) / 6)
    assert row["positive"] == pytest.approx(5 / 6)
    assert (row["kl_ref"], row["kl_ref_se"]) == (1, 0)
    # no reference reward ties, so log π_bon - log π_ref = log(2 F + π_ref)
    cdf = torch.tensor([2, 4, 5, 5, 4, 1]).double() / 5
    log_ratio = (2 * cdf + torch.tensor(-9.0).double().exp()).log()
    assert row["kl_bon"] == pytest.approx(1 - log_ratio.mean().item())


def test_a_standard_error_counts_each_prompt_once():
    x = torch.tensor([[1.0, 3.0], [5.0, 7.0], [3.0, -5.0]])
    mean, error = train.mean_and_error(x)
    assert mean == pytest.approx(7 / 3)
    by_hand = torch.tensor([2.0, 6.0, -1.0]).std().item() / 3 ** 0.5
    assert error == pytest.approx(by_hand)
    # the same responses twice tell nothing new
    assert train.mean_and_error(torch.cat([x, x], 1))[1] == pytest.approx(by_hand)


def test_a_quieter_estimate_takes_the_place_of_the_kl():
    logprob = torch.zeros(2, 3)
    row = train.metrics(logprob, logprob, logprob, logprob, 2, kl_ref=logprob + 5)
    assert row["kl_ref"] == 5


def test_the_best_of_each_n_draws_is_chosen():
    reward = torch.tensor([[1.0, 4.0, 3.0, 2.0, 9.0], [0.0, -1.0, 5.0, 6.0, 9.0]])
    draws = train.Samples(None, reward - 20, reward, 0.0)
    logprob, best = train.choose_best(draws, 2, 0)      # the fifth draw is left over
    assert best.tolist() == [[4, 3], [0, 6]]
    assert torch.equal(logprob, best - 20)


def simulated(m, seed):
    """Draws whose reward is uniform: its own CDF. Each response is improbable."""
    g = torch.Generator().manual_seed(seed)
    return train.Samples(None, torch.full((200, m), -50.0), torch.rand(200, m, generator=g), 0.0)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_row_of_best_of_n_is_its_theory(n):
    row = train.best_of_n_row(simulated(100 * n, 1), simulated(2000, 2), n, 0)
    kl, win = vbon.bon_theory(n)
    assert row["win_rate"] == pytest.approx(win, abs=0.006)
    assert row["kl_ref"] == pytest.approx(kl, abs=0.03)
    assert row["kl_bon"] == 0
    assert row["samples_per_answer"] == n


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_row_of_the_reference_is_its_theory(n):
    row = train.reference_row(simulated(500, 1), simulated(2000, 2), n)
    assert row["win_rate"] == pytest.approx(0.5, abs=0.01)
    assert row["kl_ref"] == 0
    assert row["kl_bon"] == pytest.approx(n - 1 - torch.tensor(n).log().item(), rel=0.04, abs=1e-9)
    assert row["samples_per_answer"] == 1


def load_samples(out, name):
    path, = (out / "cache").glob(f"samples-{name}-*")
    return train.Samples(**train.load(path))


def test_f_is_estimated_from_other_draws_than_best_of_n_chose_from(finished_run):
    draws = load_samples(finished_run / "out", "draws")
    held = load_samples(finished_run / "out", "held-out")
    assert draws.reward.shape == held.reward.shape == (8, 64)
    assert not (draws.response == held.response).all(-1).any(1).all()
    # the rows of the table come from these two
    reference, best, _ = read_rows(finished_run / "out")
    for row, again in ((reference, train.reference_row(draws, held, 2)),
                       (best, train.best_of_n_row(draws, held, 2, 0))):
        del again["seconds"]
        assert row == row | again


def test_cached_rewards_and_logprobs_are_those_of_the_responses(finished_run):
    samples = load_samples(finished_run / "out", "training")
    text = train.make_text(None, None, QUICK, 0)
    reward, _ = train.get_reward(text, QUICK, 0, torch.device("cpu"))
    path, = (finished_run / "out" / "cache").glob("reference-model-*")
    reference = train.load_model(train.load(path), torch.device("cpu"))
    assert torch.equal(reward.fn(text.prompts, samples.response), samples.reward)
    with torch.no_grad():
        scored = reference.logprob(text.prompts, samples.response)
    assert torch.allclose(scored, samples.logprob, rtol=0, atol=1e-3)

# -------------------------------------------------------------- what is trained on, and what is not

def test_held_out_prompts_are_not_trained_on():
    text = train.make_text(None, None, QUICK, 0)
    trained = {tuple(ids) for ids in text.prompts.tolist()}
    held = {tuple(ids) for ids in text.held_prompts.tolist()}
    assert len(trained) == len(held) == 8
    assert not trained & held


def test_no_prompt_contains_an_end():
    short = [("a", 1), ("b", 0)] + builtin_reviews(600, 0)
    text = train.make_text(short, None, QUICK, 0)
    prompts = torch.cat([text.prompts, text.held_prompts])
    assert (prompts != text.encoding.eot_token).all()


def change_unseen(text):
    """The same text with other unseen reviews."""
    tokens = text.tokens.clone()
    tokens[:text.n_unseen] = tokens[text.n_unseen:2 * text.n_unseen]
    labels = text.labels.clone()
    labels[:text.n_unseen] = 1 - labels[:text.n_unseen]
    return text._replace(tokens=tokens, labels=labels)


def test_the_reference_model_does_not_see_the_unseen_reviews():
    text = train.make_text(None, None, QUICK, 0)
    shape = dict(vocab_size=text.encoding.n_vocab, block_size=28, n_layer=1, n_head=2, n_embd=16)
    one = train.train_reference(text, None, shape, QUICK, 0, torch.device("cpu"))
    two = train.train_reference(change_unseen(text), None, shape, QUICK, 0, torch.device("cpu"))
    for name in one["weights"]:
        assert torch.equal(one["weights"][name], two["weights"][name])
    assert one["nats"] != two["nats"]                   # but it is judged by them


def test_the_classifier_does_not_see_the_unseen_reviews():
    text = train.make_text(None, None, QUICK, 0)
    one, accuracy = train.get_reward(text, QUICK, 0, torch.device("cpu"))
    two, other_accuracy = train.get_reward(change_unseen(text), QUICK, 0, torch.device("cpu"))
    assert train.digest(one.depends_on) == train.digest(two.depends_on)
    assert accuracy != other_accuracy


def test_fine_tuning_raises_the_win_rate_and_the_picture_gets_its_history(tmp_path):
    args = ["--quick", "--n", 4, "--steps", 60]
    status, printed, _ = run(*args, cwd=tmp_path)
    assert status == 0
    reference, _, policy = read_rows(tmp_path / "out")
    assert policy["win_rate"] > reference["win_rate"] + 0.1
    path, = (tmp_path / "out" / "cache").glob("policy-*")
    history = train.load(path)["history"]
    assert len(history) == 60
    assert set(history[0]) == {"win_rate", "kl_ref", "kl_target"}
    assert abs(history[0]["kl_ref"]) < 1e-4             # the policy starts as the reference
