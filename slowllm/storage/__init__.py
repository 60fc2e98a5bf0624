"""Where do a tensor's bytes lie on disk, and how are they coded? Knows no model."""
