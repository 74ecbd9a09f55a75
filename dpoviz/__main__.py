"""The command line as `python -m dpoviz`, which `accelerate launch -m dpoviz` starts in several processes."""

import sys

from dpoviz.cli import main

if __name__ == "__main__":
    sys.exit(main())
