"""Names of the files by which a run tells the outside that it is alive; light, so that looking at a run starts at once."""

LOCK = ".lock"  # held by the main rank for as long as it lives; holds its host and process id
HEARTBEATS = "heartbeat"  # directory with one file per rank, written by its watchdog
STACKS = "stacks"  # directory with what every thread did when a run hung
HEARTBEAT_SECONDS = 10.0  # between two signs of life, at most
