"""``python -m tests.benchmarks.compiled``: see :mod:`tests.benchmarks.compiled.tables`."""

import sys

from tests.benchmarks.compiled.tables import main

if __name__ == "__main__":
    sys.exit(main())
