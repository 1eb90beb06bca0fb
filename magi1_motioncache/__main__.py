"""`python -m magi1_motioncache`"""

from common.starting import start

if __name__ == "__main__":
    start("magi1_motioncache.cli")
