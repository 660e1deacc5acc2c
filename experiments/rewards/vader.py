"""How friendly a response sounds, by the lexicon VADER (-1 to 1): pip install vaderSentiment."""
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

ANALYZER = SentimentIntensityAnalyzer()


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """Return VADER's compound score of each response."""
    return [ANALYZER.polarity_scores(response)["compound"] for response in responses]
