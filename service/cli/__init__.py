"""The command line: everything the service does, without and with a server."""
