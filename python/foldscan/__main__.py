"""``python -m foldscan``."""

import sys

from foldscan.cli import main

sys.exit(main())
