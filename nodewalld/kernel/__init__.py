"""Adapters to the kernel: iptables processes, netlink, getsockopt, ipset, conntrack, links. Each does one thing."""
