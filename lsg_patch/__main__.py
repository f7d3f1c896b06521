"""`python -m lsg_patch` is `lsg-patch`."""

import sys

from lsg_patch.cli import main

if __name__ == "__main__":
    sys.exit(main())
