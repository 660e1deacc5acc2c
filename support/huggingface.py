"""Hugging Face folders of a GPT-2: config.json, and weights in safetensors or pytorch_model.bin."""
import json
import mmap
import urllib.request
from pathlib import Path

import torch
from torch import Tensor

from model import ACTIVATIONS, GPT
from support.files import UnusableInput, read_json, write_json

PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
DOWNLOAD = "https://huggingface.co/openai-community/{name}/resolve/main/{file}"
# the sizes in our config, and their names in config.json
SIZES = {"vocab_size": "vocab_size", "block_size": "n_positions", "n_layer": "n_layer",
         "n_head": "n_head", "n_embd": "n_embd"}
# settings of config.json that our network does not have: it always uses these values
FIXED = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
         "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}
# GPT-2 stores these weights as (in, out), nn.Linear as (out, in)
TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
# causal masks, which old files contain beside the weights
MASKS = (".attn.bias", ".attn.masked_bias")


def load_model(source: str | Path) -> GPT:
    """Load a GPT-2 from a Hugging Face folder, or OpenAI's under a name in `PRETRAINED`.

    Pickled code is not run. Raises UnusableInput if config.json describes another network, or if a
    tensor is missing, left over, of the wrong shape or not finite.
    """
    folder = Path(source)
    if str(source) in PRETRAINED:
        folder = download_pretrained(str(source))
    config = read_config(folder)
    weights = {}
    for name, x in read_tensors(folder).items():
        name = str(name).removeprefix("transformer.")
        if name.endswith(MASKS):
            continue
        if not is_finite(x):
            raise UnusableInput(f"{folder}: {name} want finite floats")
        if name.endswith(TRANSPOSED) and x.dim() == 2:
            x = x.T
        weights[name] = x.float().contiguous()
    if config["tied"] and "wte.weight" in weights:
        # most files omit the head, since it is the token embedding
        weights.setdefault("lm_head.weight", weights["wte.weight"])
    with torch.device("meta"):                                   # shapes only, no memory yet
        model = GPT(**config)
    found = {name: list(x.shape) for name, x in weights.items()}
    wanted = {name: [list(x.shape)] for name, x in model.state_dict().items()}
    check_values(folder, found, dict.fromkeys(found, [None]) | wanted)
    if config["tied"] and not torch.equal(weights["lm_head.weight"], weights["wte.weight"]):
        raise UnusableInput(f'{folder}: lm_head.weight differs from wte.weight: want '
                            f'"tie_word_embeddings": false in config.json')
    model.load_state_dict(weights, assign=True)
    if config["tied"]:
        model.lm_head.weight = model.wte.weight
    return model


def is_finite(x: object) -> bool:
    """True for a dense tensor of floating-point numbers that are finite in float32."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_meta:
        return False
    return x.layout == torch.strided and x.float().isfinite().all().item()


def save_model(model: GPT, folder: str | Path, max_length: int | None = None) -> None:
    """Write config.json and model.safetensors, as Hugging Face's GPT2LMHeadModel reads them.

    With max_length, `generate` samples from the model's own distribution, up to so many tokens.
    """
    end_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), model.eot)
    config = {theirs: model.config[ours] for ours, theirs in SIZES.items()} | FIXED | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_ctx": model.config["block_size"],                    # its old name, which others read
        "activation_function": model.config["activation"],
        "tie_word_embeddings": model.config["tied"],
        **end_ids,
    }
    write_json(Path(folder, "config.json"), config)
    tensors = {}
    for name, x in model.state_dict().items():
        tensors["transformer." + name] = x.T if name.endswith(TRANSPOSED) else x
    head = tensors.pop("transformer.lm_head.weight")
    if not model.config["tied"]:
        tensors["lm_head.weight"] = head
    write_safetensors(Path(folder, "model.safetensors"), tensors)
    if max_length is not None:
        # the full softmax at temperature 1; max_length includes the prompt
        config = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
                  "max_length": min(max_length, model.config["block_size"]), **end_ids}
        write_json(Path(folder, "generation_config.json"), config)


def download_pretrained(name: str) -> Path:
    """Return the folder with OpenAI's config and weights; the first call downloads them."""
    folder = Path(torch.hub.get_dir(), "vbon", name)
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).exists():
            download(DOWNLOAD.format(name=name, file=file), folder / file)
    return folder


def download(url: str, path: Path) -> None:
    """Download a file completely, or raise UnusableInput."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        urllib.request.urlretrieve(url, part)       # also an error if the connection breaks off
        part.replace(path)
    except OSError as error:
        raise UnusableInput(f"{url}: {error} (set TORCH_HOME for another folder)") from None


def check_values(path: Path, found: dict, known: dict[str, list]) -> None:
    """Raise UnusableInput if a field has none of its known values. One that is left out is None."""
    for name, values in known.items():
        if found.get(name) not in values:
            wanted = " or ".join(map(repr, values))
            raise UnusableInput(f"{path}: {name}: want {wanted:.200}, got {found.get(name)!r:.200}")


def read_config(folder: Path) -> dict:
    """Return the arguments of `GPT`, from config.json."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type", "gpt2") != "gpt2":
        raise UnusableInput(f"{path}: want model_type gpt2, got {config['model_type']!r}; for "
                            f"others, python -m experiments.with_trl")
    sizes = {ours: config.get(theirs) for ours, theirs in SIZES.items()}
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= 10 ** 6:
            raise UnusableInput(f"{path}: {SIZES[name]}: want 1 to a million, got {size!r}")
    if sizes["n_embd"] % sizes["n_head"] != 0:
        raise UnusableInput(f"{path}: n_embd: want a multiple of n_head = {sizes['n_head']}")
    known = {name: [None, value] for name, value in FIXED.items()}
    known["n_inner"] = [None, 4 * sizes["n_embd"]]
    known["activation_function"] = [None, *ACTIVATIONS]
    known["tie_word_embeddings"] = [None, True, False]
    check_values(path, config, known)
    return sizes | {"activation": config.get("activation_function") or "gelu_new",
                    "tied": config.get("tie_word_embeddings") is not False}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of model.safetensors or pytorch_model.bin."""
    path = folder / "model.safetensors"
    if not path.exists():
        path = folder / "pytorch_model.bin"
    if not path.exists():
        raise UnusableInput(f"{folder}: want model.safetensors or pytorch_model.bin (not in parts)")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        return dict(torch.load(path, "cpu", weights_only=True))
    except Exception as error:                  # an unknown file: PyTorch raises many kinds
        raise UnusableInput(f"{path}: damaged: {type(error).__name__}") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a file of three parts: 8 bytes with the length of the header, the header, the data.

    The header is JSON. It holds the type, the shape and the place in the data of each tensor.
    """
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        # a copy: in the file, data may begin at any byte, which torch.frombuffer cannot use
        data = bytearray(content[start + begin:start + end])
        x = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]])
        tensors[name] = x.view(entry["shape"])
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors in float32, in the format that `read_safetensors` describes."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, x in tensors.items():
        begin, end = end, end + 4 * x.numel()
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode("utf-8")
    # the data begin at a multiple of 8 bytes
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for x in tensors.values():
            file.write(x.detach().cpu().float().contiguous().numpy().tobytes())
