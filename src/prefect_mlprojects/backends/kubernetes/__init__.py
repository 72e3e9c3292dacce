"""The Kubernetes backend: a project's command runs as a Job."""
