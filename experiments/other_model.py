"""other_model.py: any causal model of the transformers library, with the two methods of vbon.py.

    model = OtherModel(AutoModelForCausalLM.from_pretrained(FOLDER), [tokenizer.eos_token_id], 0)
    prompt = pad_left([tokenizer(text)["input_ids"] for text in prompts])
    response, _ = model.sample(prompt, k, length, generator)
    logprob = model.logprob(prompt, response)

`vbon.roll_out` and `vbon.reinforce` work with it. with_trl.py evaluates with it.
"""
import inspect

import torch
from torch import Tensor
from transformers import GenerationConfig

NO_TOKEN = -1                           # pads prompts: every id of a vocabulary may be in a prompt


def pad_left(prompts: list[list[int]], device: torch.device | str = "cpu") -> Tensor:
    """Return prompts of different lengths as one tensor (P, T), with NO_TOKEN before each."""
    longest = max(len(ids) for ids in prompts)
    rows = [[NO_TOKEN] * (longest - len(ids)) + ids for ids in prompts]
    return torch.tensor(rows, device=device)


def add_positions(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Count positions from the first token of a prompt, as `generate` does: by a mask alone, a
    GPT-2 would count the padding, too."""
    mask = kwargs.get("attention_mask")
    if mask is not None and kwargs.get("position_ids") is None:
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return args, kwargs


class OtherModel(torch.nn.Module):
    """The two methods that vbon.py needs, on a causal model of transformers, LoRA adapters or not.

    ends: the tokens that end a response. pad: the token that follows them in a response. The
    model's settings for `generate` become those of `sample`. To train the model, load it in
    float32: most updates of weights in half precision are lost.
    """

    def __init__(self, model: torch.nn.Module, ends: list[int], pad: int):
        super().__init__()
        if hasattr(model, "get_base_model"):
            # PEFT has put the adapters into the layers of this model; its own `forward` would hide
            # which arguments the model takes
            model = model.get_base_model()
        self.model = model.eval()                               # no dropout
        self.ends = ends
        self.pad = pad
        self.takes = inspect.signature(model.forward).parameters
        if "position_ids" in self.takes:
            model.base_model.register_forward_pre_hook(add_positions, with_kwargs=True)
        # `generate` takes what its caller leaves out from here: the full softmax at temperature 1
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=ends or None,
            pad_token_id=pad)

    @torch.no_grad()
    def sample(self, prompt: Tensor, k: int, length: int, generator: torch.Generator
               ) -> tuple[Tensor, None]:
        """Sample k responses to each prompt (P, T): ids (P, k, length), padded after their end.

        Their log-probabilities are not computed: the second result is None.
        """
        tokens = prompt.repeat_interleave(k, 0)                             # (P·k, T)
        # `generate` uses PyTorch's own random numbers
        seed = torch.randint(2 ** 62, (), generator=generator, device=generator.device).item()
        devices = [prompt.device] if prompt.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            tokens = self.model.generate(tokens.clamp(min=0), max_new_tokens=length,
                                         attention_mask=(tokens != NO_TOKEN).long())
        response = tokens[:, prompt.shape[1]:]
        # if all have ended, `generate` stops early
        missing = length - response.shape[1]
        response = torch.nn.functional.pad(response, (0, missing), value=self.pad)
        return response.view(-1, k, length), None

    def logprob(self, prompt: Tensor, response: Tensor) -> Tensor:
        """Return log π(y|x) (P, K) of responses (P, K, L), under the distribution of `sample`."""
        P, K, L = response.shape
        each_prompt = prompt.repeat_interleave(K, 0)
        each_response = response.flatten(0, 1)                              # (P·K, L)
        # the logits at a token predict the next one: the last token predicts nothing
        tokens = torch.cat([each_prompt, each_response], 1)[:, :-1]
        arguments = {"attention_mask": (tokens != NO_TOKEN).long()}
        if "logits_to_keep" in self.takes:
            arguments["logits_to_keep"] = L                 # those of a prompt take memory, too
        logits = self.model(tokens.clamp(min=0), **arguments).logits[:, -L:].float()
        token_logprob = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), each_response,
                                                           reduction="none")
        return (token_logprob.double() * self.mask(each_response)).sum(-1).view(P, K)

    def mask(self, response: Tensor) -> Tensor:  # (..., L) -> (..., L)
        """Return True up to and including the first token that ends a response."""
        ended = torch.isin(response, torch.tensor(self.ends, device=response.device))
        ended_before = ended.cumsum(-1) - ended.long()
        return ended_before == 0
