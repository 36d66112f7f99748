"""Engines: sharding, gradients and optimizer steps, on FSDP2 and on DeepSpeed, behind one contract."""
