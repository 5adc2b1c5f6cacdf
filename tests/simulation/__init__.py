"""The service's own classes, run by a simulated clock on simulated processes, disks and sockets, by seed."""
