"""Hugging Face folders of a GPT-2: config.json, and weights in safetensors or pytorch_model.bin."""
import json
import math
import shutil
import urllib.request
from pathlib import Path

import torch
from torch import Tensor

from model import ACTIVATIONS, GPT
from support.files import UnusableInput, read_json

PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
DOWNLOAD = "https://huggingface.co/openai-community/{name}/resolve/main/{file}"
# settings of config.json that our network does not have: it always uses these values
FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}
# GPT-2 stores these weights as (in, out), nn.Linear as (out, in)
TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
# causal masks, which old files contain beside the weights
MASKS = (".attn.bias", ".attn.masked_bias")


def load_model(source: str | Path) -> GPT:
    """Load a GPT-2 from a Hugging Face folder, or OpenAI's under a name in `PRETRAINED`.

    Reads config.json and model.safetensors (also in shards) or pytorch_model.bin. Pickled code is
    not run. Raises UnusableInput if a tensor is missing, left over, of the wrong shape or not
    finite.
    """
    folder = Path(source)
    if str(source) in PRETRAINED:
        folder = download_pretrained(str(source))
    config = read_config(folder)
    tensors = read_tensors(folder)
    weights = {}
    for name, x in tensors.items():
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
        # most files omit the head, since it is the token embedding
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
    """True for a dense floating-point tensor that holds data."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    return x.layout == torch.strided and not x.is_nested and not x.is_meta


def save_model(model: GPT, folder: str | Path) -> None:
    """Write config.json and model.safetensors, as Hugging Face's GPT2LMHeadModel reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.config["vocab_size"],
        "n_positions": model.config["block_size"],
        "n_ctx": model.config["block_size"],                    # its old name, which others read
        "n_embd": model.config["n_embd"],
        "n_layer": model.config["n_layer"],
        "n_head": model.config["n_head"],
        "activation_function": model.config["activation"],
        "tie_word_embeddings": model.config["tied"],
        "bos_token_id": model.eot,
        "eos_token_id": model.eot,
        "pad_token_id": model.eot,
        **FIXED,
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


def save_generation_config(folder: str | Path, model: GPT, max_length: int) -> None:
    """Write generation_config.json: `generate` then samples from the model's own distribution.

    That is the full softmax at temperature 1, up to `max_length` tokens with the prompt.
    """
    config = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_length": min(max_length, model.config["block_size"]),
        "bos_token_id": model.eot,
        "eos_token_id": model.eot,
        "pad_token_id": model.eot,
    }
    text = json.dumps(config, indent=2) + "\n"
    Path(folder, "generation_config.json").write_text(text, encoding="utf-8")


def download_pretrained(name: str) -> Path:
    """Return the folder with OpenAI's config and weights; the first call downloads them."""
    folder = Path(torch.hub.get_dir(), "vbon", name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnusableInput(f"{folder}: {error.strerror}; set TORCH_HOME to another folder"
                            ) from None
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).exists():
            download(DOWNLOAD.format(name=name, file=file), folder / file)
    return folder


def download(url: str, path: Path) -> None:
    """Download a file completely, or raise UnusableInput."""
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


def read_config(folder: Path) -> dict:
    """Return the arguments of `GPT`, from config.json."""
    path = folder / "config.json"
    config = read_json(path)
    kind = config.get("model_type", "gpt2")
    if kind != "gpt2":
        raise UnusableInput(f"{path}: model_type = {kind!r}; only a GPT-2 (gpt2) can be loaded")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UnusableInput(f"{path}: {name} = {config[name]!r}, want {value!r} as in GPT-2")
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        value = config.get(name)
        if type(value) is not int or not 1 <= value <= 10 ** 6:
            raise UnusableInput(f"{path}: {name} = {value!r}, want an integer from 1 to a million")
    if config["n_embd"] % config["n_head"] != 0:
        raise UnusableInput(f"{path}: n_embd is not a multiple of n_head")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise UnusableInput(f"{path}: n_inner = {config['n_inner']}, want 4 · n_embd = "
                            f"{4 * config['n_embd']}")
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UnusableInput(f"{path}: activation_function = {activation!r}, want one of "
                            f"{', '.join(ACTIVATIONS)}")
    return dict(vocab_size=config["vocab_size"], block_size=config["n_positions"],
                n_layer=config["n_layer"], n_head=config["n_head"], n_embd=config["n_embd"],
                activation=activation, tied=config.get("tie_word_embeddings", True) is not False)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of model.safetensors, of its shards, or of pytorch_model.bin."""
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
    except Exception as error:                     # an unknown file: PyTorch raises many kinds
        raise UnusableInput(f"{old}: PyTorch cannot read it: {type(error).__name__}") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise UnusableInput(f"{old}: want a dictionary of tensors by name")
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a file of three parts: 8 bytes with the length of the header, the header, the data.

    The header is JSON. It holds the type, the shape and the place in the data of each tensor.
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
        raise UnusableInput(f"{path}: damaged, or of an unknown type: {error}") from None
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors in float32, in the format that `read_safetensors` describes."""
    header = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, x in tensors.items():
        end = offset + 4 * x.numel()
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode("utf-8")
    # the data begin at a multiple of 8 bytes
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little"))
        file.write(head)
        for x in tensors.values():
            file.write(x.detach().cpu().float().contiguous().numpy().tobytes())
