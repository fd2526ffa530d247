"""To and from Hugging Face: one declarative name map (names) and the keys of config.json (keys), used in both directions."""
