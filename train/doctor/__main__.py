"""`python -m moe_engine.train.doctor`."""

import sys

from moe_engine.train.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
