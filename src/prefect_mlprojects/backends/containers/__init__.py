"""What Docker and Kubernetes share: engine, image, archive."""
