"""What goes past the paper's own method: other methods, their comparison, and three studies."""
