"""``python -m pretrain evaluate``: what a model is good for."""
