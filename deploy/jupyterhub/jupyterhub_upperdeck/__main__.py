"""``python -m jupyterhub_upperdeck``."""

import sys

from .command import main

sys.exit(main())
