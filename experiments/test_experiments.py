"""Tests of the experiments against oracles: enumeration, closed forms, and train.py itself.

    pytest experiments
"""
import itertools
import json
import math
import re
import shutil

import pytest
import torch

import train
import vbon
from experiments import (compare, decoders, gap, methods, overoptimisation, own_method,
                         studies, summary, temperature, theory)
from model import GPT
from support import kept, results
from support.files import UnusableInput
from support.huggingface import load_model

torch.set_num_threads(1)                                # tensors are small: more only cost time

TIED = torch.tensor([[2.0, -1.0, 2.0, 3.0, -1.0, -1.0], [1.0, 2.0, 3.0, 4.0, 5.0, 60.0]]).double()

# ------------------------------------------------------------------------------ winners among M

def best_of_all_subsets(rewards, n):
    """How often each response is the best of n different ones; ties share."""
    chance = torch.zeros(len(rewards)).double()
    for subset in itertools.combinations(range(len(rewards)), n):
        best = max(rewards[i] for i in subset)
        winners = [i for i in subset if rewards[i] == best]
        for i in winners:
            chance[i] += 1 / len(winners)
    return chance / math.comb(len(rewards), n)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_winner_weights_and_their_reward_are_those_of_all_subsets(n):
    expected = torch.stack([best_of_all_subsets(rewards, n) for rewards in TIED.tolist()])
    assert torch.allclose(theory.winner_weights(TIED, n), expected)
    assert torch.allclose(theory.bon_expected_reward(TIED, n), (expected * TIED).sum(-1))


@pytest.mark.parametrize("n", [0, 7, 2.0, True])
def test_an_n_outside_of_1_to_m_is_refused(n):
    with pytest.raises(ValueError, match="from 1 to M = 6"):
        theory.bon_expected_reward(TIED, n)

# ------------------------------------------------------------------ what best-of-n and tilts attain

def test_theory_of_best_of_n_and_the_interval_of_the_cdf_by_hand():
    kl, wins = theory.bon_theory(4)
    assert (kl, wins) == (pytest.approx(math.log(4) - 3 / 4), 4 / 5)
    assert theory.bon_theory(1) == (0, 1 / 2)
    for n in (0, 2.0, True):
        with pytest.raises(ValueError, match="want an integer n >= 1"):
            theory.bon_theory(n)
    low, high = theory.cdf_interval(torch.tensor([[2.0]]), torch.tensor([[1.0, 2.0, 2.0, 3.0]]))
    assert (low.item(), high.item()) == (1 / 5, 4 / 5)


def uniform_rewards(m=4096):
    """Rewards that are their own CDF, evenly spread."""
    return ((torch.arange(m) + 0.5) / m).double()[None]


@pytest.mark.parametrize("t", [0.01, 1.234, 7.77, 31.0])
def test_the_highest_win_rate_is_the_closed_form(t):
    """Of the tilt of a continuous reward by exp(t·F)."""
    win = 1 / (1 - math.exp(-t)) - 1 / t
    kl = t * win - math.log(math.expm1(t) / t)
    assert theory.highest_win_rate(kl, uniform_rewards()) == pytest.approx(win, abs=1e-4)


def test_the_highest_win_rate_stays_where_the_best_tie_and_is_unknown_where_few_are_left():
    """A quarter of the responses is right: no policy wins more than 7/8, at any KL."""
    rewards = torch.tensor([[1.0] * 64 + [0.0] * 192])
    assert theory.highest_win_rate(5.0, rewards) == pytest.approx(0.875)
    assert theory.highest_win_rate(0.0, rewards) == pytest.approx(0.5)
    assert theory.highest_win_rate(2.5, uniform_rewards(512)) is not None
    assert theory.highest_win_rate(4.5, uniform_rewards(512)) is None


@pytest.mark.parametrize("scale", [1, 1e20, 1e-20, 1e80])
def test_beta_goes_as_far_as_best_of_n_for_rewards_of_any_size(scale):
    """Rewards N(0, 1): the optimum for β has a KL of 1 / (2 β²)."""
    rewards = scale * torch.special.ndtri(uniform_rewards(100_000))
    for n in (2, 4):
        kl, _ = theory.bon_theory(n)
        beta = theory.find_beta(rewards, n, "kl-rl")
        assert beta == pytest.approx(scale * math.sqrt(0.5 / kl), rel=0.01)


def test_a_beta_that_cannot_be_found_is_refused():
    few = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnusableInput, match="worth only .*larger --m-eval"):
        theory.find_beta(few, 16, "kl-rl")
    for rewards, n in ((torch.ones(2, 64), 4), (few, 1)):
        with pytest.raises(UnusableInput, match="no beta takes it as far"):
            theory.find_beta(rewards, n, "wind")


def test_how_far_an_aim_is_from_best_of_n_and_from_the_highest_win_rate():
    """For a reward that is uniform on [0, 1], best of 4 has the density 4 u³, and KL-RL's optimum
    exp(u/β), normalised, which is also the highest win rate. The KL between them is an integral."""
    rewards = uniform_rewards().repeat(2, 1)            # two prompts
    assert theory.find_aim("bound", 4, rewards)["kl_bon"] == pytest.approx(0, abs=1e-3)
    best = theory.find_aim("vbon", 4, rewards)
    assert best["decoded_win_rate"] == pytest.approx(16 / 20, abs=1e-3)
    assert best["kl_bon"] == pytest.approx(0, abs=1e-12)
    assert best["below_win_rate"] == pytest.approx(0.0035, abs=5e-4)
    found = theory.find_aim("kl-rl", 4, rewards)
    u = (torch.arange(10 ** 6) + 0.5).double() / 10 ** 6
    density = (u / found["beta"]).exp() / (u / found["beta"]).exp().mean()
    integral = (density * (density / (4 * u ** 3)).log()).mean().item()
    assert found["kl_bon"] == pytest.approx(integral, abs=2e-3)
    assert found["below_win_rate"] == pytest.approx(0, abs=1e-9)


def test_an_aim_of_too_few_effective_samples_is_unknown():
    assert theory.find_aim("kl-rl", 4, uniform_rewards(64), beta=1e-4) == {"beta": 1e-4}

# ------------------------------------------------------------------------------- soft best-of-n

@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_soft_best_of_n_is_brute_force(n):
    """Six equally likely responses; all (n-1)-tuples of them are the rivals."""
    reward = TIED[:1]
    truth = torch.zeros(6).double()
    for indices in itertools.product(range(6), repeat=n):
        y = torch.tensor(indices)
        chance = (reward[0, y] / 0.7).softmax(0)
        truth.index_add_(0, y, chance / 6 ** n)
    rivals = list(itertools.product(reward[0].tolist(), repeat=max(1, n - 1)))
    rivals = torch.tensor(rivals).double().view(1, -1)
    ref_logprob = torch.full((1, 6), 1 / 6).log()
    found = decoders.soft_bon_logprob(ref_logprob, reward, rivals, n, 0.7)
    assert torch.allclose(found[0].exp(), truth, atol=1e-6)


def test_soft_best_of_n_draws_by_its_weights():
    reward = TIED[:1].repeat(20_000, 1)
    sampled = decoders.soft_best_of_n(reward, 0.7, torch.Generator().manual_seed(0))
    frequency = sampled.bincount(minlength=6) / 20_000
    assert torch.allclose(frequency.double(), (TIED[0] / 0.7).softmax(0), atol=0.015)

# ----------------------------------------------------------- gradients, on a world of 40 responses

def tiny_world():
    """A GPT over 3 letters and end-of-text (id 3), a prompt, all its 40 responses (1, 40, 3)."""
    model = GPT(4, 4, n_layer=1, n_head=2, n_embd=16, generator=torch.Generator().manual_seed(3))
    for p in model.parameters():
        p.data *= 2                                     # away from uniform
    strings = set()
    for string in itertools.product(range(4), repeat=3):
        if 3 in string:
            string = string[:string.index(3)] + (3,) * (3 - string.index(3))
        strings.add(string)
    return model, torch.tensor([[1]]), torch.tensor(sorted(strings))[None]


def world_reward(prompt, response):
    """A reward of these 40 responses, each another one: its place in a shuffled list."""
    _, _, strings = tiny_world()
    code = torch.tensor([16, 4, 1])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4)).double()
    table = torch.zeros(64).double()
    table[(strings[0] * code).sum(-1)] = order
    return table[(response * code).sum(-1)]


BETAS = {"kl-rl": 12.0, "infalign-ctrl": 3000.0, "wind": 0.3, "max-at-k": 12.0,
         "max-at-k-win": 0.3, "infalign": 0.3}


def best_of(log_p, values, k):
    """E[the best value of k responses], level by level."""
    found = 0.0
    before = torch.zeros(()).double()
    for value in values.unique():
        at_most = log_p.exp()[values <= value].sum()
        found = found + value * (at_most ** k - before ** k)
        before = at_most
    return found


def pairs(log_q, n):
    """The probability (40, 40) that i is the best and j the worst of n responses of the reference:
    all tuples."""
    _, prompt, strings = tiny_world()
    reward = world_reward(prompt, strings)[0]
    tuples = torch.cartesian_prod(*[torch.arange(40)] * n)
    rows = torch.arange(len(tuples))
    best = tuples[rows, reward[tuples].argmax(-1)]
    worst = tuples[rows, reward[tuples].argmin(-1)]
    chance = log_q.exp()[tuples].prod(-1)
    return torch.zeros(40, 40).double().index_put((best, worst), chance, accumulate=True)


def bonbon_loss(log_p, log_q):
    """BoNBoN's loss for n = 3, as a sum over all pairs."""
    chance = pairs(log_q, 3)
    h = log_p - log_q
    squares = (h[:, None] - h[None, :] - 2 * (1 + 1 / 2)) ** 2         # c for n = 3
    return -0.005 * (chance.sum(1) * log_p).sum() + 0.995 * (chance * squares).sum()


def exact_loss(method, n, log_p, log_q, refs):
    """The loss of a method, and all that is watched, by sums over all 40 responses."""
    _, prompt, strings = tiny_world()
    reward = world_reward(prompt, strings)
    p = log_p.exp()
    wins = vbon.win_rate(reward, refs)[0]
    log_bon = vbon.bon_target(log_q[None], reward, refs, n)[0]
    bound = vbon.bon_logprob_bound(log_q[None], vbon.empirical_cdf(reward, refs).log(), n)[0]
    winners = log_bon.exp() / log_bon.exp().sum()
    reverse = (p * (log_p - log_bon)).sum()
    forward = -(winners * log_p).sum()
    kl = (p * (log_p - log_q)).sum()
    beats = (reward[0][None, :] < reward[0][:, None]).double() @ p.detach() + p.detach() / 2
    beta = BETAS.get(method)
    losses = {"vbon": reverse,
              "bound": (p * (log_p - bound)).sum(),
              "kl-rl": kl - (p * reward[0]).sum() / 12,
              "infalign-ctrl": kl - (p * (10 * wins).exp()).sum() / 3000,
              "wind": kl - (p * beats).sum() / 0.3,
              "bon-sft": forward,
              "bond": forward + reverse,
              "bonbon": bonbon_loss(log_p, log_q)}
    if method in methods.FROM_SETS:
        values = theory.method_values(method, n, reward, refs)[0]
        losses[method] = kl - best_of(log_p, values, n) / beta
    h = log_p - log_q
    watched = {"win_rate": (p * wins).sum(), "kl_ref": kl, "kl_target": reverse, "nll": forward,
               "margin": (pairs(log_q, 3) * (h[:, None] - h[None, :])).sum()}
    return losses[method], watched


def gradient_of(policy):
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize("part", [2, 3])
@pytest.mark.parametrize("method", methods.METHODS)
def test_an_update_follows_the_exact_gradient_and_reports_the_exact_means(method, part,
                                                                          monkeypatch):
    """The same prompt three times, in one part, or in two that are not of the same size; a policy
    that is not the reference."""
    n = 3
    reference, prompt, strings = tiny_world()
    policy, _, _ = tiny_world()
    for p in policy.parameters():
        p.data *= 1.3
    # BoNBoN chooses sets of n among the cached responses, which takes long with many of them
    count = 2_000 if method == "bonbon" else 20_000
    cached, _ = reference.sample(prompt, count, 3, torch.Generator().manual_seed(0))
    refs = world_reward(prompt, cached)
    batch = train.Batch(9, prompt.repeat(3, 1), cached.repeat(3, 1, 1), refs.repeat(3, 1))
    settings = train.TuningSettings(k=6_000, steps=10)
    for module in (methods, train):
        monkeypatch.setattr(module, "prompts_at_a_time", lambda *_: part)
    gradient = methods.choose_method(method, n, BETAS.get(method)).gradient
    found = gradient(policy, reference, world_reward, batch, n, settings,
                     torch.Generator().manual_seed(1))

    log_p = policy.logprob(prompt, strings)[0].double()
    log_q = reference.logprob(prompt, strings)[0].detach().double()
    loss, watched = exact_loss(method, n, log_p, log_q, refs)
    exact = torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(policy.parameters()))])
    assert (gradient_of(policy) - exact).norm() < 0.1 * exact.norm()
    names = {"vbon": {"win_rate", "kl_ref", "kl_target"}, "bon-sft": {"nll"},
             "bond": {"nll", "win_rate", "kl_ref"}, "bonbon": {"margin"}}
    assert set(found) == names.get(method, {"win_rate", "kl_ref"})
    for name, value in found.items():
        assert value == pytest.approx(watched[name].item(), abs=0.03), name


@pytest.mark.parametrize("step, expected", [(0, 12.0), (2, 4.0), (3, 3.0), (9, 3.0)])
def test_one_over_beta_grows_over_four_tenths_of_the_steps(step, expected):
    assert methods.grow_beta(3.0, step, 10) == pytest.approx(expected)


def three_prompts():
    """The reference of the tiny world with a head of its own, three prompts, 8 samples to each."""
    reference, _, _ = tiny_world()
    reference.untie_head()
    prompts = torch.tensor([[0], [1], [2]])
    cached, logprob = reference.sample(prompts, 8, 3, torch.Generator().manual_seed(0))
    return reference, train.Samples(prompts, cached, logprob, world_reward(prompts, cached), 0.0)


def test_the_loop_gives_each_update_its_rate_and_its_batch(tmp_path, monkeypatch):
    reference, samples = three_prompts()
    settings = train.TuningSettings(steps=8, batch=2, k=4, lr_scale=2.0)
    rates = []
    batches = []
    step = torch.optim.Adam.step

    def watched(optimizer, *given):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *given)

    def gradient(policy, reference, reward_fn, batch, n, settings, generator):
        batches.append(batch)
        return train.vbon_gradient(policy, reference, reward_fn, batch, n, settings, generator)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    method = train.Method("", ("vbon", 2), gradient)
    train.fine_tune(tmp_path / "a", method, 2, reference, world_reward, samples, settings, 0)
    # an adapter of rank 4 has as many parameters as four rows and columns of its linear layer
    parameters = sum(4 * sum(module.weight.shape) for module in reference.modules()
                     if isinstance(module, torch.nn.Linear))
    rate = 2.0 / math.sqrt(parameters)
    assert rates == pytest.approx([rate * train.decay(step, 8) for step in range(8)])
    assert [batch.step for batch in batches] == list(range(8))
    assert len({tuple(batch.prompt[:, 0].tolist()) for batch in batches}) > 2
    for batch in batches:
        # each prompt comes with its own samples and rewards
        for prompt, response, reward in zip(batch.prompt, batch.ref_response, batch.ref_rewards):
            assert torch.equal(response, samples.response[prompt.item()])
            assert torch.equal(reward, samples.reward[prompt.item()])

# ------------------------------------------------------------------------ a method of one's own

BOUND = """
import vbon
def target(rollout, ref_rewards, n):
    log_cdf = vbon.empirical_cdf(rollout.reward, ref_rewards).log()
    return rollout.ref_logprob + (n - 1) * log_cdf
"""
BOUND_AS_GRADIENT = """
from experiments import methods
def gradient(policy, reference, reward_fn, batch, n, settings, generator):
    bound = methods.choose_method("bound", n, None)
    return bound.gradient(policy, reference, reward_fn, batch, n, settings, generator)
"""

BOUND_WEIGHTS = """
import vbon
def weights(ref_rewards, n):
    return 7 * vbon.empirical_cdf(ref_rewards, ref_rewards) ** (n - 1)
"""


def own(tmp_path, source):
    path = tmp_path / "mine.py"
    path.write_text(source, encoding="utf-8")
    return own_method.OwnMethod(str(path))


def test_the_aim_of_a_method_of_ones_own(tmp_path):
    """By its target or its weights, it is that of the bound; a gradient alone has none."""
    generator = torch.Generator().manual_seed(0)
    reward, logprob = torch.randn(2, 5, 256, generator=generator)
    samples = train.Samples(torch.zeros(5, 1), torch.zeros(5, 256, 1), logprob, reward, 0.0)
    world = train.World(None, None, None, None, samples, None)
    wanted = theory.describe_aim(theory.aim_weights("bound", 3, None, reward), reward, 3)
    for source in (BOUND, BOUND_AS_GRADIENT + BOUND_WEIGHTS):
        assert own(tmp_path, source).find_aim(world, 3) == pytest.approx(wanted, rel=1e-9)
    assert own(tmp_path, BOUND_AS_GRADIENT).find_aim(world, 3) == {}
    for wrong in ("0 * ref_rewards", "ref_rewards"):
        file = own(tmp_path, BOUND + f"def weights(ref_rewards, n):\n    return {wrong}\n")
        with pytest.raises(UnusableInput, match="want none below 0, not all 0"):
            file.find_aim(world, 3)


@pytest.mark.parametrize("source", [BOUND, BOUND_AS_GRADIENT])
def test_a_method_of_ones_own_follows_its_target_or_its_gradient(source, tmp_path):
    reference, samples = three_prompts()
    batch = train.Batch(9, samples.prompt, samples.response, samples.reward)
    found = []
    for method in (methods.choose_method("bound", 3, None),
                   own(tmp_path, source).choose_method("mine", 3, None)):
        policy, _, _ = tiny_world()
        stats = method.gradient(policy, reference, world_reward, batch, 3,
                                train.TuningSettings(k=8, steps=10),
                                torch.Generator().manual_seed(0))
        found.append((stats, gradient_of(policy)))
    assert found[0][0] == found[1][0]
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


@pytest.mark.parametrize("source, message", [
    ("import nothing_of_this_name", r"mine.py:1: ModuleNotFoundError"),
    ("def target(:", r"mine.py:1: SyntaxError"),
    ("x = 1", r"mine.py: want a function target\(rollout, ref_rewards, n\)"),
    ("def target(rollout, ref_rewards, n):\n    return 1 / 0", r"mine.py:2: ZeroDivisionError"),
    ("def target(r, refs, n):\n    return r.reward[0]", r"target: want a tensor \(3, 8\)"),
    ("def target(r, refs, n):\n    return (r.reward > 9).log()", r"rollout.ref_logprob - 30"),
    ("def gradient(*given):\n    pass", r"gradient: want a dict"),
])
def test_a_fault_in_the_file_is_told_in_one_line(source, message, tmp_path):
    reference, samples = three_prompts()
    batch = train.Batch(9, samples.prompt, samples.response, samples.reward)
    with pytest.raises(UnusableInput, match=message) as error:
        file = own(tmp_path, source)
        file.gradient(reference, reference, world_reward, batch, 4,
                      train.TuningSettings(k=8, steps=10), torch.Generator().manual_seed(0))
    assert "\n" not in str(error.value)

# ------------------------------------------------------------------- tables and pictures over seeds

def test_spread_is_the_larger_of_two_errors():
    rows = [{"x": 1.0, "x_se": 0.5}, {"x": 1.2, "x_se": 0.7}]
    assert summary.mean_and_spread(rows, "x") == pytest.approx((1.1, 0.6))
    rows = [{"x": 1.0, "x_se": 0.5}, {"x": 5.0, "x_se": 0.7}]
    assert summary.mean_and_spread(rows, "x") == pytest.approx((3.0, math.sqrt(8)))
    assert summary.mean_and_spread([{"x": 1.0}, {"x": None}], "x") is None


def test_the_method_nearest_to_best_of_n_is_on_top():
    distance = {"ref": 9.0, "vbon": 0.1, "mine": 0.3, "yours": 0.2}
    groups = {(4, label): [{"kl_bon": kl}] for label, kl in distance.items()}
    assert summary.in_order(groups) == ["vbon", "yours", "mine"]
    colors = [summary.choose_color(label, ["vbon", "yours", "mine", "bond", "bonbon"])
              for label in ("vbon", "yours", "mine", "bond", "bonbon")]
    assert len(set(colors)) == 4 and colors[3] == colors[4]

# ---------------------------------------------------------------------------- whole, tiny runs

ARGUMENTS = ["--quick", "--n", "2", "--out"]


def read_lines(folder):
    """The lines of results.jsonl without what they took."""
    rows = []
    for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert 0 <= row.pop("seconds") < 600
        rows.append(row)
    return rows


METHODS = ["--method", "vbon", "kl-rl", "pessimism"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder in which train.py has run, then a comparison of vBoN, KL-RL with the found β and
    with two others, and a method of one's own; its lines before and after, and what was plotted."""
    folder = tmp_path_factory.mktemp("compared")
    plotted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "plot_run", lambda *_: None)
        patch.setattr(summary, "plot_results", lambda *given: plotted.append(given))
        train.main([*ARGUMENTS, str(folder)])
        before = read_lines(folder)
        (folder / "mine.py").write_text(BOUND, encoding="utf-8")
        compare.main([*ARGUMENTS, str(folder), *METHODS, str(folder / "mine.py")])
    return folder, before, read_lines(folder), plotted


def test_comparison_writes_the_lines_of_train_and_trains_vbon_not_again(compared):
    folder, before, after, _ = compared
    assert [row["method"] for row in before] == ["ref", "bon", "vbon"]
    for row, new in zip(before, after):
        decoded = {"decoded_win_rate", "decoded_win_rate_se"}
        assert new.keys() - row.keys() <= decoded
        assert {name: x for name, x in new.items() if name not in decoded} == row
    for stage in ("reference-model", "samples-training", "policy-vbon", "evaluation-vbon"):
        assert len(list((folder / "cache").glob(f"{stage}*.pt"))) == 1


def test_comparison_has_a_finite_line_for_each_method(compared):
    _, _, rows, _ = compared
    assert [row["method"] for row in rows] == ["ref", "bon", "vbon", "soft-bon", "pessimism",
                                               "kl-rl", "mine"]
    for row in rows:
        for name in results.METRICS[:10]:
            assert math.isfinite(row[name])
        assert (row["beta"] is None) == (row["method"] not in ("soft-bon", "pessimism", "kl-rl"))
    assert rows[3]["beta"] == rows[5]["beta"] and len(rows[6]["method_file"]) == 12


def test_comparison_leaves_each_model_and_samples_of_it(compared):
    folder, _, rows, _ = compared
    text = (folder / "samples.txt").read_text(encoding="utf-8")
    for name in ("reference", "best of 2", "soft best of 2", "pessimism", "vBoN", "KL-RL", "mine"):
        assert text.count(f"\n  {name}  ") == 4
    for method, name in (("vbon", "n2-seed0"), ("kl-rl", "kl-rl-n2-seed0"),
                         ("mine", "mine-n2-seed0")):
        row, = [row for row in rows if row["method"] == method]
        written = (folder / f"policy-{name}" / "settings.json").read_text(encoding="utf-8")
        settings = json.loads(written)
        assert settings.pop("weights")
        assert settings == {key: row[key] for key in row if key not in results.METRICS}
        stored, = (folder / "cache").glob(f"policy-{method}-*-seed0-*.pt")
        lines = (folder / f"responses-policy-{name}.jsonl").read_text(encoding="utf-8")
        rewards = [json.loads(line)["reward"] for line in lines.split("\n")[:-1]]
        assert sum(rewards) / len(rewards) == pytest.approx(row["reward"])
        head = load_model(folder / f"policy-{name}").lm_head.weight
        assert torch.equal(head, kept.load(stored)["policy"].lm_head.weight)


def test_the_picture_shows_what_was_compared(compared, tmp_path):
    _, _, _, plotted = compared
    (_, groups, pool), = plotted
    summary.plot_results(tmp_path / "pareto.png", groups, pool)
    assert (tmp_path / "pareto.png").stat().st_size > 30_000
    assert list(groups) == [(2, name) for name in ("ref", "bon", "soft-bon", "pessimism", "vbon",
                                                   "kl-rl", "mine")]
    assert groups[2, "kl-rl"][0]["aim_kl_bon"] > 0 and groups[2, "mine"][0]["aim_kl_bon"] > 0


def test_again_it_trains_nothing_and_adds_no_line(compared, tmp_path, capsys, monkeypatch):
    """An edit of the file of one's own trains this method alone; another β, KL-RL alone."""
    folder, _, rows, _ = compared
    folder = shutil.copytree(folder, tmp_path / "copy")
    plotted = []
    monkeypatch.setattr(summary, "plot_results", lambda *given: plotted.append(given))
    command = [*ARGUMENTS, str(folder), *METHODS, str(folder / "mine.py")]
    compare.main(command)
    assert read_lines(folder) == rows
    printed = capsys.readouterr().out
    assert "1/3" not in printed and "samples (" not in printed
    (folder / "mine.py").write_text(BOUND.replace("n - 1", "n - 2"), encoding="utf-8")
    compare.main([*command, "--beta", "0.5", "2"])
    trained = re.findall(r"^  (.+) 1/3 ", capsys.readouterr().out, re.MULTILINE)
    assert trained == ["kl-rl beta=0.5", "kl-rl beta=2", "mine n=2"]
    assert len(read_lines(folder)) == len(rows) + 5     # soft-bon and kl-rl twice, mine
    (_, groups, _) = plotted[1]
    for beta in (0.5, 2):
        row, = groups[2, f"kl-rl-beta{beta:g}"]
        assert row["beta"] == beta and (folder / f"policy-kl-rl-beta{beta:g}-n2-seed0").exists()


@pytest.mark.parametrize("arguments, message", [
    ("--n 17 --quick --method bond", "bond at n = 17: want --m 17 or more"),
    ("--n 17 --quick --method infalign --k 16", "infalign at n = 17: want --m 17"),
    ("--n 5 --quick --method max-at-k", "max-at-k at n = 5: want --k 5"),
    ("--n 4 --quick --method pessimism --m-eval 4", "pessimism at n = 4: want --m-eval 5"),
    ("--n 0", "--n 0: want at least 1"),
    ("--method kl-rl --beta 0", "--beta 0: want 1e-6 to 1e6"),
    ("--beta 2 nan", "--beta nan: want 1e-6 to 1e6"),
    ("--method vbon --beta 2", "it belongs to kl-rl"),
    ("--method ppo", "want vbon, .*, pessimism, or a file NAME.py"),
    ("--method a/mine.py b/mine.py", "b/mine.py: its name is taken"),
    ("--method missing.py", "missing.py: No such file"),
])
def test_wrong_arguments_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnusableInput, match=message):
        compare.main(arguments.split())

# ----------------------------------------------------------------------------------------- studies

def test_studies_answer_all_questions(compared, capsys):
    folder, _, _, _ = compared
    studies.main([*ARGUMENTS, str(folder)])
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if "largest change of a log target" in line)
    changes = [line[31:].split()[:2] for line in lines[start + 1:start + 5]]
    assert [vbon_change for vbon_change, _ in changes] == ["0"] * 4
    assert all(float(kl_rl_change) > 0 for _, kl_rl_change in changes[1:])
    assert any(line.startswith("WIND  ") and len(line.split()) == 9 for line in lines)
    assert any(line.startswith("  F explains") for line in lines)
    # reference and three policies at five temperatures
    assert sum(line.split()[:1] in (["reference"], ["vbon"], ["kl-rl"], ["bon-sft"])
               and "±" in line for line in lines) == 20
    for name in ("m.png", "fault.png"):
        assert (folder / name).stat().st_size > 10_000


def test_a_study_that_is_impossible_stops_no_other(compared, capsys, monkeypatch):
    """With N = 1 there is no KL to go to."""
    folder, _, _, _ = compared
    monkeypatch.setattr(studies, "STUDIES", ("scale", "bound", "sizes"))
    studies.main(["--quick", "--n", "1", "--out", str(folder)])
    printed = capsys.readouterr().out
    assert "scale is left out: kl-rl at n = 1" in printed and "How far is the bound" in printed
    with pytest.raises(UnusableInput, match="kl-rl at n = 1"):
        studies.main(["--quick", "--n", "1", "--out", str(folder), "--study", "scale"])


def test_sizes_have_their_learning_rates(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(studies, "SIZES", ((1, 32), (2, 64)))
    studies.main([*ARGUMENTS, str(tmp_path), "--study", "sizes"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    for line, width, layers in zip(lines, (32, 64), (1, 2)):
        # in each block, linear layers to 3, 1, 4 and from 4 times the width; and the head
        trained = 4 * (layers * (4 + 2 + 5 + 5) * width + width + 400)
        cells = line.split()
        assert cells[:4] == [str(layers), "x", str(width), f"{trained:,}"]
        assert float(cells[4]) == pytest.approx(0.54 / trained ** 0.5, rel=1e-2)


def test_the_gap_is_split_by_rank():
    """Rewards 1 to 8, among 400 reference rewards that are spread evenly."""
    reward = torch.arange(1.0, 9.0).expand(2, 8)
    refs = torch.arange(0.5, 8.5, 0.02).expand(2, 400)
    ref_logprob = torch.full((2, 8), -20.0).double()
    log_bon = vbon.bon_target(ref_logprob, reward, refs, 4)
    # right: no part of the KL, and nothing to explain
    rows, explained = gap.gap_by_rank(log_bon, ref_logprob, reward, refs, 4)
    assert [row["kl"] for row in rows] == pytest.approx([0] * len(rows))
    assert explained == pytest.approx(0)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    # too probable by a nat above F = .8, by half a nat below
    wrong = torch.where(vbon.empirical_cdf(reward, refs) > 0.8, 1.0, 0.5)
    rows, explained = gap.gap_by_rank(log_bon + wrong, ref_logprob, reward, refs, 4)
    assert explained == pytest.approx(1)
    for row in rows:
        size = 1.0 if row["low"] >= 0.8 else 0.5
        assert row["policy"] - row["bon"] == pytest.approx(size)
        assert row["kl"] == pytest.approx(row["share"] * (size - 1 + math.exp(-size)))


@pytest.mark.parametrize("m, rmse, wins", [(16, 0.49, 0.793), (256, 0.16, 0.7996)])
def test_errors_of_the_cdf_are_within_their_bound(m, rmse, wins):
    found, largest, target = studies.error_of_cdf(m, 4)
    bound = math.sqrt(math.log(40) / (2 * m))
    assert 0.9 * bound < largest <= bound
    assert found == pytest.approx(rmse, abs=0.02)
    assert target == pytest.approx(wins, abs=0.001)


def test_a_fault_of_the_reward_shows_with_a_large_n():
    found = overoptimisation.qualities()
    best = found["best of n, vBoN"]
    peak = max(best)
    assert 4 <= overoptimisation.NS[best.index(peak)] <= 32
    assert best[-1] < -2 < 1 < peak
    cautious = found["pessimism"]
    assert cautious == sorted(cautious) and cautious[-1] > 0.8
    quality, reward = overoptimisation.faulty_world()
    assert (quality != reward).double().mean().item() == pytest.approx(0.01)


@torch.no_grad()
def test_a_cooled_model_has_logits_divided_by_the_temperature():
    reference, _, strings = tiny_world()
    wanted = reference(strings[0]) / 0.5
    assert torch.allclose(temperature.cooled(reference, 0.5)(strings[0]), wanted, atol=1e-5)
    assert not torch.allclose(reference(strings[0]), wanted)


def test_pairs_of_neighbouring_tokens_by_hand():
    response = torch.tensor([[[1, 2], [1, 2], [1, 3], [3, 3]], [[0, 0], [0, 0], [0, 0], [0, 0]]])
    # with 3 as end-of-text: 1 2, 1 3; and 0 0
    assert temperature.count_pairs(response, 3) == (2 + 1) / 2
    assert temperature.count_pairs(response[:, :, :1], 3) == 0
