"""``python -m pretrain evaluate``: what a model, or the method itself, is good for."""
