"""The operations, one module each. They do not import one another."""
