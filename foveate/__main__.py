"""Run the command line as ``python -m foveate``, where its script is not on the path."""

import sys

from foveate.cli import main

if __name__ == "__main__":
    sys.exit(main())
