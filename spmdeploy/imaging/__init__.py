"""Image files, resizing and contact sheets."""
