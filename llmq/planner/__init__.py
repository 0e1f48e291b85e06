"""`plan`: chooses a format for each layer under a bound on what the model may lose."""
