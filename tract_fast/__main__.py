"""``python -m tract_fast``: the same as ``tract-fast``."""

import sys

from tract_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
