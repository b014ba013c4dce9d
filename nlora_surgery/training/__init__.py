"""Training: the adapter as a layer, the data, the run on transformers' Trainer."""
