"""What decides codes and masks."""
