"""The part of an older runtime's pyspark that secrets are read with."""
