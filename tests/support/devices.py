"""Tests whose body runs on the CPU always, and on a GPU where there is one."""

import pytest
import torch

CPU, GPU = torch.device("cpu"), torch.device("cuda")
every_device = pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=pytest.mark.gpu)], ids=str)
