"""Engines: sharding, gradients and optimizer steps, on FSDP2 and on DeepSpeed, with one interface."""
