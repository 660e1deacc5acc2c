"""Statistics, arguments of vbon.py, text and prompts, reference model, sampling in parts."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import train
import vbon
from model import GPT, response_mask
from support.inputs import Pretrained
from support.reference_model import train_reference
from support.sampling import compute_rewards, sample_responses, seeded_generator
from support.statistics import bon_attains, mean_and_error
from support.text import make_text
from support.tokenizer import train_tokenizer

# -------------------------------------------------------------------------------------- statistics

DISTINCT = [2.0, -1.0, 0.5, 3.0, 1.0, -4.0]
TIED = [2.0, -1.0, 2.0, 3.0, -1.0, -1.0]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_what_best_of_n_attains_is_enumeration_with_and_without_ties(n):
    """Two prompts. The win rate: of the best of n different responses against another one."""
    wins = []
    kls = []
    for reward in (DISTINCT, TIED):
        for i in range(6):
            others = reward[:i] + reward[i + 1:]
            for best in map(max, itertools.combinations(others, n)):
                wins.append((best > reward[i]) + (best == reward[i]) / 2)
        # the KL: of the reward of the best of n, drawn with replacement
        best = [max(tuple_of_n) for tuple_of_n in itertools.product(reward, repeat=n)]
        kls.append(0.0)
        for level in set(reward):
            attained = best.count(level) / len(best)
            kls[-1] += attained * math.log(attained / (reward.count(level) / 6))
    rewards = torch.tensor([DISTINCT, TIED])
    assert bon_attains(rewards, n)[1] == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    # each response many times, so that the samples are enough for a KL
    kl, _ = bon_attains(rewards.repeat(1, 30), n)
    assert kl == pytest.approx(sum(kls) / 2, abs=1e-12)


def test_without_ties_best_of_n_attains_the_closed_form_if_the_samples_are_enough():
    """512 rewards are worth some 2 · 512 / n effective samples."""
    rewards = torch.arange(512)[None]
    kl, win = bon_attains(rewards, 4)
    assert kl == pytest.approx(math.log(4) - 3 / 4, abs=1e-5)
    assert win == pytest.approx(4 / 5, abs=1e-9)
    assert not math.isnan(bon_attains(rewards, 60)[0])
    kl, win = bon_attains(rewards, 70)
    assert math.isnan(kl)
    assert win == pytest.approx(70 / 71)
    # with as many samples as there are, one can only take the best
    assert bon_attains(torch.arange(4)[None], 4)[1] == pytest.approx(0.7793, abs=1e-4)


def test_a_standard_error_counts_each_prompt_once():
    x = torch.tensor([[1.0, 3.0], [5.0, 7.0], [3.0, -5.0]])
    by_hand = torch.tensor([2.0, 6.0, -1.0]).std().item() / 3 ** 0.5
    assert mean_and_error(x) == mean_and_error(x.repeat(1, 2)) == pytest.approx((7 / 3, by_hand))


def test_the_best_of_each_group_of_n_candidates_is_chosen():
    reward = torch.tensor([[1, 4, 3, 2, 9], [0, -1, 5, 6, 9]])
    # the fifth candidate is left over
    candidates = train.Samples(None, None, None, reward, 0.0)
    assert train.choose_best(candidates, 2, 0).tolist() == [[1, 2], [0, 3]]

# ----------------------------------------------------------------- arguments that make no sense

ONE = torch.zeros(1, 2)
THREE = torch.zeros(1, 3)
NAN = torch.tensor([[math.nan, 0.0]])


@pytest.mark.parametrize("refused", [
    lambda: vbon.bon_logprob(ONE, ONE, 0),
    lambda: vbon.bon_logprob_bound(ONE, THREE, 2),
    lambda: vbon.bon_logprob_ties(ONE, ONE, NAN, 2),
    lambda: vbon.bon_target(THREE, ONE, ONE, 2),
    lambda: vbon.empirical_cdf(ONE, torch.zeros(2, 2)),
    lambda: vbon.empirical_cdf(ONE, torch.zeros(1, 0)),
    lambda: vbon.win_rate(ONE, NAN),
    lambda: vbon.best_of_n(torch.zeros(3)),
    lambda: vbon.leave_one_out(torch.zeros(3, 1)),
    lambda: vbon.leave_one_out(torch.zeros(3)),
    lambda: vbon.reverse_kl_loss(THREE, ONE),
    lambda: vbon.reverse_kl_loss(ONE, NAN)])
def test_bad_arguments_are_refused_with_what_is_wanted(refused):
    with pytest.raises(ValueError, match="want"):
        refused()

# ------------------------------------------------------------------------- text and reference model

def make(reviews, pretrained=None, **other):
    """A text with these reviews, or with 600 built-in ones."""
    settings = dict(reviews=600, vocab=257, prompt_tokens=4, length=24, prompts=8, held_prompts=8)
    return make_text(reviews, pretrained, SimpleNamespace(**settings | other), 0)


def test_prompts_are_different_starts_of_texts_and_some_are_held_out():
    """Tokens are single bytes. Characters of two, three and four of them follow some letters."""
    reviews = [("a", 1), ("b", 0)]
    for i in range(600):
        character = chr(ord("à一🌀"[i % 3]) + i % 20)
        reviews.append(("abc"[:i % 4] + 4 * character, i % 2))
    text = make(reviews)
    trained = {tuple(ids) for ids in text.prompts.tolist()}
    held = {tuple(ids) for ids in text.held_prompts.tolist()}
    assert (len(trained), len(held)) == (8, 5)          # a quarter of those that are different
    assert not trained & held
    # none is cut inside a character, or reaches the end of its text
    cut = ["\ufffd" in text.encoding.decode(ids) for ids in text.tokens[:, :4].tolist()]
    assert sum(cut) > 100
    for ids in trained | held:
        assert text.encoding.eot_token not in ids
        assert "\ufffd" not in text.encoding.decode(list(ids))
    assert len(text.unseen_tokens) == len(text.unseen_labels) == 30         # a twentieth
    assert len(text.tokens) == len(text.labels) == 572


def test_a_length_of_0_is_the_one_that_cuts_a_tenth_of_the_texts(capsys):
    """Of text i, 2 bytes are the prompt; 1 + 2 i follow, and an end."""
    reviews = [(f"{i % 10}bc" + " c" * i, 1) for i in range(1, 101)]
    assert make(reviews, prompt_tokens=2, length=0).length == 64        # the longest
    assert capsys.readouterr().out == (                 # 2 + 2 i > 64; 2 + 2 i <= 183
        "text: 100 reviews; 8 training prompts and 2 held-out ones\n"
        "note: 69% of the texts are cut; with --length 183, 10% would be\n")
    shorter = [(text[:50], 1) for text, _ in reviews]
    assert make(shorter, prompt_tokens=2, length=0).length == 49
    assert "note" not in capsys.readouterr().out
    make(shorter, prompt_tokens=2, prompts=9)           # there are 8
    assert "note: so few prompts may not carry over" in capsys.readouterr().out
    # a model of --init may have less room
    small = Pretrained(GPT(257, 40, n_embd=8), train_tokenizer([], 257))
    assert make(reviews, small, prompt_tokens=2, length=0).length == 38


def test_the_reference_model_learns_the_reviews_and_is_measured_on_unseen_ones():
    text = make(None, vocab=400)
    settings = SimpleNamespace(layers=1, heads=2, width=16, lm_steps=40, lm_batch=16, lm_lr=1e-2)
    # 65 texts are judged in parts of 64 and 1; the last one is odd
    odd = torch.cat([text.tokens[:64], torch.full((1, 28), 7)])
    model, nats = train_reference(None, 400, text.tokens, odd, settings, 0, "cpu").values()
    total = -model.logprob(odd[:, :1], odd[:, None, 1:]).sum().item()
    tokens = response_mask(odd, 399)[:, 1:].sum().item()
    assert nats == pytest.approx(total / tokens, rel=1e-4)
    again = train_reference(None, 400, text.tokens, odd[:20], settings, 0, "cpu")
    assert torch.equal(again["model"](odd), model(odd))     # nothing is learned from unseen texts
    assert again["nats"] < math.log(400) - 1
    assert model.config == GPT(400, 28, 1, 2, 16, tied=False).config
    # from a given model, which stays as it was; untrained, it is as good as a guess
    initial = GPT(400, 28, 1, 2, 16, generator=torch.Generator().manual_seed(0))
    settings.lm_steps = 0
    same = train_reference(initial, 400, text.tokens, odd, settings, 0, "cpu")
    assert torch.equal(same["model"](odd), initial(odd))
    assert same["nats"] == pytest.approx(math.log(400), abs=0.2)
    assert initial.config["tied"] is True

# --------------------------------------------------------------------- random numbers, parts, steps

def test_a_generator_has_the_seed_of_its_names():
    """These seeds must never change: results of all versions depend on them."""
    assert seeded_generator("cpu", "batch", 0, 1).initial_seed() == 0xc718f647209e


def test_samples_and_rewards_come_in_parts_with_the_rows_in_order():
    """400 responses a prompt: parts of two prompts, each with random numbers of its own."""
    model = GPT(20, 9, 1, 2, 16, generator=torch.Generator().manual_seed(0))
    prompts = torch.tensor([[0], [1], [0], [3], [4]])
    found = sample_responses(model, prompts, 400, 6, "x", 0)
    response = found["response"]
    with torch.no_grad():
        scored = model.logprob(prompts, response)
    assert torch.allclose(found["logprob"], scored, rtol=0, atol=1e-4)
    assert not torch.equal(response[0], response[2])

    def reward_fn(prompt, part):
        assert len(prompt) <= 2
        return (part * prompt[:, :, None]).double().sum(-1)

    judged = compute_rewards(reward_fn, prompts, response, "x", "cpu")["reward"]
    assert torch.equal(judged, (response * prompts[:, :, None]).double().sum(-1))


def test_the_learning_rate_is_constant_for_half_of_the_updates_and_then_falls():
    rates = [train.decay(step, 8) for step in range(8)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([1, 1, 1, 1, 1, (1 + half) / 2, 0.5, (1 - half) / 2])
