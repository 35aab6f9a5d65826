"""The gRPC edge: translates between the wire and the engine, and keeps the engine on a thread of its own."""
