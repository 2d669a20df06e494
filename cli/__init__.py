"""The `revdistill` command."""
