"""`python -m moe_engine.train.prepare`."""

import sys

from moe_engine.train.prepare.command import main

if __name__ == "__main__":
    sys.exit(main())
