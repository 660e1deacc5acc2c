"""other_model.py: any causal model of the transformers library, with the two methods of vbon.py.

    model = OtherModel(AutoModelForCausalLM.from_pretrained(FOLDER), ends, pad)
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


class OtherModel(torch.nn.Module):
    """The two methods that vbon.py needs, on a causal model of transformers, LoRA adapters or not.

    ends: the token that ends a response, or several, or none. pad: what follows it in a response.
    Prompts (P, T) of different lengths are padded by `pad_left`.
    """

    def __init__(self, model: torch.nn.Module, ends: int | list[int] | None, pad: int):
        super().__init__()
        if hasattr(model, "get_base_model"):
            # PEFT has put the adapters into the layers of this model; its own `forward` would hide
            # which arguments the model takes
            model = model.get_base_model()
        self.model = model.eval()                       # no dropout: see `logprob`
        self.ends = [ends] if isinstance(ends, int) else list(ends or [])
        self.pad = pad
        self.takes = inspect.signature(model.forward).parameters

    @torch.no_grad()
    def sample(self, prompt: Tensor, k: int, length: int, generator: torch.Generator
               ) -> tuple[Tensor, None]:
        """Sample k responses to each prompt (P, T): ids (P, k, length), padded after their end.

        They come from the full softmax at temperature 1. Their log-probabilities are not computed:
        the second result is None.
        """
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
        try:
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                tokens = self.model.generate(tokens.clamp(min=0), generation_config=config,
                                             attention_mask=(tokens != NO_TOKEN).long())
        finally:
            self.model.generation_config = own_config
        response = tokens[:, prompt.shape[1]:]
        # if all have ended, `generate` stops early
        missing = length - response.shape[1]
        response = torch.nn.functional.pad(response, (0, missing), value=self.pad)
        return response.view(-1, k, length), None

    def logprob(self, prompt: Tensor, response: Tensor) -> Tensor:
        """Return log π(y|x) (P, K) of responses (P, K, L), under the distribution of `sample`.

        Raises ValueError if trained weights are in half precision: most updates are smaller than
        the distance to the next number there, and are lost.
        """
        self._check_precision()
        P, K, L = response.shape
        each_prompt = prompt.repeat_interleave(K, 0)
        each_response = response.flatten(0, 1)                              # (P·K, L)
        # the logits at a token predict the next one: the last token predicts nothing
        tokens = torch.cat([each_prompt, each_response], 1)[:, :-1]
        mask = (tokens != NO_TOKEN).long()
        arguments = {"attention_mask": mask}
        if "position_ids" in self.takes:
            # the first token of a prompt has position 0, also behind padding
            arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if "logits_to_keep" in self.takes:
            arguments["logits_to_keep"] = L                 # those of a prompt take memory, too
        logits = self.model(tokens.clamp(min=0), **arguments).logits[:, -L:].float()
        token_logprob = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), each_response,
                                                           reduction="none")
        return (token_logprob.double() * self.mask(each_response)).sum(-1).view(P, K)

    def mask(self, response: Tensor) -> Tensor:  # (..., L) -> (..., L)
        """True up to and including the first token that ends a response."""
        ended = torch.isin(response, torch.tensor(self.ends, device=response.device))
        ended_before = ended.cumsum(-1) - ended.long()
        return ended_before == 0

    def _check_precision(self) -> None:
        if not torch.is_grad_enabled():
            return
        for name, p in self.model.named_parameters():
            if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(f"{name} is {p.dtype}: load the model in float32")
