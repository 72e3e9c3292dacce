"""Projects in git repositories."""
