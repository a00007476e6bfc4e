"""Models of other codebases: their formats, and their speed."""
