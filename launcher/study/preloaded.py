"""What a run imports, imported once: the fork server of a study imports this module, and workers are forked from it."""

import gc

import torch._dynamo  # noqa: F401

import launcher.engine.fsdp
import launcher.pretrain
import launcher.study.branch  # noqa: F401

gc.freeze()  # else the first collection of each worker would copy all of it
