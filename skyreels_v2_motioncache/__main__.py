"""`python -m skyreels_v2_motioncache`"""

from common.starting import start

if __name__ == "__main__":
    start("skyreels_v2_motioncache.cli")
