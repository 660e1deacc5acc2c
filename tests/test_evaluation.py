"""The stages of train.py: what the evaluation says, and what is trained on."""
import math
import random

import pytest
import torch
from running import read_rows, run

import train
from experiments import theory
from model import GPT, response_mask
from support import kept
from support.inputs import Inputs
from support.options import make_parser
from support.reference_model import train_reference
from support.reviews import builtin_reviews
from support.settings import choose_settings
from support.text import Text, make_text
from support.tokenizer import train_tokenizer

def test_metrics_by_hand():
    ref_rewards = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(3, 4)
    reward = torch.tensor([[0.5, 2.5], [5.0, 7.0], [2.5, -5.0]])
    ref_logprob = torch.full((3, 2), -9.0)
    row = train.metrics(ref_logprob + 1, ref_logprob, reward, ref_rewards, 2)
    assert row["reward"] == pytest.approx(12.5 / 6)
    assert row["win_rate"] == pytest.approx((0.25 + 0.75 + 1 + 1 + 0.75 + 0) / 6)
    assert row["positive"] == pytest.approx(5 / 6)
    assert (row["kl_ref"], row["kl_ref_se"]) == (1, 0)
    # no reference reward ties, so log π_bon - log π_ref = log(2 F + π_ref), where F + π_ref <= 1
    p = torch.tensor(-9.0).double().exp()
    cdf = torch.minimum(torch.tensor([2, 4, 5, 5, 4, 1]).double() / 5, 1 - p)
    log_ratio = (2 * cdf + p).log()
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


def test_the_best_of_each_n_candidates_is_chosen():
    reward = torch.tensor([[1.0, 4.0, 3.0, 2.0, 9.0], [0.0, -1.0, 5.0, 6.0, 9.0]])
    candidates = train.Samples(None, None, reward - 20, reward, 0.0)
    # the fifth candidate is left over
    assert train.choose_best(candidates, 2, 0).tolist() == [[1, 2], [0, 3]]


def simulated(m, seed):
    """Samples whose reward is uniform: its own CDF. Each response is improbable."""
    g = torch.Generator().manual_seed(seed)
    logprob = torch.full((200, m), -50.0)
    response = torch.arange(m).repeat(200, 1)[..., None]
    return train.Samples(None, response, logprob, torch.rand(200, m, generator=g), 0.0)


def simulated_world(m):
    """m candidates and 2000 reference samples for each of 200 prompts."""
    encoding = train_tokenizer([], 257)                 # 256 is the end
    text = Text(encoding, 1, *[None] * 8)
    return train.World(None, text, None, None, None, simulated(2000, 2), simulated(m, 1), None)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_row_of_best_of_n_is_its_theory(n):
    row = train.best_of_n_row(simulated_world(100 * n), n, 0)
    kl, win = theory.bon_theory(n)
    assert row["win_rate"] == pytest.approx(win, abs=0.006)
    assert row["kl_ref"] == pytest.approx(kl, abs=0.03)
    assert row["kl_bon"] == 0
    assert row["samples_per_answer"] == n
    # the response of token 256 has ended, all others are cut
    assert 0.95 < row["cut"] <= 1
    assert row["theory_win_rate"] == pytest.approx(win)
    assert row["theory_kl"] == pytest.approx(kl, abs=1e-3)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_row_of_the_reference_is_its_theory(n):
    row = train.reference_row(simulated_world(500), n)
    assert row["win_rate"] == pytest.approx(0.5, abs=0.01)
    assert row["kl_ref"] == 0
    assert row["kl_bon"] == pytest.approx(n - 1 - torch.tensor(n).log().item(), rel=0.04, abs=1e-9)
    assert row["samples_per_answer"] == 1


def load_world(out):
    """The world of a finished quick run, from its cache; nothing is made anew."""
    before = {path.name for path in (out / "cache").iterdir()}
    args = make_parser("").parse_args(["--quick", "--n", "2", "--out", str(out)])
    inputs = Inputs(torch.device("cpu"), None, None, None)
    settings = choose_settings(train.Settings(), args, 2, inputs)
    world = train.prepare(args, inputs, settings, 2, 0)
    assert {path.name for path in (out / "cache").iterdir()} == before
    return world, settings


def test_f_is_estimated_from_other_samples_than_best_of_n_chose_from(finished_run):
    world, _ = load_world(finished_run / "out")
    assert world.candidates.reward.shape == world.held_out.reward.shape == (8, 64)
    same = (world.candidates.response == world.held_out.response).all(-1)
    assert not same.any(1).all()
    # the rows of the table come from these two
    reference, best, _ = read_rows(finished_run / "out")
    for row, again in ((reference, train.reference_row(world, 2)),
                       (best, train.best_of_n_row(world, 2, 0))):
        del again["seconds"]
        assert row == row | again


def test_cached_rewards_and_logprobs_are_those_of_the_responses(finished_run):
    world, _ = load_world(finished_run / "out")
    for samples in (world.samples, world.held_out, world.candidates):
        assert torch.equal(world.reward(samples.prompt, samples.response), samples.reward)
        with torch.no_grad():
            scored = world.reference.logprob(samples.prompt, samples.response)
        assert torch.allclose(scored, samples.logprob, rtol=0, atol=1e-3)

# -------------------------------------------------------------- what is trained on, and what is not

def quick_text(reviews=None):
    """The text of a quick run, and its settings."""
    inputs = Inputs(torch.device("cpu"), reviews, None, None)
    args = make_parser("").parse_args(["--quick"])
    settings = choose_settings(train.Settings(), args, 2, inputs)
    return make_text(inputs, settings.text, 0), settings


def test_held_out_prompts_are_not_trained_on():
    text, _ = quick_text()
    trained = {tuple(ids) for ids in text.prompts.tolist()}
    held = {tuple(ids) for ids in text.held_prompts.tolist()}
    assert len(trained) == len(held) == 8
    assert not trained & held


def test_reviews_are_trained_on_or_held_out():
    text, _ = quick_text()
    assert len(text.unseen_tokens) == len(text.unseen_labels) == 30         # a twentieth
    assert len(text.tokens) == len(text.labels) == 570


def test_no_prompt_contains_an_end():
    text, _ = quick_text([("a", 1), ("b", 0)] + builtin_reviews(600, 0))
    prompts = torch.cat([text.prompts, text.held_prompts])
    assert (prompts != text.encoding.eot_token).all()


def test_the_reference_model_does_not_learn_from_held_out_reviews():
    text, settings = quick_text()
    initial = GPT(text.encoding.n_vocab, 28, 1, 2, 16)
    trained = [train_reference(initial, text.tokens, unseen, settings.reference, 0)
               for unseen in (text.unseen_tokens, text.unseen_tokens[:9])]
    for name, x in trained[0]["weights"].items():
        assert torch.equal(x, trained[1]["weights"][name])
    assert trained[0]["nats"] != trained[1]["nats"]     # but it is measured on them


def test_the_perplexity_counts_each_token_once():
    """65 texts are judged in parts of 64 and 1; the last one is odd."""
    text, settings = quick_text()
    odd = torch.full((1, 28), 7)
    unseen = torch.cat([text.tokens[:64], odd])
    initial = GPT(text.encoding.n_vocab, 28, 1, 2, 16)
    trained = train_reference(initial, text.tokens, unseen, settings.reference, 0)
    model = kept.rebuild_model(trained, torch.device("cpu"))
    nats = -model.logprob(unseen[:, :1], unseen[:, None, 1:]).double().sum().item()
    tokens = response_mask(unseen, text.encoding.eot_token)[:, 1:].sum().item()
    assert trained["nats"] == pytest.approx(nats / tokens, rel=1e-4)


@pytest.mark.parametrize("first", ["à", "一", "🌀"])
def test_a_prompt_ends_with_a_complete_character(first):
    """Of two, three and four bytes."""
    rng = random.Random(0)
    reviews = []
    for i in range(600):
        letters = [chr(ord(first) + rng.randrange(200)) for _ in range(9)]
        reviews.append(("".join(letters), i % 2))
    text, _ = quick_text(reviews)
    inside = 0
    for ids in text.tokens[:, :4].tolist():
        inside += "\ufffd" in text.encoding.decode(ids)
    assert inside > 100                                 # many texts are cut inside a character
    for ids in torch.cat([text.prompts, text.held_prompts]).tolist():
        assert "\ufffd" not in text.encoding.decode(ids)


def test_the_learning_rate_is_constant_for_half_of_the_updates_and_then_falls():
    rates = [train.decay(step, 8) for step in range(8)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([1, 1, 1, 1, 1, (1 + half) / 2, 0.5, (1 - half) / 2])


def test_fine_tuning_raises_the_win_rate_and_its_history_is_kept(tmp_path):
    args = ["--quick", "--n", 4, "--steps", 60]
    status, printed, _ = run(*args, cwd=tmp_path)
    assert status == 0
    reference, _, policy = read_rows(tmp_path / "out")
    assert policy["win_rate"] > reference["win_rate"] + 0.1
    path, = (tmp_path / "out" / "cache").glob("policy-*")
    history = kept.load(path)["history"]
    assert len(history) == 60
    assert set(history[0]) == {"win_rate", "kl_ref", "kl_target"}
    assert abs(history[0]["kl_ref"]) < 1e-4             # the policy starts as the reference
    # for one response: the target of best-of-2 is at most log 2 above the reference
    assert history[0]["kl_target"] > history[0]["kl_ref"] - math.log(2)
