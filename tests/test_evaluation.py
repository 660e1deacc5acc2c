"""What the evaluation says, statistics and rows; text, reference model and the training loop."""
import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from running import read_lines, read_rows, run

import train
import vbon
from model import GPT, response_mask
from support.inputs import Pretrained
from support.reference_model import lm_loss, train_reference
from support.reviews import builtin_reviews
from support.sampling import compute_rewards, sample_responses, seeded_generator
from support.statistics import (bon_attains, mean_and_error, share_of_sets, share_of_ties,
                                wins_of_target)
from support.text import Text, make_text
from support.tokenizer import train_tokenizer

# -------------------------------------------------------------------------------------- statistics

DISTINCT = [2.0, -1.0, 0.5, 3.0, 1.0, -4.0]
TIED = [2.0, -1.0, 2.0, 3.0, -1.0, -1.0]


def test_without_ties_best_of_n_attains_the_closed_form():
    kl, win = bon_attains(torch.arange(512)[None], 4)
    assert kl == pytest.approx(math.log(4) - 3 / 4, abs=1e-5)
    assert win == pytest.approx(4 / 5, abs=1e-9)


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
        best = torch.tensor([max(y) for y in itertools.product(reward, repeat=n)]).double()
        for level in set(reward):
            share = reward.count(level) / 6
            attained = (best == level).double().mean().item()
            kls.append(attained * math.log(attained / share))
    rewards = torch.tensor([DISTINCT, TIED])
    assert bon_attains(rewards, n)[1] == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    # each response many times, so that the samples are enough for a KL
    kl, _ = bon_attains(rewards.repeat(1, 30), n)
    assert kl == pytest.approx(sum(kls) / 2, abs=1e-12)


@pytest.mark.parametrize("p, n", [(0.01, 256), (0.08, 4)])
def test_what_best_of_n_attains_with_rare_successes_is_unbiased(p, n):
    """Best of n succeeds with probability 1 - (1-p)^n. The KL of very rare ones is unknown."""
    success = 1 - (1 - p) ** n
    win = success * (1 - p / 2) + (1 - success) * (1 - p) / 2
    g = torch.Generator().manual_seed(0)
    kl, found = bon_attains((torch.rand(2000, 512, generator=g) < p).float(), n)
    assert found == pytest.approx(win, abs=0.004)
    assert math.isnan(kl) == (n == 256)


def test_where_few_samples_decide_the_kl_is_unknown():
    """512 rewards are worth some 2 · 512 / n effective samples."""
    rewards = torch.arange(512)[None]
    assert not math.isnan(bon_attains(rewards, 60)[0])
    kl, win = bon_attains(rewards, 70)
    assert math.isnan(kl)
    assert win == pytest.approx(70 / 71)
    # with as many samples as there are, one can only take the best
    assert bon_attains(torch.arange(4)[None], 4)[1] == pytest.approx(0.7793, abs=1e-4)


def test_the_share_of_sets_is_a_ratio_of_binomial_coefficients():
    found = share_of_sets(torch.tensor([0, 2, 3, 5, 7]).double(), 3, 7)
    assert found.tolist() == pytest.approx([0, 0, 1 / 35, 10 / 35, 1])


def test_the_win_rate_of_the_target_is_that_of_a_simulation():
    """E log F̂ over 20,000 prompts, with M = 5, and what the tilt by it wins."""
    u = (torch.arange(200) + 0.5).double() / 200
    refs = torch.rand(20_000, 5, generator=torch.Generator().manual_seed(0)).double()
    log_cdf = vbon.empirical_cdf(u.expand(20_000, 200), refs).log().mean(0)
    weight = (7 * log_cdf).softmax(0)
    assert wins_of_target(8, 5) == pytest.approx((weight @ u).item(), abs=3e-3)
    assert wins_of_target(4, 2) == pytest.approx(0.725, abs=5e-4)
    assert wins_of_target(4, 2000) == pytest.approx(0.8, abs=2e-4)


def test_the_share_of_ties_counts_pairs():
    """Of 10 · 9 ordered pairs, 3 · 2 + 7 · 6 tie in the first row, 4 · 3 + 6 · 5 in the second."""
    rewards = torch.tensor([[1.0] * 3 + [0.0] * 7, [1.0] * 4 + [0.0] * 6])
    assert share_of_ties(rewards) == pytest.approx((48 / 90 + 42 / 90) / 2)


def test_a_standard_error_counts_each_prompt_once():
    x = torch.tensor([[1.0, 3.0], [5.0, 7.0], [3.0, -5.0]])
    by_hand = torch.tensor([2.0, 6.0, -1.0]).std().item() / 3 ** 0.5
    for values in (x, torch.cat([x, x], 1)):            # the same responses twice tell nothing new
        assert mean_and_error(values) == pytest.approx((7 / 3, by_hand))

# ------------------------------------------------------------------- rewards and arguments of any kind

def test_integer_and_boolean_rewards_are_numbers_and_each_prompt_has_its_own():
    ref_rewards = torch.tensor([[1, 2, 2, 3], [0, 0, 0, 7]])
    found = vbon.empirical_cdf(torch.tensor([[2, 4], [0, 3]]), ref_rewards)
    assert found.tolist() == [[0.4, 1.0], [0.2, 0.8]]
    success = torch.tensor([[True, False]])
    assert vbon.win_rate(success, torch.tensor([[False, True]])).tolist() == [[0.75, 0.25]]


def test_the_best_is_the_highest_even_by_a_hair():
    reward = torch.tensor([[1.0, 2.0, 2.0 + 1e-15], [3.0, -1.0, 2.0]], dtype=torch.float64)
    for seed in range(10):
        assert vbon.best_of_n(reward, torch.Generator().manual_seed(seed)).tolist() == [2, 0]


ONE = torch.zeros(1, 2)
NAN = torch.tensor([[math.nan, 0.0]])
INFINITE = torch.tensor([[math.inf, 0.0]])


@pytest.mark.parametrize("function, arguments", [
    (vbon.bon_logprob, (ONE, ONE, 0)),
    (vbon.bon_logprob, (ONE, ONE, 2.0)),
    (vbon.bon_logprob, (ONE, torch.zeros(1, 3), 2)),
    (vbon.bon_logprob_bound, (NAN, ONE, 2)),
    (vbon.bon_logprob_ties, (ONE, ONE, NAN, 2)),
    (vbon.bon_target, (torch.zeros(1, 3), ONE, ONE, 2)),
    (vbon.bon_target, (ONE, ONE, ONE, 0)),
    (bon_attains, (ONE, 0)),
    (bon_attains, (ONE, True)),
    (bon_attains, (torch.zeros(2), 2)),
    (vbon.empirical_cdf, (torch.zeros(2, 3), torch.zeros(3, 3))),
    (vbon.empirical_cdf, (torch.zeros(2, 3), torch.zeros(2, 0))),
    (vbon.win_rate, (ONE, INFINITE)),
    (vbon.best_of_n, (torch.zeros(3),)),
    (vbon.best_of_n, (NAN,)),
    (vbon.leave_one_out, (torch.zeros(3, 1),)),
    (vbon.leave_one_out, (torch.zeros(3),)),
    (vbon.reverse_kl_loss, (torch.zeros(3, 2), torch.zeros(2, 3))),
    (vbon.reverse_kl_loss, (ONE, -INFINITE)),
])
def test_bad_arguments_are_refused_with_what_is_wanted(function, arguments):
    with pytest.raises(ValueError, match="want"):
        function(*arguments)

# -------------------------------------------------------------------------------- rows of the table

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
    assert row["kl_bon"] == pytest.approx(1 - (2 * cdf + p).log().mean().item())
    # a quieter estimate takes the place of the KL; a reward of 0 is not positive
    row = train.metrics(ref_logprob, ref_logprob, 0 * reward, ref_rewards, 2, ref_logprob + 14)
    assert (row["kl_ref"], row["positive"]) == (5, 0)


def simulated(m, seed):
    """Samples whose reward is uniform: its own CDF. Each response is improbable."""
    reward = torch.rand(200, m, generator=torch.Generator().manual_seed(seed))
    response = torch.arange(m).repeat(200, 1)[..., None]
    return train.Samples(None, response, torch.full((200, m), -50.0), reward, 0.0)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_the_rows_of_reference_and_best_of_n_are_their_theory(n):
    text = Text(train_tokenizer([], 257), 1, *[None] * 8)       # 256 is the end
    world = train.World(text, None, None, None, simulated(2000, 2), simulated(100 * n + 1, 1))
    row = train.best_of_n_row(world, n, 0)
    assert row["win_rate"] == pytest.approx(n / (n + 1), abs=0.006)
    assert row["kl_ref"] == pytest.approx(math.log(n) - (n - 1) / n, abs=0.03)
    assert row["kl_bon"] == 0
    assert row["samples_per_answer"] == n
    row = train.reference_row(world, n)
    assert row["win_rate"] == pytest.approx(0.5, abs=0.01)
    assert row["kl_ref"] == 0
    assert row["kl_bon"] == pytest.approx(n - 1 - math.log(n), rel=0.04, abs=1e-9)
    assert row["samples_per_answer"] == 1
    # the response of token 256 has ended, all others are cut
    ended = 1 if n > 2 else 0
    assert row["cut"] == 1 - ended / (100 * n + 1)


def test_the_best_of_each_n_candidates_is_chosen():
    reward = torch.tensor([[1.0, 4.0, 3.0, 2.0, 9.0], [0.0, -1.0, 5.0, 6.0, 9.0]])
    candidates = train.Samples(None, None, reward - 20, reward, 0.0)
    # the fifth candidate is left over
    assert train.choose_best(candidates, 2, 0).tolist() == [[1, 2], [0, 3]]

# ------------------------------------------------------------------------ text and reference model

def quick_text(reviews=None, pretrained=None, **other):
    """A text of 600 reviews."""
    settings = dict(reviews=600, vocab=400, prompt_tokens=4, length=24, prompts=8, held_prompts=8)
    return make_text(reviews, pretrained, SimpleNamespace(**settings | other), 0)


def test_held_out_prompts_and_reviews_are_not_trained_on():
    text = quick_text([("a", 1), ("b", 0)] + builtin_reviews(600, 0))
    trained = {tuple(ids) for ids in text.prompts.tolist()}
    held = {tuple(ids) for ids in text.held_prompts.tolist()}
    assert len(trained) == len(held) == 8
    assert not trained & held
    assert text.encoding.eot_token not in torch.cat([text.prompts, text.held_prompts])
    assert len(text.unseen_tokens) == len(text.unseen_labels) == 30         # a twentieth
    assert len(text.tokens) == len(text.labels) == 572
    # of few prompts, a quarter is held out
    few = quick_text([(f"{i % 9} and more", 1) for i in range(100)], vocab=257, held_prompts=64)
    assert (len(few.held_prompts), len(few.prompts), len(few.unseen_tokens)) == (2, 7, 16)


def test_a_length_of_0_is_the_one_that_cuts_a_tenth_of_the_texts():
    """Tokens are single bytes. Of text i, 2 bytes are the prompt; 1 + 2 i follow, and an end."""
    reviews = [(f"{i % 10}bc" + " c" * i, 1) for i in range(1, 101)]
    same = dict(vocab=257, prompt_tokens=2)
    chosen = quick_text(reviews, length=0, **same)
    assert chosen.enough == math.ceil(2 + 2 * 90.1)
    assert chosen.length == 64                          # the longest
    assert chosen.cut == 0.69                           # where 2 + 2 i > 64
    short = quick_text([(text[:50], 1) for text, _ in reviews], length=0, **same)
    assert (short.length, short.enough, short.cut) == (49, 49, 0)
    assert quick_text(reviews, length=9, **same).length == 9
    # a model of --init may have less room
    small = Pretrained(GPT(257, 40, n_embd=8), train_tokenizer([], 257))
    assert quick_text(reviews, small, length=0, **same).length == 38


@pytest.mark.parametrize("first", ["à", "一", "🌀"])
def test_a_prompt_ends_with_a_complete_character(first):
    """Of two, three and four bytes."""
    rng = random.Random(0)
    reviews = []
    for i in range(600):
        letters = [chr(ord(first) + rng.randrange(200)) for _ in range(9)]
        reviews.append(("".join(letters), i % 2))
    text = quick_text(reviews)
    decoded = [text.encoding.decode(ids) for ids in text.tokens[:, :4].tolist()]
    assert sum("\ufffd" in prompt for prompt in decoded) > 100  # many are cut inside a character
    for ids in torch.cat([text.prompts, text.held_prompts]).tolist():
        assert "\ufffd" not in text.encoding.decode(ids)


def test_the_reference_model_learns_the_reviews_and_is_measured_on_unseen_ones():
    text = quick_text()
    settings = SimpleNamespace(lm_steps=40, lm_batch=16, lm_lr=1e-2)
    initial = GPT(400, 28, 1, 2, 16, generator=torch.Generator().manual_seed(0))
    assert lm_loss(initial, text.tokens[:16]).item() == pytest.approx(math.log(400), abs=0.2)
    # 65 texts are judged in parts of 64 and 1; the last one is odd
    odd = torch.cat([text.tokens[:64], torch.full((1, 28), 7)])
    trained = []
    for unseen in (odd, text.unseen_tokens):
        trained.append(train_reference(initial, text.tokens, unseen, settings, 0))
    model = trained[0]["model"]
    for name, x in model.state_dict().items():          # does not learn from unseen reviews
        assert torch.equal(x, trained[1]["model"].state_dict()[name])
    assert trained[1]["nats"] < math.log(400) - 1
    nats = -model.logprob(odd[:, :1], odd[:, None, 1:]).sum().item()
    tokens = response_mask(odd, 399)[:, 1:].sum().item()
    assert trained[0]["nats"] == pytest.approx(nats / tokens, rel=1e-4)
    assert model.config["tied"] is False
    assert initial.config["tied"] is True

# ---------------------------------------------------------------------------- sampling and training

def test_a_generator_has_the_seed_of_its_names():
    """These seeds must never change: results of all versions depend on them."""
    assert seeded_generator("cpu", "batch", 0, 1).initial_seed() == 0xc718f647209e
    assert seeded_generator("cpu", "batch", 1, 0).initial_seed() != 0xc718f647209e
    assert seeded_generator("cpu", "a", "b").initial_seed() != seeded_generator(
        "cpu", "ab").initial_seed()


def test_samples_and_rewards_come_in_parts_with_the_rows_in_order():
    """400 responses a prompt: parts of two prompts, each with random numbers of its own."""
    model = GPT(20, 9, 1, 2, 16, generator=torch.Generator().manual_seed(0))
    prompts = torch.arange(5)[:, None]
    found = sample_responses(model, prompts, 400, 6, "x", 0)
    assert found["response"].shape == (5, 400, 6)
    with torch.no_grad():
        scored = model.logprob(prompts, found["response"])
    assert torch.allclose(found["logprob"], scored, rtol=0, atol=1e-4)
    assert not torch.equal(found["response"][0], found["response"][2])
    given = []

    def reward_fn(prompt, response):
        given.append(len(prompt))
        return (response * prompt[:, :, None]).double().sum(-1)

    judged = compute_rewards(reward_fn, prompts, found["response"], "x", "cpu")
    assert given == [2, 2, 1]
    assert torch.equal(judged["reward"], (found["response"] * prompts[:, :, None]).double().sum(-1))


def test_the_learning_rate_is_constant_for_half_of_the_updates_and_then_falls():
    rates = [train.decay(step, 8) for step in range(8)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([1, 1, 1, 1, 1, (1 + half) / 2, 0.5, (1 - half) / 2])


def test_fine_tuning_raises_the_win_rate_and_watches_it(tmp_path):
    assert run("--quick", "--n", 4, "--steps", 60, cwd=tmp_path)[0] == 0
    reference, _, policy = read_rows(tmp_path / "out")
    assert policy["win_rate"] > reference["win_rate"] + 0.1
    history = read_lines(tmp_path / "out" / "history-n4-seed0.jsonl")
    assert [row["step"] for row in history] == list(range(1, 61))
    assert set(history[0]) == {"step", "win_rate", "kl_ref", "kl_target"}
    assert abs(history[0]["kl_ref"]) < 1e-4             # the policy starts as the reference
    # for one response: the target of best-of-2 is at most log 2 above the reference
    assert history[0]["kl_target"] > history[0]["kl_ref"] - math.log(2)
