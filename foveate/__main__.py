"""``python -m foveate``: the command where its script is not on the path."""

import sys

from foveate.cli import main

if __name__ == "__main__":
    sys.exit(main())
