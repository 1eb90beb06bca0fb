"""`python -m magi1_motioncache`"""

import sys

from magi1_motioncache.cli import main

if __name__ == "__main__":
    sys.exit(main())
