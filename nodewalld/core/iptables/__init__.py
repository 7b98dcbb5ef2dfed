"""Decisions written as iptables rules. Another renderer of the same decisions would stand beside this package."""
