"""`python -m papercore` is the `papercore` command."""

import sys

from papercore.cli import main

if __name__ == "__main__":
    sys.exit(main())
