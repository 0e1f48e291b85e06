"""`fine_tune`: recovers what compression lost."""
