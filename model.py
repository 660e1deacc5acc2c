"""model.py: a GPT-2, small enough to read in one sitting, with room for OpenAI's weights.

The network is GPT-2's (Radford et al. 2019): pre-norm blocks, learned positions, GELU, and an
output head tied to the token embedding. Parameters carry GPT-2's own names, so that its published
weights load by name.

What was left out, and why that is safe: dropout (training is short) and any top-k or temperature (a
policy must be sampled from exactly the distribution that its log-probabilities describe).
"""
import json
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vbon import response_mask

# -------------------------------------------------------------------------------------------- GPT-2

ACTIVATION = {"gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"), "relu": F.relu,
              "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu}


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """(B, T, C) -> (B, T, C). With a cache, x are the tokens from `start` on."""
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

    def __init__(self, n_embd: int, activation: str):
        super().__init__()
        self.activation = ACTIVATION[activation]
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C), each place by itself."""
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """Attention, then the MLP, each added to what flows past it."""

    def __init__(self, n_embd: int, n_head: int, activation: str):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(n_embd), Attention(n_embd, n_head)
        self.ln_2, self.mlp = nn.LayerNorm(n_embd), MLP(n_embd, activation)

    def forward(self, x: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """(B, T, C) -> (B, T, C); cache and start as in `Attention`."""
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: `GPT(...)(tokens)` maps ids (B, T) to logits (B, T, V), T at most `block_size`.

    `activation` is "gelu", exact and faster on a CPU, or "gelu_new", OpenAI's approximation of it.
    The last id is the end-of-text token, as in GPT-2's vocabulary.
    """

    def __init__(self, vocab_size: int, block_size: int, n_layer: int = 2, n_head: int = 4,
                 n_embd: int = 64, activation: str = "gelu",
                 generator: torch.Generator | None = None):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd = {n_embd} is not a multiple of n_head = {n_head}")
        self.config = dict(vocab_size=vocab_size, block_size=block_size, n_layer=n_layer,
                           n_head=n_head, n_embd=n_embd, activation=activation)
        self.eot = vocab_size - 1
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head, activation) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight                       # tied, unless loaded otherwise
        for name, p in self.named_parameters():    # GPT-2's initialisation
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:
                scale = 0.02 / (math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 1)
                nn.init.normal_(p, std=scale, generator=generator)

    def forward(self, tokens: Tensor, cache: list[Tensor] | None = None, start: int = 0,
                where: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the next token after each of `tokens` (B, T), or (R, V) for the R of
        them that `where` (B, T) picks. With a `cache` from `new_cache`, `tokens` continue at
        position `start`: it keeps keys and values. Only a first call may bring several tokens."""
        x = self.wte(tokens) + self.wpe.weight[start:start + tokens.shape[1]]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):     # logits: float32
            for i, block in enumerate(self.h):
                x = block(x, None if cache is None else cache[i], start)
        return self.lm_head(self.ln_f(x if where is None else x[where]))

    def new_cache(self, rows: int, length: int) -> list[Tensor]:
        """Room for keys and values of `rows` x `length` tokens: one (2, B, H, T, D) a block."""
        c = self.config
        shape = (2, rows, c["n_head"], length, c["n_embd"] // c["n_head"])
        return [self.wte.weight.new_empty(shape) for _ in self.h]

    @torch.no_grad()
    @parametrize.cached()
    def generate(self, prompt: Tensor, length: int,
                 generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Sample one response to each prompt: ids (B, T0) -> ids (B, length), log-prob (B,).

        A response ends at its first end-of-text or after `length` tokens; what follows an end is
        filled with end-of-text. The log-probability (nats) counts the end and none of the rest."""
        out = torch.full((len(prompt), length), self.eot, device=prompt.device)          # (B, L)
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
            done = out[rows, t - 1] == self.eot if t else torch.zeros_like(rows, dtype=torch.bool)
            tokens[done] = self.eot
            out[rows, t] = tokens[:, 0]
            logprob[rows] += prob.gather(-1, tokens)[:, 0].log().masked_fill(done, 0.0)
            alive = tokens[:, 0] != self.eot
            if alive.sum() < 0.9 * len(rows):
                if not alive.any():
                    break
                tokens, rows = tokens[alive], rows[alive]
                cache = [c[:, alive] for c in cache]
        return out, logprob

    @classmethod
    def from_pretrained(cls, source: str) -> "GPT":
        """OpenAI's GPT-2: a name of `PRETRAINED`, downloaded, or a Hugging Face folder. Tensors go
        by name: none may be missing, left over, or of another shape. No pickled code is run.
        Raises ValueError, in one line, for anything but a sound GPT-2."""
        try:
            config, given = read_pretrained(pretrained_folder(source))
            with torch.device("meta"):                                           # no memory yet
                model = cls(**config)
            want, got = model.state_dict(), {}
            for name, x in given.items():
                name = name.removeprefix("transformer.")
                if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
                    x = x.T                                                # kept as (in, out)
                if not name.endswith((".attn.bias", ".attn.masked_bias")):       # causal masks
                    got[name] = x.float().contiguous()
            got.setdefault("lm_head.weight", got["wte.weight"])
            for name in sorted(want.keys() | got.keys()):
                shapes = [[*x[name].shape] if name in x else "none" for x in (want, got)]
                if shapes[0] != shapes[1]:
                    raise ValueError(f"{name}: want {shapes[0]}, got {shapes[1]}")
            if not torch.equal(got.pop("lm_head.weight"), got["wte.weight"]):
                raise ValueError("lm_head.weight: want the same as wte.weight")
        except Exception as error:                                # a stranger's files: anything
            why = f"{type(error).__name__}: {error}".partition("\n")[0].partition(". ")[0]
            raise ValueError(f"{source}: no sound GPT-2: {why}") from None
        model.load_state_dict(got, strict=False, assign=True)
        model.lm_head.weight = model.wte.weight
        return model


def load_gpt(saved: dict, device: torch.device) -> GPT:
    """A GPT from its config and weights; its head is a parameter of its own, not the embedding."""
    model = GPT(**saved["config"])
    model.load_state_dict({k: x.clone() for k, x in saved["weights"].items()}, assign=True)
    return model.to(device)

# ------------------------------------------------------------------------------- GPT-2's own files

PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FIXED = dict(layer_norm_epsilon=1e-5, tie_word_embeddings=True, scale_attn_weights=True,
             scale_attn_by_inverse_layer_idx=False)                  # the same in every GPT-2
DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
              BOOL=torch.bool, U8=torch.uint8)


def pretrained_folder(source: str) -> Path:
    """The folder of GPT-2's files: one of yours, or where a name was downloaded to."""
    if source not in PRETRAINED:
        return Path(source)
    folder = Path(torch.hub.get_dir(), "vbon", source)
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        url = f"https://huggingface.co/openai-community/{source}/resolve/main/{file}"
        if not (folder / file).exists():
            torch.hub.download_url_to_file(url, str(folder / file))
    return folder


def read_pretrained(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration of a GPT and the tensors in model.safetensors or pytorch_model.bin."""
    c = json.loads((folder / "config.json").read_text())
    odd = [name for name, value in FIXED.items() if c.get(name, value) != value]
    if odd:
        raise ValueError(f"config.json: {odd} not as in GPT-2")
    config = {name: c[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    config |= dict(block_size=c["n_positions"], activation=c.get("activation_function", "gelu_new"))
    path = folder / "model.safetensors"
    if not path.exists():
        return config, torch.load(folder / "pytorch_model.bin", "cpu", weights_only=True)
    content = bytearray(path.read_bytes())      # 8 bytes: length of a JSON header of what is where
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return config, {
        name: torch.frombuffer(content, dtype=DTYPES[x["dtype"]], count=math.prod(x["shape"]),
                               offset=start + x["data_offsets"][0]).view(x["shape"])
        for name, x in header.items()}

# ------------------------------------------------------------------------------- language modelling

def train_lm(model: GPT, tokens: Tensor, steps: int, batch: int, lr: float,
             generator: torch.Generator, progress: Iterable[int]) -> None:
    """Maximum likelihood on texts (R, T), padded with end-of-text, the first of it learned."""
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
