"""``python -m tract_fast``: the same as ``tract-fast``."""

from tract_fast.cli import entry

if __name__ == "__main__":
    entry()
