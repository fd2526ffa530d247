"""To and from Hugging Face: one declarative name map per model family, used in both directions."""
