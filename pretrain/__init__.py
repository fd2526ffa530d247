"""The training run: configuration, DeepSpeed engine, data order, steps, checkpoints, reports."""
