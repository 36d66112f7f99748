"""Composes everything: configuration, engines, the training loop, checkpoints and the command line."""

from launcher.hidden import check_packages

check_packages()
