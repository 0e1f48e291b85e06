"""The compiled library, the choice of a GPU kernel, and what this machine has."""
