"""`python -m deeparc_hf` is the command `deeparc`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
