"""other_model.py: vBoN with a model that is not ours: any causal one of the transformers library.

    python -m experiments.other_model FOLDER --prompts prompts.txt --reward reward.py --out tuned

FOLDER is a Hugging Face folder, or a name on the hub. prompts.txt has a prompt a line, reward.py a
function reward(prompts, responses) as for train.py. The trained model is left in --out, a folder
that transformers loads. It needs the transformers library, and uses a GPU if there is one.
"""
import argparse
import inspect
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import vbon
from support import options
from support.files import UnusableInput, read_text
from support.own_reward import RewardFile
from support.seeding import seeded_generator


class OtherModel(torch.nn.Module):
    """The two methods that vbon.py needs, on a causal model of transformers.

    ends: the token that ends a response, or several, or none. Prompts (P, T) are padded on the left
    with `pad`. Raises ValueError for a model in half precision: most updates are smaller than the
    distance to the next number there, and are lost.
    """

    def __init__(self, model: torch.nn.Module, ends: int | list[int] | None, pad: int):
        super().__init__()
        for name, p in model.named_parameters():
            if p.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(f"{name} is {p.dtype}: load the model in float32")
        self.model = model.eval()                       # no dropout: see `logprob`
        self.ends = [ends] if isinstance(ends, int) else list(ends or [])
        self.pad = pad
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def sample(self, prompt: Tensor, k: int, length: int, generator: torch.Generator
               ) -> tuple[Tensor, Tensor]:
        """Sample k responses to each prompt (P, T): ids (P, k, length), padded after their end, and
        log-probabilities (P, k)."""
        # the full softmax at temperature 1
        config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                  max_new_tokens=length, eos_token_id=self.ends or None,
                                  pad_token_id=self.pad)
        tokens = prompt.repeat_interleave(k, 0)                             # (P·k, T)
        # `generate` uses PyTorch's own random numbers
        seed = torch.randint(2 ** 62, (), generator=generator, device=generator.device).item()
        devices = [prompt.device] if prompt.is_cuda else []
        # `generate` would take what seems to be unset from the model's own settings
        own_config = self.model.generation_config
        self.model.generation_config = config
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            tokens = self.model.generate(tokens, attention_mask=self._is_prompt(tokens).long(),
                                         generation_config=config)
        self.model.generation_config = own_config
        response = tokens[:, prompt.shape[1]:]
        # if all have ended, `generate` stops early
        missing = length - response.shape[1]
        response = torch.nn.functional.pad(response, (0, missing), value=self.pad)
        response = response.view(-1, k, length)
        return response, self.logprob(prompt, response)

    def logprob(self, prompt: Tensor, response: Tensor) -> Tensor:
        """Return log π(y|x) (P, K) of responses (P, K, L), under the distribution of `sample`."""
        P, K, L = response.shape
        each_prompt = prompt.repeat_interleave(K, 0)
        each_response = response.flatten(0, 1)                              # (P·K, L)
        tokens = torch.cat([each_prompt, each_response], 1)[:, :-1]
        mask = torch.cat([self._is_prompt(each_prompt), torch.ones_like(each_response).bool()], 1)
        mask = mask[:, :-1].long()
        arguments = {"attention_mask": mask}
        if self.takes_positions:
            # the first token of a prompt has position 0, also behind padding
            arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        # the logits at a token predict the next one
        logits = self.model(tokens, **arguments).logits[:, -L:].float()
        token_logprob = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), each_response,
                                                           reduction="none")
        return (token_logprob.double() * self.mask(each_response)).sum(-1).view(P, K)

    def mask(self, response: Tensor) -> Tensor:  # (..., L) -> (..., L)
        """True up to and including the first token that ends a response."""
        ended = torch.isin(response, torch.tensor(self.ends, device=response.device))
        ended_before = ended.cumsum(-1) - ended.long()
        return ended_before == 0

    def _is_prompt(self, prompt: Tensor) -> Tensor:
        """False for the padding on the left; the same token further on belongs to the prompt."""
        return (prompt != self.pad).cumsum(-1) > 0


def main(argv: list[str] | None = None) -> None:
    """Fine-tune all weights of a model towards best-of-n."""
    args = parse_arguments(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.folder, padding_side="left")
    policy = load_model(args.folder, tokenizer).to(device)
    reference = load_model(args.folder, tokenizer).to(device)
    prompts = [line for line in read_text(args.prompts).splitlines() if line.strip()]
    if not prompts:
        raise UnusableInput(f"--prompts {args.prompts}: no prompts")
    tokenizer.pad_token_id = policy.pad
    prompt = tokenizer(prompts, padding=True, return_tensors="pt")["input_ids"].to(device)
    file = RewardFile(args.reward)

    def reward_fn(prompt: Tensor, response: Tensor) -> Tensor:
        K = response.shape[1]
        before = tokenizer.batch_decode(prompt.repeat_interleave(K, 0), skip_special_tokens=True)
        after = tokenizer.batch_decode(response.flatten(0, 1), skip_special_tokens=True)
        return torch.tensor(file.ask(before, after)).view(response.shape[:2])

    # M rewards of the reference for each prompt, once
    generator = seeded_generator(device, "reference", args.seed)
    ref_rewards = []
    for x in prompt.split(4):
        response, _ = reference.sample(x, args.m, args.length, generator)
        ref_rewards.append(reward_fn(x, response))
    ref_rewards = torch.cat(ref_rewards)

    trained = list(policy.parameters())
    # the noise of all weights together should not grow with their number: see README.md
    lr = 0.54 / math.sqrt(sum(p.numel() for p in trained))
    optimizer = torch.optim.Adam(trained, lr=lr, betas=(0.9, 0.99))
    for step in range(args.steps):
        rows = torch.randperm(len(prompt), generator=generator, device=device)[:args.batch]
        x = prompt[rows]
        refs = ref_rewards[rows.cpu()]
        n = vbon.grow(args.n, step, args.steps)
        optimizer.zero_grad()
        rollout = vbon.roll_out(policy, reference, reward_fn, x, args.k, args.length, generator, 4)
        log_target = vbon.bon_target(rollout.ref_logprob, rollout.reward, refs, n)
        logprob = vbon.reinforce(policy, x, rollout.response, log_target, 4)
        optimizer.step()
        wins = vbon.win_rate(rollout.reward, refs).mean().item()
        kl = (logprob - log_target).mean().item()
        print(f"update {step + 1}/{args.steps}  best of {n}  win_rate {wins:.3f}  "
              f"kl_target {kl:.3f}", flush=True)
    if args.out is not None:
        policy.model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
        print(f"the policy is in {args.out}")


def load_model(folder: str, tokenizer) -> OtherModel:
    """Load a model in float32; its own settings say which tokens end a response."""
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if isinstance(ends, list) else ends
    if pad is None:
        pad = 0
    return OtherModel(model, ends, pad)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line. Raises UnusableInput for wrong ones."""
    parser = options.Parser(description=__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="A Hugging Face folder or name.")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE",
                        help="A text file with a prompt a line, of any length.")
    parser.add_argument("--reward", required=True, metavar="FILE.py",
                        help="A Python file that defines reward(prompts, responses).")
    parser.add_argument("--n", type=int, default=4, help="The N of best-of-N. Default: 4.")
    parser.add_argument("--m", type=int, default=64, help="The number of reference samples for "
                        "each prompt. Default: 64.")
    parser.add_argument("--k", type=int, default=8, help="The number of responses to each prompt "
                        "of an update. Default: 8.")
    parser.add_argument("--batch", type=int, default=16, help="The number of prompts in an update. "
                        "Default: 16.")
    parser.add_argument("--steps", type=int, default=200, help="The number of updates. "
                        "Default: 200.")
    parser.add_argument("--length", type=int, default=24, help="The largest number of tokens in a "
                        "response. Default: 24.")
    parser.add_argument("--seed", type=int, default=0, help="The seed of all random numbers.")
    parser.add_argument("--out", metavar="DIR", help="The folder for the trained model. Default: "
                        "it is not kept.")
    args = parser.parse_args(argv)
    for name, least in (("n", 1), ("m", 1), ("k", 2), ("batch", 1), ("steps", 1), ("length", 1)):
        if getattr(args, name) < least:
            raise UnusableInput(f"--{name} {getattr(args, name)}: want at least {least}")
    return args


if __name__ == "__main__":
    options.run(main, "other_model")
