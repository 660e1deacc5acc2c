"""The sizes of everything: the defaults, and what text, model, N and flags make of them."""
import pytest
import torch

import train
from model import GPT, prompts_at_a_time
from support.files import UnusableInput
from support.inputs import Inputs, Pretrained
from support.options import make_parser
from support.settings import check_settings, choose_settings

DEFAULTS = train.Settings()


def choose(n=4, reviews=None, pretrained=None, flags=()):
    """The settings for flags and inputs."""
    args = make_parser("").parse_args([str(flag) for flag in flags])
    inputs = Inputs(torch.device("cpu"), reviews, None, pretrained)
    return choose_settings(DEFAULTS, args, n, inputs)


def test_the_main_job_has_the_sizes_that_the_readme_states():
    assert DEFAULTS.flat() == {
        "reviews": 12_000, "vocab": 768, "prompt_tokens": 4, "length": 24, "layers": 2, "heads": 2,
        "width": 64, "lm_steps": 1000, "lm_batch": 64, "lm_lr": 6e-3, "epochs": 4, "prompts": 512,
        "m": 64, "held_prompts": 64, "m_eval": 512, "steps": 90, "batch": 64, "k": 8, "rank": 4,
        "lr_scale": 0.54, "k_eval": 64, "processes": 1}
    assert choose() == DEFAULTS


def test_a_setting_of_several_stages_changes_in_all_of_them():
    changed = DEFAULTS.change(length=7)
    for stage in (changed.text, changed.samples, changed.tuning, changed.evaluation):
        assert stage.length == 7
    assert changed.change(length=24) == DEFAULTS
    with pytest.raises(TypeError, match="no such settings: lenght"):
        DEFAULTS.change(lenght=7)


def test_settings_follow_text_model_n_and_flags():
    data = [("a text", 0)] * 10_000
    assert choose(8, data) == DEFAULTS.change(
        reviews=10_000, vocab=2048, lm_steps=2000, lm_lr=3e-3, epochs=6, m=128, steps=600,
        length=0)
    s = choose(9, data[:1200])
    assert (s.text.vocab, s.reference.lm_steps, s.tuning.steps) == (512, 400, 1800)
    s = choose(9, data[:4003])
    assert (s.text.vocab, s.reference.lm_steps) == (1000, 1334)
    assert type(s.text.vocab) is type(s.reference.lm_steps) is int
    # a given model says how large it is, and what room it has
    given = Pretrained(GPT(50, 12, n_layer=3, n_head=2, n_embd=16), None)
    assert choose(4, data[:6049], given) == DEFAULTS.change(
        reviews=6049, vocab=50, layers=3, heads=2, width=16, lm_steps=120, lm_lr=5e-5, epochs=6,
        prompts=256, held_prompts=32, steps=250, length=0)
    # without own text, the length is as much as has room
    assert choose(4, None, given).text.length == 8
    # everything tiny
    assert choose(flags=["--quick"]) == DEFAULTS.change(
        reviews=600, vocab=400, width=32, lm_steps=10, epochs=1, prompts=8, m=16, held_prompts=8,
        m_eval=64, steps=3, batch=4, k=4, k_eval=8)
    # what the command line says goes before everything
    s = choose(9, data, flags=["--steps", 7, "--m", 5, "--lm-steps", 3, "--length", 9,
                               "--prompt-tokens", 2, "--quick"])
    assert (s.tuning.steps, s.samples.m, s.reference.lm_steps, s.text.length,
            s.text.prompt_tokens) == (7, 5, 3, 9, 2)


def test_above_8_training_takes_three_times_the_updates():
    assert choose(8).tuning.steps == 90
    assert choose(9).tuning.steps == 270


def test_a_large_vocabulary_is_scored_a_few_prompts_at_a_time():
    """The logits of 3 prompts of GPT-2 are 2^25 numbers."""
    large = GPT(50257, 12, n_layer=1, n_head=1, n_embd=1)
    assert prompts_at_a_time(large, 8, 24) == 3
    assert prompts_at_a_time(large, 1000, 24) == 1


def test_n_may_be_as_large_as_the_samples_of_the_evaluation():
    args = make_parser("").parse_args(["--quick"])
    check_settings(choose(64, flags=["--quick"]), args, 64)
    with pytest.raises(UnusableInput, match="--n 65"):
        check_settings(choose(65, flags=["--quick"]), args, 65)
