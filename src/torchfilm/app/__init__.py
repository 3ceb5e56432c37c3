"""The command, the server and its page: what people use, built on the systems."""
