"""``python -m fewbits``, for launchers such as torchrun."""

import sys

from .cli import main

sys.exit(main())
