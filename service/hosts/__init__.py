"""Hosts: sockets, processes and signals around the application."""
