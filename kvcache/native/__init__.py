"""The CPU twins of the ops, in C++17; without their compiled library, importing one raises `ImportError`."""
