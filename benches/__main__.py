"""``python -m perturbcore.benches``: needs torch, numba, numpy and scipy alone."""

import sys

from perturbcore.benches import main

sys.exit(main())
