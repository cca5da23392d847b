"""The command as the fork server runs scripts."""

from chatlora.commands.merge import run as main

__all__ = ["main"]
