"""`python -m mhc_tilelang.cli` is the command `mhc-tilelang`."""

import sys

from . import main

sys.exit(main())
