"""`python -m openm3` is the `openm3` command."""

import sys

from openm3.cli import main

sys.exit(main())
