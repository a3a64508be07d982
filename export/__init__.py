"""What lies on disk: packed formats, the artifact and its manifest."""
