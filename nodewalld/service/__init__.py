"""Adapters to the system around the daemon: systemd, the journal, the state folder, the control socket."""
