"""`python -m qedfs`: the same as the `qedfs` command."""

from qedfs.cli.entry import main

if __name__ == "__main__":
    main()
