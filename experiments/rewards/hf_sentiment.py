"""How positive a Hugging Face sequence classifier finds prompt and response: its raw logit.

    SENTIMENT_MODEL=lvwerra/distilbert-imdb python train.py --n 4 --data DIR --init gpt2 \
        --reward experiments/rewards/hf_sentiment.py

SENTIMENT_MODEL is a folder, or a name on the hub; its last label must be the positive one.
"""
import os

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

NAME = os.environ["SENTIMENT_MODEL"]
DEPENDS_ON = NAME                                       # another model gives other rewards
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForSequenceClassification.from_pretrained(NAME).to(DEVICE).eval()
# longer texts are cut; some tokenizers do not know where
LONGEST = min(tokenizer.model_max_length, model.config.max_position_embeddings)


@torch.no_grad()
def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """Return one logit for each pair; 64 texts at a time."""
    texts = [prompt + response for prompt, response in zip(prompts, responses)]
    logits = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start:start + 64], padding=True, truncation=True,
                          max_length=LONGEST, return_tensors="pt").to(DEVICE)
        logits += model(**batch).logits[:, -1].tolist()
    return logits
