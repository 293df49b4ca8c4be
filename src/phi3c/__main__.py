"""`python -m phi3c`: the command line."""

import sys

from phi3c.cli import main

if __name__ == "__main__":
    sys.exit(main())
