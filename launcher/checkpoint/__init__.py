"""Checkpoints: their files, how they are written, read and verified, on disks and in object stores."""
