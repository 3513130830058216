"""`python -m fedmerge` is `fedmerge`."""

import sys

from fedmerge.cli import main

sys.exit(main())
