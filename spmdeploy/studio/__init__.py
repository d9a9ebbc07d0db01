"""Web editor and HTTP service."""
