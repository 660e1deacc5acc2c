"""Other methods beside vBoN, their comparison, studies, and other models."""
