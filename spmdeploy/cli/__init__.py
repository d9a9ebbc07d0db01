"""Command line of spmdeploy, one module per command group."""

from spmdeploy.cli.app import entry, main

__all__ = ["entry", "main"]
