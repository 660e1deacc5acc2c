"""model.py: a byte-pair tokenizer and a GPT-2, small enough to read in one sitting.

The network is GPT-2's (Radford et al. 2019): pre-norm blocks, learned positions, GELU, and an
output head tied to the token embedding. Parameters carry GPT-2's own names.

What was left out, and why that is safe: dropout (the models here are small, train for minutes and
see each text a few times) and any top-k or temperature (a policy must be sampled from exactly the
distribution that its log-probabilities describe).
"""
import math
import re
from collections import Counter
from collections.abc import Iterable

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vbon import response_mask

END = "<|endoftext|>"

# ---------------------------------------------------------------------------------------- tokenizer

# Words with their leading space, numbers, punctuation, white space. The classes complement each
# other, so that every string is covered and comes back from its tokens unchanged.
PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """Learn byte-pair merges (Sennrich et al. 2016, arXiv 1508.07909) and return an encoder.

    Ids 0..255 are the bytes, then come the merges in the order learned, and the last id is the
    end-of-text token. Fewer than `vocab_size` ids come back when the text runs out of pairs.
    """
    counts = Counter(word for text in texts for word in re.findall(PATTERN, text))
    words = [([bytes([b]) for b in word.encode()], count) for word, count in counts.items()]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size - 1:
        pairs = Counter()
        for parts, count in words:
            for pair in zip(parts, parts[1:]):
                pairs[pair] += count
        if not pairs:
            break
        left, right = max(pairs, key=pairs.get)
        ranks[left + right] = len(ranks)
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if parts[i] == left and parts[i + 1] == right:
                    parts[i:i + 2] = [left + right]
                i += 1
        words = [word for word in words if len(word[0]) > 1]
    return make_encoding(ranks)


def make_encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """An encoder from its merges: token bytes to id, lower ids merged first."""
    return tiktoken.Encoding("vbon", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={END: len(ranks)})

# -------------------------------------------------------------------------------------------- GPT-2

class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                     # 3 x (B, H, T, D)
        if cache is not None:                                                 # (2, B, H, T_max, D)
            cache[0, :, :, start:start + T], cache[1, :, :, start:start + T] = k, v
            k, v = cache[:, :, :, :start + T]
        if T == 1:                                   # one query sees all keys: nothing to mask
            y = (q @ k.mT / math.sqrt(k.shape[-1])).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers, four times as wide inside."""

    def __init__(self, n_embd: int, gelu: str):
        super().__init__()
        self.gelu = gelu
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))


class Block(nn.Module):
    """Attention, then the MLP, each added to what flows past it."""

    def __init__(self, n_embd: int, n_head: int, gelu: str):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(n_embd), Attention(n_embd, n_head)
        self.ln_2, self.mlp = nn.LayerNorm(n_embd), MLP(n_embd, gelu)

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: `GPT(...)(tokens)` maps ids (B, T) to logits (B, T, V), T at most `block_size`.

    `gelu` is "none" for the exact function (faster on a CPU) or "tanh" for GPT-2's approximation.
    The last id is the end-of-text token, as in GPT-2's vocabulary.
    """

    def __init__(self, vocab_size: int, block_size: int, n_layer: int = 2, n_head: int = 4,
                 n_embd: int = 64, gelu: str = "none", generator: torch.Generator | None = None):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd = {n_embd} is not a multiple of n_head = {n_head}")
        self.config = dict(vocab_size=vocab_size, block_size=block_size, n_layer=n_layer,
                           n_head=n_head, n_embd=n_embd, gelu=gelu)
        self.eot = vocab_size - 1
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head, gelu) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        for name, p in self.named_parameters():    # GPT-2's initialisation
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:
                scale = 0.02 / (math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 1)
                nn.init.normal_(p, std=scale, generator=generator)

    def forward(self, tokens: Tensor, cache: list[Tensor] | None = None, start: int = 0,
                where: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the next token after each of `tokens` (B, T).

        With a `cache` from `new_cache`, `tokens` continue at position `start`: keys and values of
        the positions before are read from it, those of `tokens` are written into it. Only a first
        call (start = 0) may bring several tokens.
        """
        x = self.wte(tokens) + self.wpe.weight[start:start + tokens.shape[1]]
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i], start)
        return self.ln_f(x if where is None else x[where]) @ self.wte.weight.T

    def new_cache(self, rows: int, length: int) -> list[Tensor]:
        """Room for keys and values of `rows` x `length` tokens: one (2, B, H, T, D) a block."""
        n_head, n_embd = self.config["n_head"], self.config["n_embd"]
        shape = (2, rows, n_head, length, n_embd // n_head)
        return [self.wte.weight.new_empty(shape) for _ in self.h]

    @torch.no_grad()
    def generate(self, prompt: Tensor, length: int,
                 generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Sample one response to each prompt: ids (B, T0) -> ids (B, length), log-prob (B,).

        A response ends at its first end-of-text or after `length` tokens; what follows an end is
        filled with end-of-text. The log-probability (nats) counts the end and none of the filling.
        """
        eot = self.eot
        out = torch.full((len(prompt), length), eot, device=prompt.device)               # (B, L)
        logprob = torch.zeros(len(prompt), device=prompt.device)                            # (B,)
        rows = torch.arange(len(prompt), device=prompt.device)         # rows still in the batch
        cache = self.new_cache(len(prompt), prompt.shape[1] + length)
        tokens, start = prompt, 0
        for t in range(length):
            prob = self(tokens, cache, start)[:, -1].softmax(-1)                        # (B', V)
            start += tokens.shape[1]
            # inverse-CDF draw: 20 times as fast as torch.multinomial on a CPU
            cdf = prob.cumsum(-1)
            u = torch.rand(len(rows), 1, device=cdf.device, generator=generator) * cdf[:, -1:]
            tokens = torch.searchsorted(cdf, u, right=True).clamp(max=cdf.shape[-1] - 1)  # (B', 1)
            done = out[rows, t - 1] == eot if t else torch.zeros_like(rows, dtype=torch.bool)
            tokens[done] = eot
            out[rows, t] = tokens[:, 0]
            logprob[rows] += prob.gather(-1, tokens)[:, 0].log() * ~done
            alive = tokens[:, 0] != eot
            if alive.sum() < 0.9 * len(rows):
                if not alive.any():
                    break
                tokens, rows = tokens[alive], rows[alive]
                cache = [c[:, alive] for c in cache]
        return out, logprob

# ------------------------------------------------------------------------------- language modelling

def encode(encoding: tiktoken.Encoding, texts: Iterable[str], length: int) -> Tensor:
    """Ids (R, length): each text cut to `length` tokens or filled up with end-of-text."""
    rows = [encoding.encode_ordinary(text)[:length] for text in texts]
    eot = encoding.eot_token
    return torch.tensor([row + [eot] * (length - len(row)) for row in rows])


def train_lm(model: GPT, tokens: Tensor, steps: int, batch: int, lr: float,
             generator: torch.Generator, progress: Iterable[int]) -> None:
    """Maximum likelihood on texts (R, T), padded with end-of-text; the first one is learned."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95),
                                  weight_decay=0.01, fused=True)
    for step in progress:
        warmup, cosine = (step + 1) / 20, 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * min(warmup, cosine)
        rows = torch.randint(len(tokens), (batch,), generator=generator).to(tokens.device)
        loss = lm_loss(model, tokens[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def lm_loss(model: GPT, tokens: Tensor) -> Tensor:
    """Mean nats per token of texts (B, T), their first token given and their end included."""
    mask = response_mask(tokens, model.eot)[:, 1:]
    longest = int(mask.any(0).sum())
    mask = mask[:, :longest]
    return F.cross_entropy(model(tokens[:, :longest], where=mask), tokens[:, 1:longest + 1][mask])
