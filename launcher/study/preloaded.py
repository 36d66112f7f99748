"""What a run imports, imported once: the fork server of a study imports this module, and workers are forked from it.

It also reads a configuration, since building what reads one takes longer than reading it.
"""

import gc
from importlib import import_module

from launcher.config.file import load_config
from launcher.process.torchrun import ROOT

for name in (
    *("torch._dynamo", "data.rows", "launcher.engine.fsdp", "launcher.pretrain", "launcher.study.branch"),
    *("rich.console", "sentencepiece"),
):
    import_module(name)
load_config(ROOT / "configs" / "quickstart.yaml")
gc.freeze()  # else the first collection of each worker would copy all of it
