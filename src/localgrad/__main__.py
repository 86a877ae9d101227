"""`python -m localgrad` is the command `localgrad`."""

import sys

from localgrad.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
