"""Decisions written as a table of our own, `inet nodewalld`: what refuses for good, whatever happens to iptables."""
