"""`python -m localgrad` is the command `localgrad`."""

import sys

from localgrad.cli import main

if __name__ == "__main__":
    sys.exit(main())
