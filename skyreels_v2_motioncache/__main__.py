"""`python -m skyreels_v2_motioncache`"""

import sys

from skyreels_v2_motioncache.cli import main

if __name__ == "__main__":
    sys.exit(main())
