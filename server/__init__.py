"""gRPC server, its client and the command line; the engine runs on a thread of its own."""
