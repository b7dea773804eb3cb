"""`python -m perf.publish DIR`: the command `publish`."""

import sys

from perf.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["publish", *sys.argv[1:]]))
