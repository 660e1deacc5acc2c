"""other_model.py: vBoN with a model that is not ours: any causal one of transformers.

    python -m experiments.other_model FOLDER

It needs the transformers library. FOLDER is a Hugging Face folder, or a name on the hub. The demo
below teaches the model to respond in few words: a reward that any model can be trained with.
"""
import argparse

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import vbon
from model import response_mask


class OtherModel(torch.nn.Module):
    """The two methods that vbon.py needs, on a causal model of transformers."""

    def __init__(self, model: torch.nn.Module, eot: int):
        super().__init__()
        self.model = model.eval()                       # no dropout: see `logprob`
        self.eot = eot                                  # the id that ends a response

    @torch.no_grad()
    def sample(self, prompt: Tensor, k: int, length: int, generator: torch.Generator
               ) -> tuple[Tensor, Tensor]:
        """Sample k responses to each prompt (P, T): ids (P, k, length), padded with end-of-text."""
        tokens = prompt.repeat_interleave(k, 0)                             # (P·k, T)
        for _ in range(length):
            # All tokens are read again for each new one. It is slow, but the same for all
            # architectures, whose caches differ.
            prob = self.model(tokens).logits[:, -1].float().softmax(-1)
            token = torch.multinomial(prob, 1, generator=generator)
            tokens = torch.cat([tokens, token], 1)
        response = tokens[:, -length:]
        # tokens after the end are ignored
        response = response.where(response_mask(response, self.eot), self.eot)
        response = response.view(-1, k, length)
        return response, self.logprob(prompt, response)

    def logprob(self, prompt: Tensor, response: Tensor) -> Tensor:
        """Return log π(y|x) (P, K) of responses (P, K, L), under the distribution of `sample`."""
        P, K, L = response.shape
        each_response = response.flatten(0, 1)                              # (P·K, L)
        tokens = torch.cat([prompt.repeat_interleave(K, 0), each_response], 1)
        # the logits at a token predict the next one
        logits = self.model(tokens[:, :-1]).logits[:, -L:].float()
        token_logprob = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), each_response,
                                                           reduction="none")
        return (token_logprob * response_mask(each_response, self.eot)).sum(-1).view(P, K)


def main(argv: list[str] | None = None) -> None:
    """vBoN in 25 lines: one prompt, N = 4, a reward for short responses."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=20, help="The number of updates.")
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)

    def load() -> OtherModel:
        return OtherModel(AutoModelForCausalLM.from_pretrained(args.folder), tokenizer.eos_token_id)

    def few_words(prompt: Tensor, response: Tensor) -> Tensor:
        texts = tokenizer.batch_decode(response.flatten(0, 1), skip_special_tokens=True)
        lengths = [len(text.split()) for text in texts]
        return -torch.tensor(lengths).view(response.shape[:2])

    policy = load()
    reference = load()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.tensor([tokenizer.encode("i watched this film", add_special_tokens=False)])
    ref_response, _ = reference.sample(prompt, 256, 12, generator)
    ref_rewards = few_words(prompt, ref_response)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-4)
    for step in range(args.steps):
        n = vbon.grow(4, step, args.steps)
        optimizer.zero_grad()
        rollout = vbon.roll_out(policy, reference, few_words, prompt, 32, 12, generator)
        log_target = vbon.bon_target(rollout.ref_logprob, rollout.reward, ref_rewards, n)
        vbon.reinforce(policy, prompt, rollout.response, log_target)
        optimizer.step()
        wins = vbon.win_rate(rollout.reward, ref_rewards).mean().item()
        print(f"update {step + 1}  best of {n}  win_rate {wins:.3f}")


if __name__ == "__main__":
    main()
