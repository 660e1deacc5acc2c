"""model.py: a GPT-2, small enough to read in one sitting, with room for OpenAI's weights.

The network is GPT-2's (Radford et al. 2019): pre-norm blocks, learned positions, GELU. Parameters
carry GPT-2's own names, so that its published weights load by name. Then come what vBoN asks of a
model (`GPT.sample` and `GPT.logprob`), the adapters that fine-tuning trains, and the loss of a
language model. The last section reads and writes Hugging Face folders: skip it on a first reading.

What was left out, and why that is safe: dropout (training is short), and top-k or a temperature in
sampling (a policy must be sampled from exactly the distribution that its log-probabilities tell).
"""
import json
import math
import shutil
import urllib.request
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.nn.utils import parametrize


class UnusableInput(ValueError):
    """What a user gave cannot be used. The message says in one line what, and what is wanted."""

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
        # each head works by itself on D = C / H of the channels
        q = self._split_heads(q)                                          # (B, H, T, D)
        k = self._split_heads(k)
        v = self._split_heads(v)
        if cache is not None:
            # keep the new keys and values, and attend to all that were kept so far
            end = start + T
            cache[0, :, :, start:end] = k
            cache[1, :, :, start:end] = v
            k = cache[0, :, :, :end]
            v = cache[1, :, :, :end]
        # a single token is the last one: it may look at all keys, so there is nothing to mask
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)

    def _split_heads(self, x: Tensor) -> Tensor:
        # (B, T, C) -> (B, T, H, D) -> (B, H, T, D)
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


class MLP(nn.Module):
    """Two layers, four times as wide inside."""

    def __init__(self, n_embd: int, activation: str):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.activation = ACTIVATIONS[activation]
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C), each position by itself."""
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """Attention, then the MLP; each adds to what flows past it."""

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

    A response ends with its first end-of-text token, or after `length` tokens. What stands behind
    the end is filled with end-of-text and does not count.
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
        """GPT-2's initial weights: normal, smaller where a layer adds to what flows past it."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("c_proj.weight"):
                std = 0.02 / math.sqrt(2 * self.config["n_layer"])
                nn.init.normal_(p, std=std, generator=generator)
            elif "ln_" not in name:
                nn.init.normal_(p, std=0.02, generator=generator)

    def untie_head(self) -> None:
        """Give the output head weights of its own, unless it has: a copy of the token embedding's.

        While the two are one, what makes a word more likely also changes how the model reads it.
        """
        if self.config["tied"]:
            self.lm_head.weight = nn.Parameter(self.wte.weight.detach().clone())
            self.config["tied"] = False

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V) of the token after each; T is block_size at most."""
        return self.lm_head(self.states(tokens))

    def states(self, tokens: Tensor, cache: list[Tensor] | None = None, start: int = 0) -> Tensor:
        """Token ids (B, T) -> the last hidden states (B, T, C), which `lm_head` makes logits of.

        With a cache from `new_cache`, `tokens` go on at position `start`: first the prompt, then
        one token at a time.
        """
        end = start + tokens.shape[1]
        x = self.wte(tokens) + self.wpe.weight[start:end]
        # On a GPU the blocks compute in bfloat16; logits and log-probabilities stay float32.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            for i, block in enumerate(self.h):
                x = block(x, None if cache is None else cache[i], start)
        return self.ln_f(x.to(self.ln_f.weight.dtype))

    def new_cache(self, rows: int, length: int) -> list[Tensor]:
        """Room for keys and values of `rows` x `length` tokens: (2, B, H, T, D) for each block."""
        n_head = self.config["n_head"]
        shape = (2, rows, n_head, length, self.config["n_embd"] // n_head)
        return [self.wte.weight.new_empty(shape) for _ in self.h]

# ------------------------------------------------------------------------ what vBoN asks of a model

    @torch.no_grad()
    @parametrize.cached()                            # compute W + B A once, not for each token
    def sample(self, prompt: Tensor, k: int, length: int,
               generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """k responses to each prompt (P, T): token ids (P, k, length), log-probabilities (P, k)."""
        tokens = prompt.repeat_interleave(k, 0)                           # (P·k, T)
        response = tokens.new_full((len(tokens), length), self.eot)
        logprob = torch.zeros(len(tokens), device=prompt.device)
        rows = torch.arange(len(tokens), device=prompt.device)            # those that go on
        cache = self.new_cache(len(tokens), prompt.shape[1] + length)
        start = 0
        for t in range(length):
            # only the last state tells the next token
            state = self.states(tokens, cache, start)[:, -1]
            start += tokens.shape[1]
            prob = self.lm_head(state).softmax(-1)                        # (rows, V)
            token = draw(prob, generator)
            response[rows, t] = token
            logprob[rows] += prob.gather(-1, token[:, None])[:, 0].log()
            # A response that has ended leaves the batch: on the built-in text this saves a sixth
            # of the time, and nothing after the end can count.
            goes_on = token != self.eot
            if not goes_on.any():
                break
            if not goes_on.all():
                rows = rows[goes_on]
                cache = [block[:, goes_on] for block in cache]
            tokens = token[goes_on, None]
        return response.view(-1, k, length), logprob.view(-1, k)

    def logprob(self, prompt: Tensor, response: Tensor) -> Tensor:
        """log π(y|x) (P, K) in nats, for prompts (P, T) and responses (P, K, L), with gradients."""
        logits, counts = self.response_logits(prompt, response)           # (R, V)
        wanted = response.flatten(0, 1)[counts]                           # (R,)
        token_logprob = -functional.cross_entropy(logits, wanted, reduction="none")
        return sum_over_tokens(token_logprob, counts).view(response.shape[:2])

    def response_logits(self, prompt: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, V) for the R response tokens that count, and where those are: (P·K, L)."""
        each_prompt = prompt.repeat_interleave(response.shape[1], 0)
        each_response = response.flatten(0, 1)                            # (P·K, L)
        tokens = torch.cat([each_prompt, each_response], 1)               # (P·K, T + L)
        # The state at a token predicts the next one. So begin at the last token of the prompt.
        states = self.states(tokens[:, :-1])[:, prompt.shape[1] - 1:]     # (P·K, L, C)
        counts = response_mask(each_response, self.eot)
        return self.lm_head(states[counts]), counts


    @classmethod
    def from_pretrained(cls, source: str | Path) -> "GPT":
        """OpenAI's GPT-2 by name ("gpt2", "gpt2-medium", ...), or a Hugging Face folder."""
        return load_pretrained(source)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a Hugging Face folder: config.json and model.safetensors."""
        save_pretrained(self, folder)


def response_mask(response: Tensor, eot: int) -> Tensor:  # (..., L) -> (..., L)
    """True up to and including the first end-of-text token: the one mask of this project.

    With eot = 9: the response 5, 9, 9, 9 has the mask 1, 1, 0, 0.
    """
    ended = response == eot
    ended_before = ended.cumsum(-1) - ended.long()
    return ended_before == 0


def sum_over_tokens(values: Tensor, counts: Tensor) -> Tensor:  # (R,), (B, L) -> (B,)
    """The sum over the tokens of each response, from values at the R tokens that count."""
    table = values.new_zeros(counts.shape)
    return table.masked_scatter(counts, values).sum(-1)


def draw(prob: Tensor, generator: torch.Generator | None) -> Tensor:  # (B, V) -> (B,)
    """One id from each row of probabilities.

    It is the first whose cumulative probability exceeds a uniform random number.
    torch.multinomial does the same, but takes 20 times as long on a CPU.
    """
    cdf = prob.cumsum(-1)
    uniform = torch.rand(len(prob), 1, device=prob.device, generator=generator)
    # the sum of all probabilities may be a little off 1
    token = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True)
    return token[:, 0].clamp(max=prob.shape[-1] - 1)


def token_kl(policy: GPT, reference: GPT, prompt: Tensor, response: Tensor) -> Tensor:  # -> (P, K)
    """KL(π_θ || π_ref) in nats: the KL of the next-token distributions, summed over the tokens.

    For responses y ~ π_θ its mean is the KL of the responses, with less noise than that of
    log π_θ(y) - log π_ref(y), and never below 0. Use it to report, not to train: its gradient is
    wrong, since θ also decides which responses are sampled.
    """
    logits, counts = policy.response_logits(prompt, response)
    ref_logits, _ = reference.response_logits(prompt, response)
    log_p = logits.log_softmax(-1)
    log_q = ref_logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return sum_over_tokens(kl, counts).view(response.shape[:2])

# ---------------------------------------------------------------- what fine-tuning trains: adapters

class LowRank(nn.Module):
    """Adds a product of two thin matrices to a weight: W + B A, of rank `rank` at most.

    LoRA (arXiv 2106.09685). B starts at 0, so that the policy starts as the reference.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        rows, columns = weight.shape
        a = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        self.a = nn.Parameter(a.to(weight))
        self.b = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """W -> W + B A, of the same shape."""
        return weight + self.b @ self.a


def add_adapters(model: nn.Module, rank: int, generator: torch.Generator) -> list[nn.Parameter]:
    """Freeze the model, put adapters on all its linear maps, and return the parameters to train.

    Few parameters are an advantage here: the noise of the gradient pushes each of them at random,
    and that raises the KL.
    """
    model.requires_grad_(False)
    trained = []
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            adapter = LowRank(module.weight, rank, generator)
            parametrize.register_parametrization(module, "weight", adapter)
            trained += [adapter.a, adapter.b]
    return trained


def merge_adapters(model: nn.Module) -> None:
    """Put W + B A in the place of each W, and forget the adapters."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)

# --------------------------------------------------------------------- the loss of a language model

def lm_loss(model: GPT, tokens: Tensor) -> Tensor:  # (B, T) -> ()
    """Mean nats per token of texts: their first token is given, their end-of-text counts."""
    counts = response_mask(tokens, model.eot)[:, 1:]
    states = model.states(tokens[:, :-1])
    return functional.cross_entropy(model.lm_head(states[counts]), tokens[:, 1:][counts])

# ---------------------------------------------------- Hugging Face folders: skip on a first reading

PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
DOWNLOAD = "https://huggingface.co/openai-community/{name}/resolve/main/{file}"
# what the network above takes for granted, as config.json calls it
GRANTED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}
# these maps are stored as (in, out) by GPT-2, and as (out, in) by nn.Linear
TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
# causal masks, which old files hold beside the weights
MASKS = (".attn.bias", ".attn.masked_bias")


def load_pretrained(source: str | Path) -> GPT:
    """A GPT-2 from a Hugging Face folder, or OpenAI's under one of the names in `PRETRAINED`.

    Reads config.json and model.safetensors (also in shards) or pytorch_model.bin; no pickled code
    is run. No tensor may be missing, left over, of another shape or not finite.
    Raises UnusableInput, which says what is wrong.
    """
    folder = Path(source)
    if str(source) in PRETRAINED:
        folder = download_pretrained(str(source))
    config = read_config(folder)
    given = read_tensors(folder)
    weights = {}
    for name, x in given.items():
        short = name.removeprefix("transformer.")
        if short.endswith(MASKS):
            continue
        if not is_plain(x) or not x.float().isfinite().all():
            raise UnusableInput(f"{folder}: {name} is no tensor of finite floating-point numbers")
        x = x.float()
        if short.endswith(TRANSPOSED) and x.dim() == 2:
            x = x.T
        weights[short] = x.contiguous()
    if config["tied"] and "wte.weight" in weights:
        # most files leave the head out: it is the token embedding
        weights.setdefault("lm_head.weight", weights["wte.weight"])
    if config["n_layer"] > len(weights):
        raise UnusableInput(f"{folder}: config.json says n_layer = {config['n_layer']}, but there "
                            f"are {len(weights)} tensors")
    with torch.device("meta"):                                   # shapes only, no memory yet
        model = GPT(**config)
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | weights.keys()):
        want = list(wanted[name].shape) if name in wanted else "none"
        got = list(weights[name].shape) if name in weights else "none"
        if want != got:
            raise UnusableInput(f"{folder}: {name}: want shape {want}, got {got}")
    if config["tied"] and not torch.equal(weights["lm_head.weight"], weights["wte.weight"]):
        raise UnusableInput(f"{folder}: lm_head.weight is not wte.weight, though config.json says "
                            f"tie_word_embeddings")
    model.load_state_dict(weights, assign=True)
    if config["tied"]:
        model.lm_head.weight = model.wte.weight
    return model


def is_plain(x: object) -> bool:
    """Whether x is a tensor of floating-point numbers that are all there."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    return x.layout == torch.strided and not x.is_nested and not x.is_meta


def save_pretrained(model: GPT, folder: str | Path) -> None:
    """Write config.json and model.safetensors as Hugging Face's GPT2LMHeadModel reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.config["vocab_size"],
        "n_positions": model.config["block_size"],
        "n_embd": model.config["n_embd"],
        "n_layer": model.config["n_layer"],
        "n_head": model.config["n_head"],
        "activation_function": model.config["activation"],
        "tie_word_embeddings": model.config["tied"],
        "bos_token_id": model.eot,
        "eos_token_id": model.eot,
        **GRANTED,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for name, x in model.state_dict().items():
        if name.endswith(TRANSPOSED):
            x = x.T
        if name == "lm_head.weight":
            if not model.config["tied"]:
                tensors[name] = x
        else:
            tensors["transformer." + name] = x
    write_safetensors(folder / "model.safetensors", tensors)


def download_pretrained(name: str) -> Path:
    """The folder of OpenAI's config and weights, downloaded at the first call."""
    folder = Path(torch.hub.get_dir(), "vbon", name)
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).exists():
            download(DOWNLOAD.format(name=name, file=file), folder / file)
    return folder


def download(url: str, path: Path) -> None:
    """Fetch a file whole, or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with urllib.request.urlopen(url) as response, open(part, "wb") as file:
            shutil.copyfileobj(response, file)
            announced = response.headers["Content-Length"]
    except OSError as error:
        raise UnusableInput(f"{url}: {error}") from None
    if announced is not None and part.stat().st_size != int(announced):
        raise UnusableInput(f"{url}: cut short at {part.stat().st_size} of {announced} bytes")
    part.replace(path)


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnusableInput(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UnusableInput(f"{path}: not a JSON file") from None
    if not isinstance(content, dict):
        raise UnusableInput(f"{path}: want a JSON object")
    return content


def read_config(folder: Path) -> dict:
    """The arguments of `GPT`, from config.json."""
    path = folder / "config.json"
    config = read_json(path)
    for name, value in GRANTED.items():
        if config.get(name, value) != value:
            raise UnusableInput(f"{path}: {name} = {config[name]!r}, want {value!r} as in GPT-2")
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        value = config.get(name)
        if type(value) is not int or not 1 <= value <= 10 ** 6:
            raise UnusableInput(f"{path}: {name} = {value!r}, want an integer from 1 to a million")
    if config["n_embd"] % config["n_head"] != 0:
        raise UnusableInput(f"{path}: n_embd is not a multiple of n_head")
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UnusableInput(f"{path}: activation_function = {activation!r}, want one of "
                            f"{', '.join(ACTIVATIONS)}")
    return dict(vocab_size=config["vocab_size"], block_size=config["n_positions"],
                n_layer=config["n_layer"], n_head=config["n_head"], n_embd=config["n_embd"],
                activation=activation, tied=config.get("tie_word_embeddings", True) is not False)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, of its shards, or of pytorch_model.bin."""
    index = folder / "model.safetensors.index.json"
    old = folder / "pytorch_model.bin"
    if (folder / "model.safetensors").exists():
        return read_safetensors(folder / "model.safetensors")
    if index.exists():
        shard_of = read_json(index).get("weight_map")
        if not isinstance(shard_of, dict):
            raise UnusableInput(f"{index}: want a weight_map")
        tensors = {}
        for file in sorted({str(file) for file in shard_of.values()}):
            tensors |= read_safetensors(folder / file)
        return tensors
    if not old.exists():
        raise UnusableInput(f"{folder}: want model.safetensors or pytorch_model.bin")
    try:
        tensors = torch.load(old, "cpu", weights_only=True)
    except Exception as error:                     # a stranger's file: PyTorch raises many kinds
        raise UnusableInput(f"{old}: PyTorch cannot read it: {type(error).__name__}") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise UnusableInput(f"{old}: want a dictionary of tensors by name")
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A file of three parts: 8 bytes with the length of a header, the header, the numbers.

    The header is JSON and says for each tensor its type, its shape and its place in the numbers.
    """
    tensors = {}
    try:
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype = DTYPES[entry["dtype"]]
            begin, end = entry["data_offsets"]
            count = math.prod(entry["shape"])
            if begin + count * dtype.itemsize != end:
                raise ValueError(name)
            x = torch.frombuffer(content, dtype=dtype, count=count, offset=start + begin)
            tensors[name] = x.view(entry["shape"])
    except OSError as error:
        raise UnusableInput(f"{path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UnusableInput(f"{path}: damaged, or of a type that is not known: {error}") from None
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors in float32, in the format that `read_safetensors` explains."""
    header = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, x in tensors.items():
        end = offset + 4 * x.numel()
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode("utf-8")
    # the numbers begin at a multiple of 8 bytes
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little"))
        file.write(head)
        for x in tensors.values():
            file.write(x.detach().cpu().float().contiguous().numpy().tobytes())
