"""python -m revdistill: the command."""

from importlib import import_module

if __name__ == "__main__":
    import_module("revdistill.cli.main").main()  # installed, or beside this package in a checkout
