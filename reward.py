"""reward.py: what a reward is, and the one used by default, a sentiment classifier.

A reward is a function of prompts (P, T) and responses (P, K, L), as token ids. It returns a number
for each response, (P, K). vBoN needs no gradient of it, and uses only how it ranks the responses.
Here it is a classifier's logit for the label "positive". `--reward FILE.py` puts a function of
yours in its place (support/own_reward.py).
"""
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from model import response_mask


class Classifier(nn.Module):
    """Logistic regression on the tokens of a text.

    The logit is (sum of the tokens' weights) / √(number of tokens) + bias. Without the root, long
    texts would have by far the largest logits.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.eot = vocab_size - 1
        self.weight = nn.Embedding(vocab_size, 1)
        self.bias = nn.Parameter(torch.zeros(1))
        # words that training never shows should not count, so all weights start at 0
        nn.init.zeros_(self.weight.weight)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B,)
        """Return each text's logit for "positive"; texts are padded with end-of-text."""
        mask = response_mask(tokens, self.eot)
        weight = self.weight(tokens)[..., 0]            # (B, T)
        total = (weight * mask).sum(1)
        return total / mask.sum(1).sqrt() + self.bias

    @torch.no_grad()
    def reward(self, prompt: Tensor, response: Tensor) -> Tensor:  # (P, T), (P, K, L) -> (P, K)
        """Return the logit of each prompt and response, read as one text."""
        P, K, L = response.shape
        each_prompt = prompt.repeat_interleave(K, 0)
        each_response = response.view(P * K, L)
        text = torch.cat([each_prompt, each_response], 1)
        return self(text).view(P, K)


def train_classifier(tokens: Tensor, labels: Tensor, vocab_size: int, epochs: int,
                     generator: torch.Generator) -> Classifier:
    """Fit a classifier to texts (R, T), padded with end-of-text, and labels (R,), 0 or 1.

    The generator shuffles the texts.
    """
    model = Classifier(vocab_size)
    # weight decay keeps the weights of rare words small
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.1)
    for _ in range(epochs):
        order = torch.randperm(len(tokens), generator=generator)
        for rows in order.split(256):
            logit = model(tokens[rows])
            loss = functional.binary_cross_entropy_with_logits(logit, labels[rows].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: Classifier, tokens: Tensor, labels: Tensor) -> float:
    """Return the share of texts (R, T) whose label (R,) the classifier predicts."""
    predicted = model(tokens) > 0
    return (predicted == (labels == 1)).float().mean().item()
