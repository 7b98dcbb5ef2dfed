"""Following real packets: which they are, what the kernel tells of each, and the paths that come of it."""

PROTOCOLS = ("tcp", "udp", "sctp", "icmp")
"""What can be followed."""
