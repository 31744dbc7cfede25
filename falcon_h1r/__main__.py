"""`python -m falcon_h1r` is the console script `falcon-h1r`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
