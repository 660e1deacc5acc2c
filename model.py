"""model.py: a GPT-2, small enough to read in one sitting, with room for OpenAI's weights.

The network is GPT-2's (Radford et al. 2019): pre-norm blocks, learned positions, GELU. Parameters
have GPT-2's own names, so its published weights load by name. After the network come the two
methods that vBoN needs, `GPT.sample` and `GPT.logprob`, and the adapters that fine-tuning trains.

Left out, and why that is safe: dropout, since training is short; top-k and temperature, since a
policy must be sampled from exactly the distribution that its log-probabilities describe.
"""
import math

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

# -------------------------------------------------------------------------------------- the network

ACTIVATIONS = {
    "gelu": nn.GELU(),                              # exact, and faster on a CPU
    "gelu_new": nn.GELU(approximate="tanh"),        # OpenAI's approximation of it
    "gelu_pytorch_tanh": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
}


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor, cache: Tensor | None, start: int) -> Tensor:
        """(B, T, C) -> (B, T, C). With a cache, x holds the tokens from position `start` on."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=-1)
        # each of the H heads attends separately, with D = C / H channels
        q = self._split_heads(q)                                          # (B, H, T, D)
        k = self._split_heads(k)
        v = self._split_heads(v)
        if cache is not None:
            # store the new keys and values, and attend to all that are stored so far
            end = start + T
            cache[0, :, :, start:end] = k
            cache[1, :, :, start:end] = v
            k = cache[0, :, :, :end]
            v = cache[1, :, :, :end]
        # A single token is the last one. It may attend to all keys, so no mask is needed.
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)

    def _split_heads(self, x: Tensor) -> Tensor:
        # (B, T, C) -> (B, T, H, D) -> (B, H, T, D)
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers with a nonlinearity; the hidden layer is four times as wide."""

    def __init__(self, n_embd: int, activation: str):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.activation = ACTIVATIONS[activation]
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C), the same function at each position."""
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """Attention, then the MLP; each reads from the residual stream and adds to it."""

    def __init__(self, n_embd: int, n_head: int, activation: str):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = MLP(n_embd, activation)

    def forward(self, x: Tensor, cache: Tensor | None, start: int) -> Tensor:
        """(B, T, C) -> (B, T, C); cache and start as in `Attention`."""
        x = x + self.attn(self.ln_1(x), cache, start)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """A GPT-2. The last id of the vocabulary is the end-of-text token.

    model(tokens)                                  logits (B, T, V) of the token after each token
    model.sample(prompt, k, length, generator)     k responses to each prompt, and their log-probs
    model.logprob(prompt, response)                log-probs of given responses, with gradients

    A response ends with its first end-of-text token, or after `length` tokens. Positions after the
    end are padded with end-of-text and ignored.
    """

    def __init__(self, vocab_size: int, block_size: int, n_layer: int = 2, n_head: int = 4,
                 n_embd: int = 64, activation: str = "gelu", tied: bool = True,
                 generator: torch.Generator | None = None):
        super().__init__()
        if n_embd % n_head != 0:
            raise ValueError(f"n_embd = {n_embd} is not a multiple of n_head = {n_head}")
        self.config = dict(vocab_size=vocab_size, block_size=block_size, n_layer=n_layer,
                           n_head=n_head, n_embd=n_embd, activation=activation, tied=tied)
        self.eot = vocab_size - 1
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head, activation) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight
        self._initialise(generator)

    def _initialise(self, generator: torch.Generator | None) -> None:
        """Set GPT-2's initial weights: normal, with a smaller std where a layer writes to the
        residual stream."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("c_proj.weight"):
                std = 0.02 / math.sqrt(2 * self.config["n_layer"])
                nn.init.normal_(p, std=std, generator=generator)
            elif "ln_" not in name:
                nn.init.normal_(p, std=0.02, generator=generator)

    def untie_head(self) -> None:
        """Give the output head its own copy of the token embedding's weights, unless it has one.

        As long as the weights are shared, making a token more probable also changes its embedding.
        """
        if self.config["tied"]:
            self.lm_head.weight = nn.Parameter(self.wte.weight.detach().clone())
            self.config["tied"] = False

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V) of the next token; T is at most block_size."""
        return self.lm_head(self.states(tokens))

    def states(self, tokens: Tensor, cache: list[Tensor] | None = None, start: int = 0) -> Tensor:
        """Token ids (B, T) -> last hidden states (B, T, C), from which `lm_head` computes logits.

        With a cache from `new_cache`, `tokens` continue at position `start`: first the prompt,
        then one token at a time.
        """
        end = start + tokens.shape[1]
        if end > self.config["block_size"]:
            raise ValueError(f"{end} tokens; this model has room for {self.config['block_size']}")
        if start > 0 and tokens.shape[1] > 1:
            raise ValueError("after the prompt, want one token at a time")
        x = self.wte(tokens) + self.wpe.weight[start:end]
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i], start)
        return self.ln_f(x)

    def new_cache(self, rows: int, length: int) -> list[Tensor]:
        """Allocate keys and values for `rows` x `length` tokens: (2, B, H, T, D) for each block."""
        n_head = self.config["n_head"]
        shape = (2, rows, n_head, length, self.config["n_embd"] // n_head)
        return [self.wte.weight.new_empty(shape) for _ in self.h]

    # ----------------------------------------------------------------- what vBoN needs of a model

    @torch.no_grad()
    def sample(self, prompt: Tensor, k: int, length: int,
               generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Sample k responses to each prompt (P, T): token ids (P, k, length), and their
        log-probabilities (P, k) in nats. Positions after the end hold end-of-text."""
        tokens = prompt.repeat_interleave(k, 0)                           # (P·k, T)
        response = tokens.new_full((len(tokens), length), self.eot)
        logprob = torch.zeros(len(tokens), device=prompt.device, dtype=sum_dtype(prompt.device))
        rows = torch.arange(len(tokens), device=prompt.device)            # those in the batch
        ended = torch.zeros_like(rows, dtype=torch.bool)
        cache = self.new_cache(len(tokens), prompt.shape[1] + length)
        start = 0
        for t in range(length):
            # only the last state predicts the next token
            state = self.states(tokens, cache, start)[:, -1]
            start += tokens.shape[1]
            prob = self.lm_head(state).softmax(-1)                        # (rows, V)
            token = sample_ids(prob, generator).masked_fill(ended, self.eot)
            response[rows, t] = token
            token_logprob = prob.gather(-1, token[:, None])[:, 0].log()
            logprob[rows] += token_logprob.masked_fill(ended, 0)
            ended = ended | (token == self.eot)
            tokens = token[:, None]
            # Ended responses leave the batch, but only every few tokens: to count them, the CPU has
            # to wait for a GPU. On a CPU this saves a tenth of the time with the built-in text.
            if t % 4 == 3:
                going_on = (~ended).nonzero()[:, 0]
                if len(going_on) == 0:
                    break
                if len(going_on) < 0.9 * len(rows):
                    rows = rows[going_on]
                    tokens = tokens[going_on]
                    ended = ended[going_on]
                    cache = [block[:, going_on] for block in cache]
        return response.view(-1, k, length), logprob.view(-1, k)

    def logprob(self, prompt: Tensor, response: Tensor) -> Tensor:
        """Return log π(y|x) (P, K) in nats of responses (P, K, L) to prompts (P, T), with
        gradients."""
        logits, mask = self.response_logits(prompt, response)             # (R, V)
        target = response.flatten(0, 1)[mask]                             # (R,)
        token_logprob = -functional.cross_entropy(logits, target, reduction="none")
        return sum_over_tokens(token_logprob, mask).view(response.shape[:2])

    def response_logits(self, prompt: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (R, V) of all R response tokens up to the end, and the mask (P·K, L)
        of these tokens."""
        each_prompt = prompt.repeat_interleave(response.shape[1], 0)
        each_response = response.flatten(0, 1)                            # (P·K, L)
        tokens = torch.cat([each_prompt, each_response], 1)               # (P·K, T + L)
        # The state at a token predicts the next one, so start at the last token of the prompt.
        states = self.states(tokens[:, :-1])[:, prompt.shape[1] - 1:]     # (P·K, L, C)
        mask = response_mask(each_response, self.eot)
        return self.lm_head(states[mask]), mask


def prompts_at_a_time(model: GPT, k: int, length: int) -> int:
    """Return how many prompts to score together, by the memory that their logits take.

    On a CPU they may hold 2^25 numbers (128 MiB): more was measured to be slower. On a GPU they may
    take a sixteenth of its memory, since the backward pass needs several copies.
    """
    numbers = 2 ** 25
    device = model.wte.weight.device
    if device.type == "cuda":
        numbers = torch.cuda.get_device_properties(device).total_memory // (16 * 4)
    logits = k * length * model.config["vocab_size"]
    return max(1, numbers // logits)


def response_mask(response: Tensor, eot: int) -> Tensor:  # (..., L) -> (..., L)
    """True up to and including the first end-of-text token: the only mask for lengths.

    With eot = 9: the response 5, 9, 9, 9 has the mask 1, 1, 0, 0.
    """
    ended = response == eot
    ended_before = ended.cumsum(-1) - ended.long()
    return ended_before == 0


def sum_over_tokens(values: Tensor, mask: Tensor) -> Tensor:  # (R,), (B, L) -> (B,)
    """Sum over the tokens of each response, from values at the R tokens of the mask."""
    values = values.to(sum_dtype(values.device))
    table = values.new_zeros(mask.shape)
    return table.masked_scatter(mask, values).sum(-1)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the type to sum log-probabilities in: float64, for hundreds of tokens."""
    return torch.float32 if device.type == "mps" else torch.float64         # mps has no float64


def sample_ids(prob: Tensor, generator: torch.Generator | None) -> Tensor:  # (B, V) -> (B,)
    """Sample one id from each row of probabilities.

    It is the first id whose cumulative probability exceeds a uniform random number.
    torch.multinomial samples from the same distribution, but is 20 times slower on a CPU.
    """
    cdf = prob.cumsum(-1)
    uniform = torch.rand(len(prob), 1, device=prob.device, generator=generator)
    # by rounding, the probabilities may not sum to exactly 1
    token = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True)
    return token[:, 0].clamp(max=prob.shape[-1] - 1)


def token_kl(policy: GPT, reference: GPT, prompt: Tensor, response: Tensor) -> Tensor:  # -> (P, K)
    """KL(π_θ || π_ref) in nats: the KL of the next-token distributions, summed over the tokens.

    Its mean over responses y ~ π_θ is the KL between the responses' distributions. It is less noisy
    than log π_θ(y) - log π_ref(y), and never negative. Use it in reports, not as a loss: its
    gradient is biased, since θ also determines which responses are sampled.
    """
    logits, mask = policy.response_logits(prompt, response)
    ref_logits, _ = reference.response_logits(prompt, response)
    log_p = logits.log_softmax(-1)
    log_q = ref_logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return sum_over_tokens(kl, mask).view(response.shape[:2])

# ------------------------------------------------------------------ adapters, for fine-tuning

class LowRank(nn.Module):
    """LoRA (arXiv 2106.09685): a linear layer whose weight W becomes W + B A, of rank `rank`.

    W is frozen; A and B are trained. B starts at 0, so the policy starts as the reference.
    """

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.linear = linear
        rows, columns = linear.weight.shape
        a = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        self.a = nn.Parameter(a.to(linear.weight))
        self.b = nn.Parameter(linear.weight.new_zeros(rows, rank))

    def weight(self) -> Tensor:
        """Return W + B A."""
        return self.linear.weight + self.b @ self.a

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows), as the linear layer."""
        return functional.linear(x, self.weight(), self.linear.bias)


def add_adapters(model: nn.Module, rank: int, generator: torch.Generator) -> list[nn.Parameter]:
    """Freeze the model, add an adapter to each linear layer, and return the adapters' parameters.

    At a given learning rate, gradient noise raises the KL with their number, so there are few.
    Raises ValueError for a model with a tied head: an adapter would change the head alone.
    """
    if getattr(model, "config", {}).get("tied"):
        raise ValueError("the head shares its weights with the embedding: call untie_head first")
    model.requires_grad_(False)
    trained = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            adapter = LowRank(module, rank, generator)
            _replace(model, name, adapter)
            trained += [adapter.a, adapter.b]
    return trained


def merge_adapters(model: nn.Module) -> None:
    """Put the linear layers back, with W + B A as their weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRank):
            module.linear.weight = nn.Parameter(module.weight().detach())
            _replace(model, name, module.linear)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put another module in the place of the one with this name, such as "h.0.attn.c_proj"."""
    parent, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(parent), own_name, new)
