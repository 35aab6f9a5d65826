"""Commands of the Makefile: the virtual environment and the locks of its packages."""
