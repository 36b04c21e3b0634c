"""Run the command as `python -m erasure`."""

import sys

from erasure.cli.main import main

sys.exit(main())
