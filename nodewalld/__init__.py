"""nodewalld: holds a node's firewall rules in position, whoever else writes the same chains."""

__version__ = "0.1.0"
