"""From a configuration to running processes, on one machine or on a cluster."""
