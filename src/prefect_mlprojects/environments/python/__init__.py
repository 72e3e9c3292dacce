"""Virtual environments: their files, interpreters and installers."""
