"""The classifier."""
import pytest
import torch

from reward import Classifier, accuracy, train_classifier
from support.reviews import builtin_reviews
from support.tokenizer import encode, train_tokenizer


@torch.no_grad()
def test_the_logit_by_hand():
    """Weights 1, 2, 3, .. of ids 0, 1, 2, ..; the first end counts, and nothing behind it."""
    model = Classifier(5)
    assert model(torch.tensor([[0, 2, 4, 4]])).tolist() == [0]          # a new one knows nothing
    model.weight.weight.copy_(torch.arange(1.0, 6)[:, None])
    model.bias.fill_(0.5)
    logit = model(torch.tensor([[0, 2, 4, 4], [0, 2, 4, 1], [1, 1, 1, 1]]))
    assert logit.tolist() == pytest.approx([9 / 3 ** 0.5 + 0.5, 9 / 3 ** 0.5 + 0.5, 8 / 2 + 0.5])
    # the reward of prompt and response is that of one text: here of the rows above
    prompt = torch.tensor([[0], [1]])
    response = torch.tensor([[[2, 4, 4], [2, 4, 1]], [[1, 1, 1], [1, 1, 1]]])
    assert model.reward(prompt, response).tolist() == [logit[:2].tolist(), 2 * [logit[2].item()]]


def test_the_classifier_is_mostly_right_and_its_accuracy_is_that_of_the_sign():
    reviews = builtin_reviews(3000, 0)
    encoding = train_tokenizer([text for text, _ in reviews[:200]], 400)
    tokens = encode(encoding, [text for text, _ in reviews], 40)
    labels = torch.tensor([label for _, label in reviews])
    model = train_classifier(tokens[500:], labels[500:], 400, 4, torch.Generator().manual_seed(0))
    right = ((model(tokens[:500]) > 0) == (labels[:500] == 1)).double().mean().item()
    assert right > 0.8
    assert accuracy(model, tokens[:500], labels[:500]) == pytest.approx(right)
    # after 40 updates with this learning rate and weight decay
    assert model.weight.weight.std().item() == pytest.approx(0.379, rel=0.03)
    good, bad = encode(encoding, ["i loved it . superb .", "i hated it . awful ."], 40)
    assert model(good[None]).item() > 0.5
    assert model(bad[None]).item() < -0.5
