"""`python -m bitkv`."""

import sys

from bitkv.cli import main

sys.exit(main())
