"""Entry of a rank: `torchrun --nproc-per-node 8 -m launcher.doctor --config FILE [key.sub=value ...]`."""

import sys

from launcher.doctor.doctor import main

sys.exit(main())
