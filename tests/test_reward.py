"""The classifier."""
import pytest
import torch

from reward import Classifier, accuracy, train_classifier
from support.reviews import builtin_reviews
from support.tokenizer import encode, train_tokenizer


@pytest.fixture(scope="module")
def learned():
    """An encoder and a classifier of 2,500 reviews; 500 others."""
    reviews = builtin_reviews(3000, 0)
    encoding = train_tokenizer([text for text, _ in reviews[:200]], 400)
    tokens = encode(encoding, [text for text, _ in reviews], 40)
    labels = torch.tensor([label for _, label in reviews])
    generator = torch.Generator().manual_seed(0)
    model = train_classifier(tokens[500:], labels[500:], 400, 4, generator)
    return encoding, model, tokens[:500], labels[:500]


@torch.no_grad()
def test_the_classifier_is_mostly_right_and_its_accuracy_is_that_of_the_sign(learned):
    encoding, model, tokens, labels = learned
    right = [(logit > 0) == (label == 1) for logit, label in zip(model(tokens), labels)]
    share = sum(right).item() / 500
    assert share > 0.8
    assert accuracy(model, tokens, labels) == pytest.approx(share)
    assert accuracy(model, tokens, 1 - labels) == pytest.approx(1 - share)
    good, bad = encode(encoding, ["i loved it . superb .", "i hated it . awful ."], 40)
    assert model(good[None]).item() > 0.5
    assert model(bad[None]).item() < -0.5


@torch.no_grad()
def test_the_logit_by_hand():
    """Weights 1, 2, 3, .. of ids 0, 1, 2, ..; the first end counts, and nothing behind it."""
    model = Classifier(5)
    assert model(torch.tensor([[0, 2, 4, 4]])).tolist() == [0]          # a new one knows nothing
    model.weight.weight.copy_(torch.arange(1.0, 6)[:, None])
    model.bias.fill_(0.5)
    logit = model(torch.tensor([[0, 2, 4, 4], [0, 2, 4, 1], [1, 1, 1, 1]]))
    assert logit.tolist() == pytest.approx([9 / 3 ** 0.5 + 0.5, 9 / 3 ** 0.5 + 0.5, 8 / 2 + 0.5])


@torch.no_grad()
def test_the_reward_is_the_logit_of_prompt_and_response(learned):
    _, model, tokens, _ = learned
    prompt = tokens[:3, :4]
    response = torch.stack([tokens[:3, 4:20], tokens[5:8, 4:20]], 1)    # (3, 2, 16)
    found = model.reward(prompt, response)
    assert found.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            text = torch.cat([prompt[i], response[i, j]])[None]
            assert found[i, j].item() == pytest.approx(model(text).item(), abs=1e-5)


def test_training_is_that_of_a_plain_loop():
    """AdamW on batches of 256 texts in an order of the generator; labels are 0 or 1."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 30, (600, 5), generator=g)
    labels = torch.randint(0, 2, (600,), generator=g)
    found = train_classifier(tokens, labels, 31, 2, g.manual_seed(1))
    model = Classifier(31)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.1)
    g.manual_seed(1)
    for _ in range(2):
        order = torch.randperm(600, generator=g)
        for rows in (order[:256], order[256:512], order[512:]):
            sign = 2 * labels[rows] - 1
            loss = -(sign * model(tokens[rows])).sigmoid().log().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert torch.allclose(found.weight.weight, model.weight.weight, rtol=0, atol=2e-3)
    assert found.weight.weight.std() > 0.03
