"""Composes everything: configuration, engines, the training loop, checkpoints and the command line."""
