"""The classifier."""
import pytest
import torch

import reward as reward_file
from reward import Classifier, accuracy, train_classifier
from support.reviews import builtin_reviews
from support.tokenizer import encode, train_tokenizer

@pytest.fixture(scope="module")
def learned():
    """An encoder and a classifier of 2,500 reviews; 500 others."""
    reviews = builtin_reviews(3000, 0)
    encoding = train_tokenizer([text for text, _ in reviews[:500]], 512)
    tokens = encode(encoding, [text for text, _ in reviews], 40)
    labels = torch.tensor([label for _, label in reviews])
    generator = torch.Generator().manual_seed(0)
    model = train_classifier(tokens[500:], labels[500:], 512, 4, generator)
    return encoding, model, tokens[:500], labels[:500]


@torch.no_grad()
def test_the_classifier_is_mostly_right(learned):
    _, model, tokens, labels = learned
    is_right = (model(tokens) > 0) == (labels == 1)
    assert is_right.double().mean() > 0.8


@torch.no_grad()
def test_praise_has_a_higher_reward_than_complaint(learned):
    encoding, model, _, _ = learned
    good, bad = encode(encoding, ["i loved it . superb .", "i hated it . awful ."], 40)
    assert model(good[None]).item() > 0.5
    assert model(bad[None]).item() < -0.5


@torch.no_grad()
def test_the_classifier_ignores_what_follows_the_end(learned):
    _, model, tokens, _ = learned
    end = torch.full((500, 1), 511)
    once = torch.cat([tokens[:, :9], end], 1)
    more = torch.cat([once, tokens[:, 9:15]], 1)
    assert torch.allclose(model(once), model(more), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_reward_is_the_logit_of_prompt_and_response(learned):
    _, model, tokens, _ = learned
    prompt = tokens[:3, :4]
    response = torch.stack([tokens[:3, 4:20], tokens[5:8, 4:20]], 1)        # (3, 2, 16)
    found = model.reward(prompt, response)
    assert found.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            text = torch.cat([prompt[i], response[i, j]])[None]
            assert found[i, j].item() == pytest.approx(model(text).item(), abs=1e-5)


@torch.no_grad()
def test_the_logit_by_hand():
    """Weights 1, 2, 3, .. of ids 0, 1, 2, ..; the end counts, since it belongs to the text."""
    model = Classifier(5)
    model.weight.weight.copy_(torch.arange(1.0, 6)[:, None])
    model.bias.fill_(0.5)
    logit = model(torch.tensor([[0, 2, 4, 4], [1, 1, 1, 1]]))
    assert logit.tolist() == pytest.approx([9 / 3 ** 0.5 + 0.5, 8 / 2 + 0.5])


def test_a_new_classifier_knows_nothing():
    assert Classifier(512)(torch.zeros(3, 4).long()).tolist() == [0, 0, 0]


def test_the_accuracy_is_that_of_the_sign(learned):
    _, model, tokens, labels = learned
    right = [(logit > 0) == (label == 1) for logit, label in zip(model(tokens), labels)]
    assert accuracy(model, tokens, labels) == pytest.approx(sum(right).item() / 500)
    assert accuracy(model, tokens, 1 - labels) == pytest.approx(1 - sum(right).item() / 500)


def test_random_initial_weights_come_from_the_generator(monkeypatch):
    """Of a reader's own classifier; and no random numbers of others are used up."""
    class Other(Classifier):
        def __init__(self, vocab_size):
            super().__init__(vocab_size)
            torch.nn.init.normal_(self.weight.weight)

    monkeypatch.setattr(reward_file, "Classifier", Other)
    tokens = torch.arange(40).view(8, 5)
    labels = torch.arange(8) % 2
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = train_classifier(tokens, labels, 41, 2, torch.Generator().manual_seed(0))
        assert torch.equal(torch.get_rng_state(), before)
        found.append(model.weight.weight)
    assert torch.equal(*found)
    assert found[0].std() > 0.5
