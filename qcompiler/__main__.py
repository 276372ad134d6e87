"""``python -m qcompiler``: the same as the command ``qcompiler``."""

from qcompiler.cli import main

if __name__ == "__main__":
    main()
